"""Suite ``commit``: write T tokens, with R replay rows, into the weight W and the trace F."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ttt
from bench.kernels.case import Case, shared
from bench.kernels.ceilings import copy_ceiling, product_ceiling, square_ceiling
from bench.kernels.contender import Contender
from bench.kernels.plain_torch import compiled, plain_commit
from bench.kernels.state import STORAGE, assert_change, copies, layer_count, random_layer, size_of, some_rows
from ttt.ops import reference
from ttt.ops.arguments import CommitArguments

# The strengths are fixed here, so that results do not depend on the defaults of `ttt.ops.commit`.
LAM, BETA, EPS, ETA, MEMORY = 0.01, 0.3, 1e-3, 5e-3, 256
SAMPLED = "ttt, trace_every = 4"

Layer = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Commit(Case):
    """A commit of ``tokens`` T and ``replay`` R rows into W (m, n); importance and trace are stored as ``state``.

    The contender ``forward`` is the product of the same T tokens with W. With ``samples``, another contender sums the
    trace over one random token of every four.
    """

    suite = "commit"
    baseline = "plain torch"
    forward = "forward"

    m: int
    n: int
    tokens: int
    replay: int
    state: str
    plain: bool = True  # with the contender "plain torch", which takes up to a second per call
    compiles: bool = False  # with the contender "torch.compile", which takes seconds for each shape
    samples: bool = False

    @property
    def name(self) -> str:
        state = "" if self.state == self.dtype else f", {self.state} state"
        return f"{self.m}x{self.n}, T = {self.tokens}, R = {self.replay}{state}"

    @property
    def ceiling(self) -> str | None:
        return "copy" if self.tokens <= 16 else "matmul"

    def bytes(self, contender: str) -> int:
        """W and F are read and written; W*, Omega, the tokens' x and delta, and the replay rows are read.

        The forward pass reads W and x and writes y.
        """
        m, n, size = self.m, self.n, size_of(self.dtype)
        rows = self.tokens * (m + n) * size
        if contender == "forward":
            return m * n * size + rows
        return round(m * n * (3 * size + 3 * STORAGE[self.state].bytes)) + rows + self.replay * n * size

    def flops(self, contender: str) -> int:
        """G and S over T tokens, or S over a sample of them; E and E^T V over R rows."""
        rows = 0 if contender == "forward" else 4 * self.m * self.n * self.replay
        return self.product_flops(contender) + rows

    def product_flops(self, contender: str) -> int:
        one = 2 * self.m * self.n * self.tokens
        return {"forward": one, SAMPLED: one + one // 4}.get(contender, 2 * one)

    def ceilings(self) -> dict[str, Callable[[], Contender]]:
        found = {"copy": lambda: copy_ceiling(self.device)}
        if self.ceiling == "matmul":
            found["matmul"] = lambda: product_ceiling(self.device, self.dtype, self.m, self.tokens, self.n)
            found["square matmul"] = lambda: square_ceiling(self.device, self.dtype)
        return found

    def parameters(self) -> dict[str, Any]:
        return {k: v for k, v in super().parameters().items() if k not in ("plain", "compiles", "samples")}

    def layers(self) -> tuple[Layer, list[Layer]]:
        """(the state of a layer from which checks start, the layers to rotate among)."""

        def make() -> tuple[Layer, list[Layer]]:
            start = random_layer(self.m, self.n, self.dtype, self.state, self.device)
            return start, copies(start, layer_count(sum(t.nbytes for t in start.values())))

        return shared(("commit", self.device, self.dtype, self.state, self.m, self.n), make)

    def inputs(self) -> dict[str, Any]:
        """x, delta and eta, and the replay memory if there is one.

        delta is so large that the update G is as large as the weights, so that the check can see errors of it.
        """
        kind, t = getattr(torch, self.dtype), self.tokens
        generator = torch.Generator(device=self.device).manual_seed(1)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, device=self.device, generator=generator)

        found = {"x": randn(t, self.n).to(kind), "delta": (randn(t, self.m) * (0.02 / ETA / t**0.5)).to(kind)}
        found["eta"] = torch.full((t,), ETA, device=self.device)
        if self.replay:
            found["memory"] = randn(MEMORY, self.n).to(kind)
            found["seen"] = torch.tensor([MEMORY], device=self.device)
        return found

    def contenders(self) -> dict[str, Callable[[], Contender]]:
        inputs = functools.cache(self.inputs)  # allocated when the first contender is made
        step = torch.zeros(1, dtype=torch.int64, device=self.device)

        def ours(layer: Layer, every: int = 1) -> None:
            ttt.ops.commit(
                **layer, **inputs(), step=step, lam=LAM, replay_rows=self.replay, beta=BETA, eps=EPS, trace_every=every
            )

        def plain(function: Callable) -> Callable[[Layer], None]:
            def run(layer: Layer) -> None:
                given = inputs()
                tokens = {k: given[k] for k in ("x", "delta", "eta")}
                rows = None
                if self.replay:  # the rows that ours draws
                    draw = ttt.ops.reservoir_draw(given["seen"], step, capacity=MEMORY, rows=self.replay)
                    rows = given["memory"][draw]
                function(**layer, **tokens, lam=LAM, replayed=rows, beta=BETA, eps=EPS)

            return run

        def forward(layer: Layer) -> Tensor:
            return torch.nn.functional.linear(inputs()["x"], layer["weight"])

        def writer(make: Callable[[], Callable[[Layer], None]], every: int = 1) -> Callable[[], Contender]:
            def contender() -> Contender:
                run = make()
                return self._over_layers(run, lambda: self.check(run, inputs(), step, every))

            return contender

        found = {"ttt": writer(lambda: ours)}
        if self.samples:
            found[SAMPLED] = writer(lambda: functools.partial(ours, every=4), every=4)
        if self.plain and self.state in ("float32", "bfloat16"):
            found["plain torch"] = writer(lambda: plain(plain_commit))
            if self.compiles:
                found["torch.compile"] = writer(lambda: plain(compiled(plain_commit)))
        found["forward"] = lambda: self._over_layers(forward, lambda: None)  # torch's own
        return found

    def _over_layers(self, run: Callable[[Layer], object], check: Callable[[], None]) -> Contender:
        _, layers = self.layers()
        turn = itertools.cycle(layers)
        return Contender(lambda: run(next(turn)), check, cycle=len(layers))

    def check(self, run: Callable[[Layer], None], inputs: dict[str, Any], step: Tensor, every: int = 1) -> None:
        """Compare W and F with the float64 reference on 256 rows; W* and Omega must not change by one bit."""
        start, layers = self.layers()
        got = layers[0]
        for name, tensor in start.items():
            got[name].copy_(tensor)
        rows = some_rows(self.m, device=self.device)
        decode = STORAGE[self.state].decode
        exact: dict[str, Any] = {name: start[name][rows].double() for name in ("weight", "anchor")}
        exact |= {name: decode(start[name][rows], self.n).double() for name in ("importance", "trace")}
        before = {name: t.clone() for name, t in exact.items()}
        wide = {name: t if name == "seen" else t.double() for name, t in inputs.items()}
        wide["delta"] = wide["delta"][:, rows].contiguous()
        absent = dict.fromkeys(("trace_delta", "memory", "seen"))
        given: dict[str, Any] = absent | exact | wide
        options: dict[str, Any] = {
            "replay_rows": self.replay,
            "beta": BETA,
            "eps": EPS,
            "lam": LAM,
            "trace_every": every,
        }
        reference.commit(*CommitArguments(**given, step=step.clone(), **options))
        run(got)
        allowed = {"weight": STORAGE[self.dtype].tolerance, "trace": STORAGE[self.state].tolerance}
        assert_change("weight", got["weight"][rows], exact["weight"], before["weight"], allowed["weight"])
        assert_change("trace", decode(got["trace"][rows], self.n), exact["trace"], before["trace"], allowed["trace"])
        for name in ("anchor", "importance"):
            if not torch.equal(got[name], start[name]):
                raise AssertionError(f"{name} was written")
        if not bool(torch.isfinite(got["weight"]).all()):
            raise AssertionError("weight is not finite")


def cases(device: str) -> list[Case]:
    """On CPU from 1 to 1024 tokens, in float32 and bfloat16; on CUDA the shapes of an 8 B model, in bfloat16."""
    shapes, all_tokens = [(1024, 1024), (2048, 2048), (2048, 5632), (4096, 4096)], [1, 16, 64, 256, 1024]
    dtypes = ["float32", "bfloat16"]
    if device == "cuda":
        shapes, all_tokens, dtypes = [(4096, 4096), (4096, 14336)], [1, 16, 64, 2048, 8192], ["bfloat16"]
    found: list[Case] = [
        Commit(
            device, dtype, m, n, tokens, replay, dtype,
            plain=not replay or tokens == 16,
            compiles=not replay and m in (1024, 4096) and tokens in (1, 64),
            samples=tokens == 1024 and not replay and m == n and m in (1024, 4096),
            quick=(m, n) == shapes[0] and tokens in (1, 16, 64),
        )
        for dtype in dtypes
        for m, n in shapes
        for tokens in all_tokens
        for replay in (0, 4)
    ]  # fmt: skip
    found += [Commit(device, "bfloat16", 4096, 4096, tokens, 0, "8bit") for tokens in all_tokens[:3]]
    return found
