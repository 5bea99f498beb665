"""Suite ``window_linear``: y = x W^T - ((x X^T) * eta) D, the output of a layer with a full window."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ttt
from bench.kernels.case import Case, shared
from bench.kernels.ceilings import product_ceiling, read_ceiling, square_ceiling
from bench.kernels.contender import Contender
from bench.kernels.plain_torch import compiled, plain_window_linear
from bench.kernels.state import STORAGE, assert_change, layer_count, size_of, some_rows
from ttt.ops import reference


@dataclasses.dataclass(frozen=True)
class WindowLinear(Case):
    """``tokens`` T through (m, n) with a window of ``window`` C rows, all in use, which all layers share."""

    suite = "window_linear"
    baseline = forward = "nn.Linear"

    m: int
    n: int
    tokens: int
    window: int
    compiles: bool = False

    @property
    def name(self) -> str:
        return f"{self.m}x{self.n}, T = {self.tokens}, window {self.window}"

    def bytes(self, contender: str) -> int:
        """W, x and the C rows of m + n numbers of the window are read, y is written; nn.Linear has no window."""
        rows = self.tokens + (0 if contender == "nn.Linear" else self.window)
        return (self.m * self.n + rows * (self.m + self.n)) * size_of(self.dtype)

    def flops(self, contender: str) -> int:
        window = 0 if contender == "nn.Linear" else self.window * (self.m + self.n)
        return 2 * self.tokens * (self.m * self.n + window)

    @property
    def ceiling(self) -> str | None:
        return "copy" if self.tokens <= 16 else "matmul"

    def ceilings(self) -> dict[str, Callable[[], Contender]]:
        found = super().ceilings() | {"read": lambda: read_ceiling(self.device)}
        if self.ceiling == "matmul":
            found["matmul"] = lambda: product_ceiling(self.device, self.dtype, self.m, self.n, self.tokens)
            found["square matmul"] = lambda: square_ceiling(self.device, self.dtype)
        return found

    def parameters(self) -> dict[str, Any]:
        return {k: v for k, v in super().parameters().items() if k != "compiles"}

    def contenders(self) -> dict[str, Callable[[], Contender]]:
        kind, device = getattr(torch, self.dtype), self.device

        def make() -> list[Tensor]:
            first = (torch.randn(self.m, self.n, device=device) * 0.02).to(kind)
            return [first.clone() for _ in range(layer_count(first.nbytes))]

        x, win_x = (torch.randn(rows, self.n, device=device).to(kind) for rows in (self.tokens, self.window))
        # So large that the window changes the output by about its own size, for every window size.
        win_delta = (torch.randn(self.window, self.m, device=device) / self.window**0.5).to(kind)
        win_eta = torch.full((self.window,), 0.02, device=device)
        window = (win_x, win_delta, win_eta)

        def contender(function: Callable[..., Tensor], *rest: Tensor | None) -> Contender:
            weights = shared(("window_linear", device, self.dtype, self.m, self.n), make)
            turn = itertools.cycle(weights)

            def check() -> None:
                rows = some_rows(self.m, device=device)
                got = function(x, weights[0], *rest)[:, rows]
                w, change = weights[0][rows].double(), (win_x.double(), win_delta[:, rows].double(), win_eta.double())
                if not rest:
                    change = (change[0], change[1], torch.zeros_like(change[2]))
                exact = reference.window_linear(x.double(), w, None, *change)
                # Twice the tolerance, as the plain formula rounds to bfloat16 several times.
                assert_change("y", got, exact, torch.zeros_like(exact), 2 * STORAGE[self.dtype].tolerance)

            def run() -> None:
                function(x, next(turn), *rest)

            return Contender(run, check, cycle=len(weights))

        found = {
            "ttt": lambda: contender(ttt.ops.window_linear, None, *window),
            "nn.Linear": lambda: contender(torch.nn.functional.linear),
            "plain torch": lambda: contender(plain_window_linear, *window),
        }
        if self.compiles:
            found["torch.compile"] = lambda: contender(compiled(plain_window_linear), *window)
        return found


def cases(device: str) -> list[Case]:
    """One token with each window of the suite ``decode``; 8 and 64 tokens with a window of 64."""
    shapes = ((4096, 4096), (4096, 14336)) if device == "cuda" else ((1024, 1024), (4096, 4096))
    return [
        WindowLinear(
            device, dtype, m, n, tokens, window,
            compiles=window == 64 and tokens in (1, 64), quick=(m, n) == shapes[0] and tokens < 64 and window == 64,
        )
        for dtype in (("bfloat16",) if device == "cuda" else ("float32", "bfloat16"))
        for m, n in shapes
        for tokens, window in ((1, 16), (1, 64), (1, 128), (8, 64), (64, 64))
    ]  # fmt: skip
