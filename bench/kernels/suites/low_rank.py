"""Suite ``low_rank``: batches whose tokens belong to different users, each with low-rank weights of their own."""

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
from bench.kernels.case import Case, TimedCase, shared
from bench.kernels.contender import Contender, Unavailable
from bench.kernels.state import LEARNS, STORAGE, assert_change, layer_count, size_of, some_rows
from ttt.nn import LowRankLinear
from ttt.ops.low_rank import reference

SLOTS, WINDOW, LR = 32, 64, 1e-3


@dataclasses.dataclass(frozen=True)
class Mixed(Case):
    """A decoding step of ``tokens`` T tokens of ``users`` U users, T / U each, through a (d, d) layer with rank r.

    Every user's slot holds r rows. Slots rotate together with the weights, so they are read from memory, too.
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
        """Rows of a slot that a forward pass reads, on average."""
        return self.rank

    def bytes(self, contender: str) -> int:
        """W and x read, y written, and each user's rows read once; "plain torch" gathers them for each token."""
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
        """(T,) int32: tokens of the users in turn."""
        return torch.arange(self.tokens, dtype=torch.int32, device=self.device) % self.users

    def inputs(self) -> Tensor:
        return torch.randn(self.tokens, self.d, device=self.device).to(getattr(torch, self.dtype))

    def layers(self) -> list[LowRankLinear]:
        """Layers to rotate among, with random rows in every slot."""
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
        """Set the number of rows in the slots before the first run."""
        for layer in layers:
            layer.rows.fill_(self.rank)

    def contender(self, one: Callable[[int, Tensor], object], check: Callable[[], None], steps: int = 1) -> Contender:
        """A contender that calls ``one`` (index of a layer, x) with the layers in turn, ``steps`` times a run."""
        count = len(self.layers())
        turn, x = itertools.cycle(range(count)), self.inputs()

        @torch.no_grad()
        def run() -> None:
            for _ in range(steps):
                one(next(turn), x)

        return Contender(run, check, units=steps, cycle=count)

    def check(self, forward: Callable[[Tensor], Tensor]) -> None:
        """Compare 256 outputs of the first layer with float64."""
        layer, x = self.layers()[0], self.inputs()
        rows = some_rows(self.d, device=self.device)
        with torch.no_grad():
            got = forward(x)[:, rows]
        exact = x.double() @ layer.weight[rows].double().T
        for t, u in enumerate(self.slots.tolist()):
            held = slice(0, int(layer.rows[u]))
            exact[t] += (layer.a[u, held].double() @ x[t].double()) @ layer.b[u, held][:, rows].double()
        # The base product, the low-rank part and their sum are each rounded.
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
        """Gather each token's factors, then two batched products."""
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
    """A step of `Mixed` in which every token is also learnt: rows are appended, and full slots (r + C rows) compressed.

    The windows of users, and of layers, are at different stages, so that exactly one slot is compressed every other
    step, which is its share of T / C compressions a step.
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
        """Tokens of one user in a step."""
        return self.tokens // self.users

    def stage(self, layers: list[LowRankLinear]) -> None:
        cycle = WINDOW // self.each  # steps from one compression of a slot to the next
        for i, layer in enumerate(layers):  # their number is odd, so that the parity carries over to the next rotation
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
        """Compare outputs after four steps with two compressions with the reference in float64."""
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


@dataclasses.dataclass(frozen=True)
class Compression(TimedCase):
    """The compression of one slot of a (d, d) layer from r + C rows to r, without replay and pull, on the CPU.

    "torch, eigh" does the same step in torch in float64: Gram matrices of the rows, two calls of `torch.linalg.eigh`,
    and the new rows. "eigh alone" is one such call for an (r + C) x (r + C) matrix, as a bound for any implementation
    with LAPACK's solver. "ttt" and "torch, eigh" also copy the full slot back before each run.
    """

    suite = "low_rank"
    unit = "compression"
    baseline = "torch, eigh"

    d: int
    rank: int

    @property
    def name(self) -> str:
        return f"compression: {self.d}x{self.d}, {self.rank + WINDOW} rows to {self.rank}"

    def parameters(self) -> dict[str, Any]:
        return super().parameters() | {"window": WINDOW}

    def contenders(self) -> dict[str, Callable[[], Contender]]:
        return {"ttt": self.op, "torch, eigh": self.plain, "eigh alone": self.eigh}

    def rows(self) -> tuple[Tensor, Tensor]:
        """A and B of a full slot, (1, r + C, d) each, as learning leaves them: inputs, and smaller gradients."""
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(1, self.rank + WINDOW, self.d, generator=generator) for _ in range(2))
        kind = getattr(torch, self.dtype)
        return a.to(kind), (b * 1e-3).to(kind)

    def contender(self, compress: Callable[[list[Tensor]], None]) -> Contender:
        """``compress`` (state) of a slot that is full again at every run; ``state`` as `ttt.ops.low_rank_compress`."""
        full = self.rows()
        state = [t.clone() for t in full]
        state += [torch.tensor([len(full[0][0])], dtype=torch.int32), torch.zeros(1), torch.zeros(1)]
        state.append(torch.zeros(1, dtype=torch.int64))

        @torch.no_grad()
        def run() -> None:
            for t, before in zip(state, full, strict=False):
                t.copy_(before)
            state[2].fill_(len(full[0][0]))
            compress(state)

        return Contender(run, lambda: self.check(run, state, full), graph=False)

    def check(self, run: Callable[[], None], state: list[Tensor], full: tuple[Tensor, Tensor]) -> None:
        """Compare the new B^T A, on 256 of its rows, with the SVD of the old one in float64."""
        run()
        if state[2].tolist() != [self.rank]:
            raise AssertionError(f"the slot holds {state[2].tolist()} rows, not {self.rank}")
        a, b, _ = reference.truncate(full[0][0].double(), full[1][0].double(), self.rank)
        columns = some_rows(self.d)
        got = state[1][0, : self.rank, columns].double().T @ state[0][0, : self.rank].double()
        exact = b[:, columns].T @ a
        assert_change("B^T A", got, exact, torch.zeros_like(exact), 4 * STORAGE[self.dtype].tolerance)

    def op(self) -> Contender:
        slots = torch.zeros(1, dtype=torch.int64)
        return self.contender(
            lambda s: ttt.ops.low_rank_compress(s[0], s[1], s[2], s[3], s[4], s[5], slots, rank=self.rank)
        )

    def plain(self) -> Contender:
        def compress(state: list[Tensor]) -> None:
            a, b, lost = reference.truncate_by_gram(state[0][0].double(), state[1][0].double(), self.rank)
            for t, fresh in zip(state, (a, b), strict=False):
                t[0, : self.rank] = fresh
                t[0, self.rank :] = 0
            state[2].fill_(self.rank)
            state[4] += lost

        return self.contender(compress)

    def eigh(self) -> Contender:
        a = self.rows()[0][0].double()
        gram = a @ a.T
        return Contender(lambda: torch.linalg.eigh(gram), lambda: None)


def cases(device: str) -> list[Case]:
    """32 tokens of 1, 8 and 32 users, read only and learnt from; on the CPU also the compression of one slot."""
    found: list[Case] = [
        kind(device, dtype, 2048, 32, users, 16, quick=users == 32)
        for dtype in (("bfloat16",) if device == "cuda" else ("float32", "bfloat16"))
        for kind in (Mixed, MixedLearning)
        for users in (1, 8, 32)
    ]
    if device == "cpu":
        found += [Compression(device, dtype, 2048, 16) for dtype in ("float32", "bfloat16")]
    return found
