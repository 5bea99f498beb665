"""Suite ``fisher``: sum a layer's per-token squared gradients, in addition to its forward and backward pass."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ttt
from bench.kernels.case import Case
from bench.kernels.ceilings import product_ceiling
from bench.kernels.contender import Contender, Unavailable
from bench.kernels.plain_torch import compiled
from bench.kernels.state import assert_change

BASELINE = "forward + backward"


@dataclasses.dataclass(frozen=True)
class Fisher(Case):
    """A forward and backward pass over ``tokens`` T, and F <- F + (D*D)^T (X*X).

    The backward pass computes the gradient of the weight, but not of the input. (D*D)^T (X*X) (m, n) is the sum over
    the tokens of the squared gradient of the weight.
    """

    suite = "fisher"
    baseline = forward = BASELINE

    m: int
    n: int
    tokens: int
    thread_count: int

    @property
    def name(self) -> str:
        threads = f", {self.thread_count} thread{'s' * (self.thread_count > 1)}" if self.device == "cpu" else ""
        return f"{self.m}x{self.n}, T = {self.tokens}{threads}"

    @property
    def threads(self) -> int | None:
        return self.thread_count

    @property
    def ceiling(self) -> str | None:
        return "matmul"

    def bytes(self, contender: str) -> int:
        """W, x and delta are read, the gradient is written; then F is read and written, x and delta are read again."""
        matrices, rows = (2, 3) if contender == BASELINE else (4, 5)
        return 4 * (matrices * self.m * self.n + rows * self.tokens * (self.m + self.n) // 2)

    def flops(self, contender: str) -> int:
        return (4 if contender == BASELINE else 6) * self.m * self.n * self.tokens

    def ceilings(self) -> dict[str, Callable[[], Contender]]:
        return {"matmul": lambda: product_ceiling(self.device, self.dtype, self.m, self.tokens, self.n)}

    def contenders(self) -> dict[str, Callable[[], Contender]]:
        device = self.device
        x, delta = torch.randn(self.tokens, self.n, device=device), torch.randn(self.tokens, self.m, device=device)
        eta, step = torch.zeros(self.tokens, device=device), torch.zeros(1, dtype=torch.int64, device=device)

        def contender(
            squares: Callable[[torch.nn.Linear, Tensor], object],
            backward: Callable[[torch.nn.Linear, Tensor, Tensor], None] = _backward,
            prepare: Callable[[torch.nn.Linear], object] = lambda layer: None,
        ) -> Contender:
            layer = torch.nn.Linear(self.n, self.m, bias=False, device=device)
            prepare(layer)
            trace = torch.zeros(self.m, self.n, device=device)

            def run() -> None:
                backward(layer, x, delta)
                with torch.no_grad():
                    squares(layer, trace)

            def check() -> None:
                before = layer.weight.detach().clone()
                run()
                assert layer.weight.grad is not None
                gradient = torch.einsum("ti,tj->ij", delta.double(), x.double())
                assert_change("the gradient", layer.weight.grad, gradient, torch.zeros_like(gradient), 1e-5)
                if squares is not _nothing:
                    exact = torch.einsum("ti,tj->ij", delta.double().square(), x.double().square())
                    assert_change("the trace", trace, exact, torch.zeros_like(exact), 1e-5)
                if not torch.equal(layer.weight, before):
                    raise AssertionError("the weight was written")
                trace.zero_()

            return Contender(run, check, graph=False)

        def ours(layer: torch.nn.Linear, trace: Tensor) -> None:
            ttt.ops.commit(layer.weight, None, None, trace, x, delta, eta, step)  # eta = 0: only the trace

        def plain(layer: torch.nn.Linear, trace: Tensor) -> None:
            trace.addmm_(delta.square().T, x.square())

        def by_compile() -> Contender:
            fast = compiled(lambda trace, x, delta: trace.add_(delta.square().T @ x.square()))
            return contender(lambda layer, trace: fast(trace, x, delta))

        def backpack() -> Contender:
            try:
                from backpack import backpack as extension
                from backpack import extend
                from backpack.extensions import SumGradSquared
            except ImportError:
                raise Unavailable("backpack-for-pytorch is not installed") from None

            warnings.filterwarnings("ignore", message="Full backward hook is firing")  # intended here

            def backward(layer: torch.nn.Linear, x: Tensor, delta: Tensor) -> None:
                with extension(SumGradSquared()):
                    _backward(layer, x, delta)

            def add(layer: Any, trace: Tensor) -> None:
                trace.add_(layer.weight.sum_grad_squared)

            return contender(add, backward, extend)

        return {
            "ttt": lambda: contender(ours),
            BASELINE: lambda: contender(_nothing),
            "plain torch": lambda: contender(plain),
            "torch.compile": by_compile,
            "BackPACK": backpack,
        }


def _backward(layer: torch.nn.Linear, x: Tensor, delta: Tensor) -> None:
    layer.weight.grad = None
    layer(x).backward(delta)


def _nothing(layer: torch.nn.Linear, trace: Tensor) -> None:
    """Adds no squared gradients."""


def cases(device: str) -> list[Case]:
    """A 1024 x 1024 layer and 64 tokens, from the cache, with one thread and with two."""
    threads = (1,) if device == "cuda" else tuple(t for t in (1, 2) if t <= torch.get_num_threads()) or (1,)
    return [Fisher(device, "float32", 1024, 1024, 64, t, quick=True) for t in threads]
