"""What ttt is compared with: its formulas written in plain torch, and torch.compile of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.kernels.contender import Unavailable


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
    """`ttt.ops.commit` with the Fisher trace and without decay, in place.

    It computes in float32, with a temporary for each m x n product, and rounds bfloat16 results stochastically.

    Args:
        replayed: (R, n), the rows that `ttt.ops.commit` draws from its replay memory.
    """
    # No ``alpha=`` in additions: torch 2.13's compiler ignores it on CPU. ``solve_ex``, because `torch.linalg.solve`
    # synchronizes with a GPU.
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
    """`ttt.ops.window_linear` in the dtype of ``x``: x W^T - ((x X^T) * eta) D for the window's rows X, D and eta."""
    return functional.linear(x, weight) - ((x @ win_x.T) * win_eta.to(x.dtype)) @ win_delta


class PlainLayer:
    """`ttt.nn.Linear` in plain torch: forward, append to the window, and a commit when the window is full.

    Args:
        layer: its weight, anchor, importance and trace, by name.
        window: number of rows of the window.
        lam: strength of the EWC penalty.
        pending: number of rows of the window that are in use at first.
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

    Only whether a graph was compiled is checked here; the caller must check the results.

    Raises:
        Unavailable: at the first call, if nothing was compiled.
    """
    from torch._dynamo.utils import counters

    torch._dynamo.reset()  # or functions compiled earlier would count towards the limit on recompilations
    counters.clear()
    fast = torch.compile(function, fullgraph=True, dynamic=False)
    checked = False

    def call(*args, **kwargs):
        nonlocal checked
        result = fast(*args, **kwargs)
        if not checked:
            if not counters["stats"]["unique_graphs"]:
                raise Unavailable("torch.compile ran the function without compiling a graph")
            checked = True
        return result

    return call
