"""The ops, each with one signature and a backend for each device; see `ttt.ops.schema` and `ttt.ops.reference`."""

from __future__ import annotations

import torch

from ttt._renamed import old_names
from ttt.ops import cpu as cpu
from ttt.ops import cuda as cuda
from ttt.ops.arguments import CommitArguments
from ttt.ops.low_rank import low_rank_append, low_rank_compress, low_rank_linear

__all__ = ["commit", "low_rank_append", "low_rank_compress", "low_rank_linear", "project_out", "reservoir_draw",
           "reservoir_insert", "window_append", "window_linear"]  # fmt: skip


def window_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    win_x: torch.Tensor,
    win_delta: torch.Tensor,
    win_eta: torch.Tensor,
) -> torch.Tensor:
    """y = x W^T + b - ((x X^T) * eta) D: a linear layer whose window of updates is already in effect.

    Args:
        x: (..., n), dtype of ``weight``, contiguous.
        weight: (m, n), float32, bfloat16, float16 or float64.
        bias: (m,) or None.
        win_x: (C, n), X; win_delta: (C, m), D; win_eta: (C,), float32 (float64 for float64 weights).
            A row whose eta is 0 is empty: what stands in it is not read.

    Returns:
        (..., m), dtype of ``x``. Sums are made in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: for a wrong shape, dtype, device or stride.
        RuntimeError: if grad mode is on and an argument requires grad (the op has no derivative).
    """
    return torch.ops.ttt.window_linear(x, weight, bias, win_x, win_delta, win_eta)


