"""Suite ``low_rank``: a batch whose tokens belong to different users, each with low-rank weights of their own."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import ttt
from bench.kernels.case import Case, shared
from bench.kernels.contender import Contender, Unavailable
from bench.kernels.state import LEARNS, STORAGE, assert_change, layer_count, size_of, some_rows
from ttt.nn import LowRankLinear

SLOTS, WINDOW, LR = 32, 64, 1e-3


@dataclasses.dataclass(frozen=True)
class Mixed(Case):
    """A decoding step of ``tokens`` T tokens of ``users`` U users, T / U each, through (d, d) with rank r.

    Every user's slot holds r rows, and they rotate with the weights: they come from memory, too.
    """

    suite = "low_rank"
    unit = "step"
    baseline = forward = "nn.Linear"

    d: int
    tokens: int
    users: int
    rank: int

    @property
    def name(self) -> str:
        return f"{self.d}x{self.d}, {self.tokens} tokens of {self.users} users, rank {self.rank}"

    @property
    def rows(self) -> float:
        """Of a slot, read at a forward pass, on average."""
        return self.rank

    def bytes(self, contender: str) -> int:
        """W read, x read and y written; the rows of each user in the batch read, for each token where it gathers."""
        readers = {"nn.Linear": 0, "plain torch": 3 * self.tokens}.get(contender, self.users)
        moved = self.d * self.d + 2 * self.tokens * self.d + readers * self.rows * 2 * self.d
        return round(moved * size_of(self.dtype))

    def flops(self, contender: str) -> int:
        rows = 0 if contender == "nn.Linear" else self.rows
        return round(2 * self.tokens * self.d * (self.d + 2 * rows))

    @property
    def ceiling(self) -> str | None:
        return None

    # -- inputs -------------------------------------------------------------------------------------------------------

    @property
    def slots(self) -> Tensor:
        """(T,) int32: the users' tokens take turns."""
        return torch.arange(self.tokens, dtype=torch.int32, device=self.device) % self.users

    def inputs(self) -> Tensor:
        return torch.randn(self.tokens, self.d, device=self.device).to(getattr(torch, self.dtype))

    def layers(self) -> list[LowRankLinear]:
        """Layers to rotate among, with r random rows in every slot."""
        low_rank = ttt.LowRank(slots=SLOTS, rank=self.rank, window=WINDOW)
        config = dataclasses.replace(LEARNS, lr=LR, protect=[], per_user=low_rank)
        kind = getattr(torch, self.dtype)

        def make() -> list[LowRankLinear]:
            size = size_of(self.dtype) * self.d * (self.d + 2 * SLOTS * low_rank.capacity)
            found = []
            for _ in range(layer_count(size)):
                layer = LowRankLinear(self.d, self.d, bias=False, device=self.device, dtype=kind, config=config)
                layer.a.normal_()
                layer.b.normal_(std=self.d**-0.5)
                found.append(layer)
            return found

        found = shared(("low_rank", self.device, self.dtype, self.d, self.rank), make)
        for layer in found:
            layer.routing.set(self.slots)
        return found

    def stage(self, layers: list[LowRankLinear]) -> None:
        """How full the slots are at first."""
        for layer in layers:
            layer.rows.fill_(self.rank)

    def contender(self, one: Callable[[int, Tensor], object], check: Callable[[], None], steps: int = 1) -> Contender:
        """``one`` (index of a layer, x), in turn; a run makes ``steps`` of them."""
        count = len(self.layers())
        turn, x = itertools.cycle(range(count)), self.inputs()

        @torch.no_grad()
        def run() -> None:
            for _ in range(steps):
                one(next(turn), x)

        return Contender(run, check, units=steps, cycle=count, graph=False)

    def check(self, forward: Callable[[Tensor], Tensor]) -> None:
        """The first layer's output, on 256 outputs, against float64."""
        layer, x = self.layers()[0], self.inputs()
        rows = some_rows(self.d, device=self.device)
        with torch.no_grad():
            got = forward(x)[:, rows]
        exact = x.double() @ layer.weight[rows].double().T
        for t, u in enumerate(self.slots.tolist()):
            held = slice(0, int(layer.rows[u]))
            exact[t] += (layer.a[u, held].double() @ x[t].double()) @ layer.b[u, held][:, rows].double()
        # The base product, what is added, and their sum are each rounded.
        assert_change("y", got, exact, torch.zeros_like(exact), 2 * STORAGE[self.dtype].tolerance)

    # -- contenders ---------------------------------------------------------------------------------------------------

    def contenders(self) -> dict[str, Callable[[], Contender]]:
        return {"ttt": self.mixed, "nn.Linear": self.linear, "plain torch": self.plain, "PEFT": self.peft}

    def mixed(self) -> Contender:
        layers = self.layers()
        self.stage(layers)
        return self.contender(lambda i, x: layers[i](x), lambda: self.check(layers[0]))

    def linear(self) -> Contender:
        layers = self.layers()
        return self.contender(lambda i, x: functional.linear(x, layers[i].weight), lambda: None)

    def plain(self) -> Contender:
        """Each token's factors gathered, and two batched products."""
        layers, slots, r = self.layers(), self.slots.long(), self.rank

        def one(i: int, x: Tensor) -> Tensor:
            layer = layers[i]
            inner = torch.bmm(layer.a[slots, :r], x.unsqueeze(2))
            change = torch.bmm(inner.transpose(1, 2), layer.b[slots, :r])
            return functional.linear(x, layer.weight) + change.squeeze(1)

        return self.contender(one, lambda: self.check(lambda x: one(0, x)))

    def peft(self) -> Contender:
        """PEFT's LoRA layer with ``adapter_names``, an adapter for each user."""
        try:
            from peft import LoraConfig
            from peft.tuners.lora import Linear as LoraLinear
        except ImportError:
            raise Unavailable("peft is not installed") from None
        layers, names = self.layers(), [f"user{u}" for u in self.slots.tolist()]
        made = []
        for layer in layers:
            base = nn.Linear(self.d, self.d, bias=False, device="meta")
            base.weight = layer.weight
            config = LoraConfig(r=self.rank, lora_alpha=self.rank, init_lora_weights=False)
            lora = LoraLinear(base, "user0", config=config, r=self.rank, lora_alpha=self.rank, init_lora_weights=False)
            for u in range(self.users):
                if u:
                    lora.update_layer(
                        f"user{u}", self.rank, lora_alpha=self.rank, config=config, init_lora_weights=False,
                        lora_dropout=0.0, use_rslora=False,
                    )  # fmt: skip
                lora.lora_A[f"user{u}"].weight = nn.Parameter(layer.a[u, : self.rank].clone())
                lora.lora_B[f"user{u}"].weight = nn.Parameter(layer.b[u, : self.rank].T.contiguous())
            made.append(lora.eval())

        def forward(lora: nn.Module, x: Tensor) -> Tensor:
            return lora(x, adapter_names=names)

        return self.contender(lambda i, x: forward(made[i], x), lambda: self.check(lambda x: forward(made[0], x)))


