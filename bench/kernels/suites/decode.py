"""Suite ``decode``: one token at a time through a layer that learns from every token, commits included."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.kernels.case import Case, shared
from bench.kernels.ceilings import read_ceiling, square_ceiling
from bench.kernels.contender import Contender
from bench.kernels.plain_torch import PlainLayer
from bench.kernels.state import (
    STORAGE,
    assert_change,
    copies,
    layer_count,
    learning_layer,
    random_layer,
    size_of,
    some_rows,
)
from ttt.nn import Linear, Update
from ttt.ops import reference
from ttt.ops.arguments import CommitArguments

LAM, LR = 0.01, 1e-3
SMALL = 512
"""Layers of up to this many features are measured from the cache, where the cost of the calls dominates."""


@dataclasses.dataclass(frozen=True)
class Decode(Case):
    """Steps of ``batch`` tokens through (m, n): forward, append to the window of C tokens, commit when it is full.

    Contenders rotate among enough layers for `bench.kernels.state.POOL` bytes of weights; for layers of up to `SMALL`
    features it is a single layer, which stays in the cache. The windows of the layers are filled to different levels,
    so that every C tokens, which is one ``run``, contain exactly one commit. There is no replay. With ``orthogonal``
    = k, the parts of the inputs in k directions are removed (`ttt.ops.project_out`), and the same layer with k = 0 is
    another contender. With ``soft`` they are damped instead, and so are the gradients along as many directions.

    On a GPU, "ttt" runs as in a server: layers are capturable (`ttt.capturable_`), one CUDA graph holds a step of every
    layer, and each replay decides on the device which layers commit.
    """

    suite = "decode"
    unit = "step"
    baseline = forward = "nn.Linear"

    m: int
    n: int
    window: int
    batch: int
    state: str
    orthogonal: int = 0
    soft: bool = False

    @property
    def name(self) -> str:
        batch = "" if self.batch == 1 else f", batch {self.batch}"
        state = "" if self.state == self.dtype else f", {self.state} state"
        directions = f", k = {self.orthogonal}{' soft' * self.soft}" if self.orthogonal else ""
        return f"{self.m}x{self.n}, window {self.window}{batch}{state}{directions}"

    @property
    def in_cache(self) -> bool:
        return max(self.m, self.n) <= SMALL

    @property
    def ceiling(self) -> str | None:
        return None if self.in_cache else "copy"

    def ceilings(self) -> dict[str, Callable[[], Contender]]:
        """The copy; a stream that only reads, as nearly all bytes of a step are read; and a square product.

        torch's product of a commit's own shape would not do: with few tokens its time is that of writing the result,
        which a commit never stores. The small layers, which are measured from the cache, have no product.
        """
        found = super().ceilings() | {"read": lambda: read_ceiling(self.device)}
        if self.in_cache:
            return found
        return found | {"square matmul": lambda: square_ceiling(self.device, self.dtype)}

    @property
    def capturable(self) -> bool:
        return self.device == "cuda"

    @property
    def steps(self) -> int:
        """Number of steps from one commit of a layer to the next."""
        return self.window // self.batch

    def bytes(self, contender: str) -> int:
        """The bytes of one step of B tokens.

        Every contender reads W and x and writes y. Learning layers also

        * append B rows of m + n numbers to the window,
        * read (C - B) / 2 rows of the window, its mean filling at a forward pass,
        * make the share B / C of a commit, which reads and writes W and F, and reads W*, Omega and the C rows of the
          window,
        * if directions are removed, write B rows of n numbers to the sample of recent inputs, and read the k
          directions; if they are damped, the same of the m numbers of gradients.
        """
        return round(sum(moved for moved, _ in self.parts(contender)))

    def flops(self, contender: str) -> int:
        """The products of the forward pass, of the window at its mean filling, and of G and S."""
        return round(sum(flops for _, flops in self.parts(contender)))

    def product_flops(self, contender: str) -> None:
        """None: the rate of a product is that of a commit, which is a small part of a step."""

    def parts(self, contender: str) -> list[tuple[float, float]]:
        """A forward pass with the append of its rows, and a step's share of a commit, which comes after it."""
        m, n, size, b, c = self.m, self.n, size_of(self.dtype), self.batch, self.window
        moved, flops = float((m * n + b * (m + n)) * size), float(2 * m * n * b)
        if contender == "nn.Linear":
            return [(moved, flops)]
        moved += (b + (c - b) / 2) * (m + n) * size
        flops += b * (c - b) * (m + n)
        if self.orthogonal and contender == "ttt":
            moved += (self.orthogonal + b) * (n + m * self.soft) * size
            flops += 4 * b * (n + m * self.soft) * self.orthogonal
        written = m * n * (3 * size + 3 * STORAGE[self.state].bytes)
        return [(moved, flops), (b * (m + n) * size + written * b / c, 4 * m * n * b)]

    def parameters(self) -> dict[str, Any]:
        return super().parameters() | {"in_cache": self.in_cache}

    def weights(self) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """(weights to rotate among, the states of three layers, which all of them share)."""
        small = self.in_cache

        def make() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
            state = random_layer(self.m, self.n, self.dtype, self.state, self.device)
            count = 1 if small else layer_count(state["weight"].nbytes)
            return [state["weight"].clone() for _ in range(count)], copies(state, 3)

        return shared(("decode", self.device, self.dtype, self.state, self.m, self.n), make)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, n), delta (B, m) and eta (B,)."""
        kind = getattr(torch, self.dtype)
        x = torch.randn(self.batch, self.n, device=self.device).to(kind)
        delta = (torch.randn(self.batch, self.m, device=self.device) * 1e-2).to(kind)
        return x, delta, torch.full((self.batch,), LR, device=self.device)

    def pending(self, i: int, count: int) -> int:
        """Number of rows in the window of layer i at first, so that exactly one layer commits every ``steps`` steps.

        Layer i runs at steps i, i + ``count``, ... It has to commit at a step that is -1 modulo ``steps``. Such a step
        exists for every i, because ``count`` is odd and ``steps`` is a power of two.
        """
        return ((i + 1) * pow(count, -1, self.steps) - 1) % self.steps * self.batch

    def contenders(self) -> dict[str, Callable[[], Contender]]:
        found = {"ttt": self.learning, "nn.Linear": self.linear}
        if self.orthogonal:
            return found | {"ttt, k = 0": dataclasses.replace(self, orthogonal=0, soft=False).learning}
        if self.state in ("float32", "bfloat16"):
            found["plain torch"] = self.plain
        return found

    def _contender(
        self, layers: list, one: Callable[[Any], object], check: Callable[[], None], steps: int | None = None
    ) -> Contender:
        turn, steps = itertools.cycle(layers), self.steps if steps is None else steps

        @torch.no_grad()
        def run() -> None:
            for _ in range(steps):
                one(next(turn))

        return Contender(run, check, units=steps, cycle=len(layers))

    def layer(self, weight: Tensor, state: dict[str, Tensor]) -> Linear:
        """Our layer, with an empty window."""
        layer = learning_layer(
            weight, state, lr=LR, window=self.window, ewc_lambda=LAM, replay_rows=0, state_dtype=self.state,
            replay_capacity=64, **{"kronecker" if self.soft else "orthogonal": self.orthogonal},
        )  # fmt: skip
        for basis in (layer.basis, layer.output_basis):
            if basis is not None:
                k, size = basis.shape
                unit = torch.linalg.qr(torch.randn(size, k, device=self.device)).Q.T
                basis.copy_(unit * torch.rand(k, 1, device=self.device).sqrt() if self.soft else unit)
        return layer

    def learning(self) -> Contender:
        weights, states = self.weights()
        layers = [self.layer(w, states[i % len(states)]) for i, w in enumerate(weights)]
        x, delta, eta = self.inputs()
        update = self._update(x, delta, eta)
        for i, layer in enumerate(layers):
            if self.capturable:
                layer.capturable_(self.batch)
            for _ in range(self.pending(i, len(layers)) // self.batch):
                layer.learn(update)

        def one(layer: Linear) -> None:
            layer(x)
            layer.learn(update)

        if not self.capturable:
            return self._contender(layers, one, self.check_ours)

        @torch.no_grad()
        def rotation() -> None:
            for layer in layers:
                one(layer)

        return Contender(rotation, self.check_ours, units=len(layers))

    def plain(self) -> Contender:
        weights, states = self.weights()
        layers = [
            PlainLayer({**states[i % len(states)], "weight": w}, self.window, LAM, self.pending(i, len(weights)))
            for i, w in enumerate(weights)
        ]
        x, delta, eta = self.inputs()

        def one(layer: PlainLayer) -> None:
            layer(x)
            layer.learn(x, delta, eta)

        return self._contender(layers, one, self.check_plain)

    def linear(self) -> Contender:
        weights, _ = self.weights()
        layers = [torch.nn.Linear(self.n, self.m, bias=False, device="meta") for _ in weights]
        for layer, w in zip(layers, weights, strict=True):
            layer.weight = torch.nn.Parameter(w, requires_grad=False)
        x, _, _ = self.inputs()
        return self._contender(layers, lambda layer: layer(x), lambda: None, 1 if self.capturable else None)

    def _update(self, x: Tensor, delta: Tensor, eta: Tensor) -> Update:
        return Update(x, delta, eta, None, torch.tensor(True, device=x.device))

    # -- checks, on a few more tokens than a window holds, so that they include a commit ----------------------------

    def check_ours(self) -> None:
        start = random_layer(self.m, self.n, self.dtype, self.state, self.device)
        state = {name: t.clone() for name, t in start.items()}
        layer = self.layer(state["weight"], state)
        if self.capturable:
            layer.capturable_(self.batch)
        self.check(
            start, state, layer, lambda x, delta, eta: layer.learn(self._update(x, delta, eta)),
            late=self.capturable and 2 * self.batch <= self.window, bases=(layer.basis, layer.output_basis),
        )  # fmt: skip

    def check_plain(self) -> None:
        start = random_layer(self.m, self.n, self.dtype, self.state, self.device)
        state = {name: t.clone() for name, t in start.items()}
        layer = PlainLayer(state, self.window, LAM)
        self.check(start, state, layer, layer.learn)

    @torch.no_grad()
    def check(
        self,
        start: dict[str, Tensor],
        state: dict[str, Tensor],
        forward: Any,
        learn: Callable,
        late: bool = False,
        bases: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:
        """Compare outputs, W and F with the float64 reference of window and commit, on 256 outputs.

        Args:
            start: the layer's state before the check.
            state: the tensors that the layer changes.
            forward: the layer.
            learn: makes the layer learn x, delta and eta.
            late: a full window is committed by the next step, before it is appended, as in capturable layers.
            bases: (k, n) and (k, m), what is removed from inputs and from gradients before they are learnt.
        """
        rows, decode = some_rows(self.m, device=self.device), STORAGE[self.state].decode
        w, anchor = (start[name][rows].double() for name in ("weight", "anchor"))
        importance, trace = (decode(start[name][rows], self.n).double() for name in ("importance", "trace"))
        before = w.clone(), trace.clone()
        window: list[tuple[Tensor, Tensor, Tensor]] = []
        step = torch.zeros(1, dtype=torch.int64, device=self.device)
        got, exact, at_commit = [], [], None
        kind = getattr(torch, self.dtype)

        def commit_window() -> None:
            xs, deltas, etas = (torch.cat(part) for part in zip(*window, strict=True))
            state: dict[str, Any] = {
                "weight": w,
                "anchor": anchor,
                "importance": importance,
                "trace": trace,
                "step": step,
            }
            absent: dict[str, Any] = dict.fromkeys(("trace_delta", "memory", "seen"))
            rows: dict[str, Any] = {"x": xs, "delta": deltas, "eta": etas}
            reference.commit(*CommitArguments(**state, **rows, **absent, lam=LAM))
            window.clear()

        for _ in range(self.steps + 3):
            x, _, eta = self.inputs()
            # So large that learning from a few tokens changes the output by about its own size.
            delta = (torch.randn(self.batch, self.m, device=self.device) * 5).to(kind)
            rows_now = [torch.cat(part) for part in zip(*window, strict=True)] if window else []
            if not rows_now:
                rows_now = [t[:0] for t in (x.double(), delta[:, rows].double(), eta.double())]
            exact.append(reference.window_linear(x.double(), w, None, *rows_now))
            got.append(forward(x)[:, rows])
            learn(x, delta, eta)
            committed = late and len(window) == self.steps
            if committed:
                commit_window()
            learnt = [
                part.double() if basis is None else reference.project_out(part.double(), basis.double())
                for part, basis in zip((x, delta), bases, strict=True)
            ]
            window.append((learnt[0], learnt[1][:, rows], eta.double()))
            if not late and len(window) == self.steps:
                committed = True
                commit_window()
            if committed:
                at_commit = state["weight"][rows].clone(), decode(state["trace"][rows], self.n).clone()
        tolerance, y = STORAGE[self.dtype].tolerance, torch.cat(exact)
        assert_change("the output", torch.cat(got), y, torch.zeros_like(y), 2 * tolerance)
        assert at_commit is not None
        assert_change("weight", at_commit[0], w, before[0], 2 * tolerance)
        assert_change("trace", at_commit[1], trace, before[1], 2 * STORAGE[self.state].tolerance)


def cases(device: str) -> list[Case]:
    """Windows of 16, 64 and 128 tokens, for square layers on CPU and the layers of an 8 B model on CUDA."""
    windows = (16, 64, 128)
    found: list[Case] = []
    if device == "cuda":
        for m, n in ((4096, 4096), (4096, 14336)):
            for batch in (1, 8):
                found += [
                    Decode(device, "bfloat16", m, n, c, batch, "bfloat16", quick=n == 4096 and c == 64) for c in windows
                ]
        found += [
            Decode(device, "bfloat16", 4096, 4096, 64, batch, "bfloat16", orthogonal=32, soft=True) for batch in (1, 8)
        ]
    else:
        for dtype in ("float32", "bfloat16"):
            for d in (256, 512, 1024, 2048, 4096):
                found += [Decode(device, dtype, d, d, c, 1, dtype, quick=c == 16 and d in (512, 4096)) for c in windows]
        found += [Decode(device, "float32", d, d, 64, 1, "float32", orthogonal=16) for d in (512, 2048, 4096)]
        for dtype in ("float32", "bfloat16"):
            found += [Decode(device, dtype, d, d, 64, 1, dtype, orthogonal=32, soft=True) for d in (512, 4096)]
    return found + [Decode(device, "bfloat16", 4096, 4096, c, 1, "8bit") for c in windows]