def project_out(x: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """x' = x - (x U^T) U: ``x`` without its part in the span of U.

    Args:
        x: (..., n), float32, bfloat16, float16 or float64, contiguous.
        basis: (k, n), U, of the dtype of ``x``: orthonormal rows. Rows of zeros change nothing. k may be 0.

    Returns:
        A new tensor like ``x``. Sums are made in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: for a wrong shape, dtype, device or stride.
        RuntimeError: if grad mode is on and an argument requires grad (the op has no derivative).
    """
    return torch.ops.ttt.project_out(x, basis)


def window_append(
    win_x: torch.Tensor,
    win_delta: torch.Tensor,
    win_eta: torch.Tensor,
    win_trace: torch.Tensor | None,
    x: torch.Tensor,
    delta: torch.Tensor,
    eta: torch.Tensor,
    *,
    trace_delta: torch.Tensor | None = None,
    at: int = 0,
    counters: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
) -> None:
    """Put B rows into a window of C, in place, from row ``at`` on, or from where ``counters`` on the device says.

    With ``counters`` = (p, full, 0)::

        full:   what stands in the window was committed: tokens <- tokens + p; win_eta <- 0; p <- 0
        rows p ... p + B - 1 of the window <- x, delta, eta, trace_delta
        p <- p + B;  full <- whether another B rows would not fit

    so a window is emptied by the append after the commit that its ``full`` was the gate of, and the step (commit,
    append) needs nothing from the host.

    Args:
        win_x: (C, n); win_delta: (C, m); win_eta: (C,), float32; win_trace: (C, m) or None.
        x: (B, n); delta: (B, m); both of the window's dtype; eta: (B,), float32. B may be 0.
        trace_delta: (B, m), what goes into ``win_trace``; ``delta`` if None.
        at: the first row that is written; not used with ``counters``.
        counters: (3,), int64; the third is the kernel's own, and 0 between calls.
        tokens: (1,), int64; grows by the rows that were committed.
        gate: (1,), int64: where it is 0 nothing changes.

    Raises:
        ValueError, TypeError: for a wrong argument, or rows that do not fit from ``at`` on; nothing has been written
            then. Rows that do not fit by ``counters`` are refused on CPU, and never written on CUDA.
    """
    torch.ops.ttt.window_append(
        win_x, win_delta, win_eta, win_trace, x, delta, eta, trace_delta, at, counters, tokens, gate
    )


def commit(
    weight: torch.Tensor,
    anchor: torch.Tensor | None,
    importance: torch.Tensor | None,
    trace: torch.Tensor | None,
    x: torch.Tensor,
    delta: torch.Tensor,
    eta: torch.Tensor,
    step: torch.Tensor,
    *,
    trace_delta: torch.Tensor | None = None,
    memory: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
    seed: int = 0,
    replay_rows: int = 0,
    beta: float = 0.1,
    eps: float = 1e-3,
    lam: float = 0.0,
    gamma: float = 1.0,
    kind: str = "fisher",
    trace_every: int = 1,
    gate: torch.Tensor | None = None,
    momentum: torch.Tensor | None = None,
    mu: float = 0.0,
    decay: float = 0.0,
) -> None:
    """Write T tokens, checked against R replay rows, into ``weight`` and ``trace``, in place.

    With d = W - W*, sums in float32 (float64 for float64 weights)::

        E = X_r d^T - ((X_r X^T) * eta) D                  drift of the remembered outputs
        G = D^T diag(eta) X + E^T V
        a = lam (sum eta) Omega
        W <- W - (G + a d) / (1 + a)                       = W* + (W - G - W*) / (1 + a)
        F <- gamma^T F + S                                 S by ``kind``, P being ``trace_delta``:
             fisher  S = (P*P)^T diag(gamma^(T-1-t)) (X*X)     per-token squared gradients
             mas     S = |P|^T diag(gamma^(T-1-t)) |X|
             si      S = -(P^T X) * (W_new - W_old)
        step <- step + 1

    The penalty is lam/2 sum Omega (W - W*)^2 per token and unit of eta. 16-bit weights, traces and momenta are
    rounded stochastically with the Philox counters of `ttt.ops.philox`.

    With ``momentum`` M the tokens' part of G, G' = D^T diag(eta) X, passes through a velocity, and with ``decay`` the
    weights go back to the anchor whatever their importance: the momentum and the forget gate of Titans (Behrouz et al.
    2024), towards W* instead of 0::

        G = G'' + E^T V,  G'' = carry M + gain G'          E = X_r (W - G'' - W*)^T: replay checks the whole move
        M <- keep M + share G'                             the four numbers: `ttt.ops.momentum`
        a = (sum eta) (lam Omega + decay)

    For T = 1 this is M <- mu M + eta delta x^T; W <- W* + (W - M - E^T V - W*) / (1 + eta (lam Omega + decay)). For
    T > 1 it is what T such steps make of W and M with every g_t taken as G' / T, but for replay and the pull to the
    anchor, which come once, at the end.

    Args:
        weight: (m, n), float32, bfloat16, float16 or float64.
        anchor: W* like ``weight``; needed for lam > 0 and for replay.
        importance: Omega >= 0, (m, n), float32 or bfloat16, or the uint8 tensor of `ttt.ops.log8`; needed for lam > 0.
        trace: F like ``importance``, or None for none. In 8 bits it holds values >= 0 only: not for ``"si"``.
        x: (T, n); delta: (T, m), dL/dy of the summed loss; both of ``weight``'s dtype. T may be 0.
        eta: (T,), float32: the step of each token.
        step: (1,), int64: the counter of commits.
        trace_delta: (T, m), the gradient that the trace uses; ``delta`` if None.
        memory: (K, n) of ``weight``'s dtype, of which the first min(seen, K) rows are filled; seen: (1,), int64, or
            None: then nothing is drawn, and ``memory`` (R, n) holds the replay rows themselves, X_r.
        replay_rows: R in [0, 64], drawn uniformly with replacement; no replay while the memory is empty.
        beta: strength of the projection V = beta (X_r X_r^T + eps tr/R I)^-1 X_r, with tr the trace of X_r X_r^T; it is
            stable for 0 < beta < 2.
        eps: ridge of the projection, >= 0, relative to the mean squared norm of the replay rows.
        gamma: decay of the trace per token, in (0, 1].
        trace_every: S from one random token of each ``trace_every`` consecutive ones, times their number: unbiased, and
            its product is cheaper by that factor. For normal x and delta one in four of 2048 tokens is off by 11 %.
        gate: (1,), int64. Where it holds 0 the call changes nothing, not even ``step``. A GPU decides this by itself,
            without waiting for the host: one CUDA graph can hold a commit that only some of its replays need.
        momentum: M, (m, n), float32 or bfloat16 (float64 for float64 weights); None for none.
        mu: what M keeps of itself per token, in [0, 1); needs ``momentum`` if > 0.
        decay: >= 0, the pull to the anchor per token and unit of eta; needs ``anchor`` if > 0.

    Raises:
        ValueError, TypeError: for a wrong argument; nothing has been written then.
    """
    torch.ops.ttt.commit(
        *CommitArguments(
            weight=weight, anchor=anchor, importance=importance, trace=trace, x=x, delta=delta, eta=eta,
            trace_delta=trace_delta, memory=memory, seen=seen, step=step, seed=seed, replay_rows=replay_rows, beta=beta,
            eps=eps, lam=lam, gamma=gamma, kind=kind, trace_every=trace_every, gate=gate, momentum=momentum, mu=mu,
            decay=decay,
        )
    )  # fmt: skip


def reservoir_insert(
    memory: torch.Tensor, seen: torch.Tensor, x: torch.Tensor, *, seed: int = 0, gate: torch.Tensor | None = None
) -> None:
    """Let the rows of ``x`` (T, n) enter ``memory`` (K, n) by reservoir sampling, in place.

    Algorithm R (Vitter 1985): after N rows each of them is in the memory with probability K / N.
    ``seen`` (1,), int64, counts the rows, at most 2^31 of them. Where ``gate`` (1,), int64, holds 0 the call
    changes nothing; on a GPU the host does not wait for it.
    """
    torch.ops.ttt.reservoir_insert(memory, seen, x, seed, gate)


def reservoir_draw(seen: torch.Tensor, step: torch.Tensor, *, capacity: int, rows: int, seed: int = 0) -> torch.Tensor:
    """The memory rows (int64, (rows,)) that the commit with counter ``step`` replays; -1 while the memory is empty."""
    return torch.ops.ttt.reservoir_draw(seen, step, capacity, rows, seed)


__getattr__ = old_names(
    __name__, {f"fleet_{name}": f"low_rank_{name}" for name in ("append", "compress", "linear")}, globals()
)
