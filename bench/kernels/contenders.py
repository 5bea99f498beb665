"""What ttt is compared with: its formulas as one writes them in plain torch, and torch.compile of the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.kernels.registry import Unavailable


def plain_commit(
    weight: Tensor,
    anchor: Tensor,
    importance: Tensor,
    trace: Tensor,
    x: Tensor,
    delta: Tensor,
    eta: Tensor,
    lam: float,
    replayed: Tensor | None = None,
    beta: float = 0.3,
    eps: float = 1e-3,
) -> None:
    """`ttt.ops.commit` with the Fisher trace, without decay; ``replayed`` (R, n) are the rows it draws.

    In float32, with a temporary for each m x n product, and stochastic rounding for bfloat16. No ``alpha=``: on
    CPU torch 2.13's compiler drops it; ``solve_ex``: `torch.linalg.solve` waits for a GPU.
    """
    wide = torch.float32
    xw, dw, drift = x.to(wide), delta.to(wide), weight.to(wide) - anchor.to(wide)
    g = (dw * eta.unsqueeze(1)).T @ xw
    if replayed is not None:
        r = replayed.to(wide)
        e = r @ drift.T - ((r @ xw.T) * eta) @ dw
        gram = r @ r.T
        ridge = eps * gram.diagonal().mean() * torch.eye(len(r), device=r.device)
        g = g + e.T @ (beta * torch.linalg.solve_ex(gram + ridge, r).result)
    pull = importance.to(wide) * (lam * eta.sum())
    squares = dw.square().T @ xw.square()
    _store(weight, weight.to(wide) - (g + pull * drift) / (1 + pull))
    _store(trace, trace.to(wide) + squares)


def _store(target: Tensor, value: Tensor) -> None:
    if target.dtype == torch.bfloat16:
        noise = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, device=value.device)
        value = ((value.view(torch.int32) + noise) & -65536).view(torch.float32)
    target.copy_(value)


def plain_window_linear(x: Tensor, weight: Tensor, win_x: Tensor, win_delta: Tensor, win_eta: Tensor) -> Tensor:
    """`ttt.ops.window_linear` in the dtype of ``x``: the product, less what the window's rows changed."""
    return functional.linear(x, weight) - ((x @ win_x.T) * win_eta.to(x.dtype)) @ win_delta


class PlainLayer:
    """`ttt.nn.Linear` in plain torch: forward, append, and a commit when the window is full.

    ``layer`` holds weight, anchor, importance and trace, ``pending`` rows of the window are in use at first.
    """

    def __init__(self, layer: dict[str, Any], window: int, lam: float, pending: int = 0) -> None:
        w = layer["weight"]
        self.layer, self.lam, self.pending = layer, lam, pending
        self.win_x = w.new_zeros(window, w.shape[1])
        self.win_delta = w.new_zeros(window, w.shape[0])
        self.win_eta = w.new_zeros(window, dtype=torch.float32)

    def __call__(self, x: Tensor) -> Tensor:
        p = self.pending
        if not p:
            return functional.linear(x, self.layer["weight"])
        return plain_window_linear(x, self.layer["weight"], self.win_x[:p], self.win_delta[:p], self.win_eta[:p])

    def learn(self, x: Tensor, delta: Tensor, eta: Tensor) -> None:
        rows = slice(self.pending, self.pending + len(x))
        self.win_x[rows], self.win_delta[rows], self.win_eta[rows] = x, delta, eta
        self.pending += len(x)
        if self.pending == len(self.win_eta):
            plain_commit(**self.layer, x=self.win_x, delta=self.win_delta, eta=self.win_eta, lam=self.lam)
            self.pending = 0


def compiled(function: Callable) -> Callable:
    """``torch.compile`` of ``function`` for the shapes of its first call, as one graph.

    Raises:
        Unavailable: at the first call, if nothing was compiled (the caller must check results besides).
    """
    from torch._dynamo.utils import counters

    torch._dynamo.reset()  # the limit on recompilations counts all shapes of one function
    counters.clear()
    fast = torch.compile(function, fullgraph=True, dynamic=False)
    known = False

    def call(*args, **kwargs):
        nonlocal known
        result = fast(*args, **kwargs)
        if not known:
            if not counters["stats"]["unique_graphs"]:
                raise Unavailable("torch.compile ran the function without compiling a graph")
            known = True
        return result

    return call