@dataclasses.dataclass(frozen=True)
class MixedLearning(Mixed):
    """The same, and every token is learnt: appended, and slots compressed when they hold r + C rows.

    Users' windows are at different stages, and layers' too, so that exactly one slot is compressed every other step,
    which is its share of T / C compressions a step.
    """

    @property
    def name(self) -> str:
        return f"learning: {super().name}, window {WINDOW}"

    @property
    def rows(self) -> float:
        return self.rank + (WINDOW - self.tokens / self.users) / 2

    def parameters(self) -> dict[str, Any]:
        return super().parameters() | {"window": WINDOW}

    def contenders(self) -> dict[str, Callable[[], Contender]]:
        return {"ttt": self.mixed, "nn.Linear": self.linear}

    @property
    def each(self) -> int:
        """Tokens of one user a step."""
        return self.tokens // self.users

    def stage(self, layers: list[LowRankLinear]) -> None:
        cycle = WINDOW // self.each  # steps from one compression of a slot to its next
        for i, layer in enumerate(layers):  # an odd number of them: the parity goes on through every rotation
            for u in range(self.users):
                layer.rows[u] = self.rank + (u * cycle // self.users + i) % cycle * self.each

    def mixed(self) -> Contender:
        layers = self.layers()
        self.stage(layers)
        delta, eta = self.inputs() * 1e-2, torch.full((self.tokens,), LR, device=self.device)
        slots = self.slots

        def one(i: int, x: Tensor) -> None:
            layers[i](x)
            layers[i].learn(x, delta, eta, slots)

        return self.contender(one, lambda: self.check_learning(layers[0]), steps=2)

    @torch.no_grad()
    def check_learning(self, layer: LowRankLinear) -> None:
        """Outputs after a few steps, two compressions among them, against the reference in float64."""
        outputs = []
        x, delta = self.inputs(), self.inputs() * 10
        for kind in (layer.weight.dtype, torch.float64):
            copied = copy.deepcopy(layer)
            if kind == torch.float64:
                copied.double()
            copied.routing.set(self.slots)
            eta = torch.full((self.tokens,), LR, device=self.device, dtype=copied.eta_sum.dtype)
            for _ in range(4):
                copied.learn(x.to(kind), delta.to(kind), eta, self.slots)
            if not int(copied.step.sum()):
                raise AssertionError("no slot was compressed in four steps")
            outputs.append(copied(x.to(kind)))
        assert_change("y", outputs[0], outputs[1], torch.zeros_like(outputs[1]), 2 * STORAGE[self.dtype].tolerance)


def cases(device: str) -> list[Case]:
    """32 tokens of 1, 8 and 32 users, read only and learnt from."""
    return [
        kind(device, dtype, 2048, 32, users, 16, quick=users == 32)
        for dtype in (("bfloat16",) if device == "cuda" else ("float32", "bfloat16"))
        for kind in (Mixed, MixedLearning)
        for users in (1, 8, 32)
    ]
