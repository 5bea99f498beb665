"""The ops, each with one signature and a backend for each device; see `ttt.ops.schema` and `ttt.ops.reference`."""

from __future__ import annotations

import torch

from ttt._renamed import old_names
from ttt.ops import composite as composite
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
            A row whose eta is 0 is empty: its x and delta are not read.

    Returns:
        (..., m), dtype of ``x``. Sums are in float32 (float64 for float64).

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
        A new tensor like ``x``. Sums are in float32 (float64 for float64).

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
    """Write B rows into a window of C rows, in place, from row ``at`` on, or from the row that ``counters`` holds.

    With ``counters`` = (p, full, 0), which stay on the device:

        if full (the window has been committed):  tokens <- tokens + p;  win_eta <- 0;  p <- 0
        rows p ... p + B - 1 of the window <- x, delta, eta, trace_delta
        p <- p + B;  full <- 1 if another B rows would not fit, else 0

    ``full`` is the gate of the next commit, and the append after that commit empties the window. So the pair of calls
    (commit, append) needs nothing from the host.

    Args:
        win_x: (C, n); win_delta: (C, m); win_eta: (C,), float32; win_trace: (C, m) or None.
        x: (B, n); delta: (B, m); both of the window's dtype; eta: (B,), float32. B may be 0.
        trace_delta: (B, m), what goes into ``win_trace``; ``delta`` if None.
        at: the first row that is written; ignored with ``counters``.
        counters: (3,), int64; the third is used by the kernel, and is 0 between calls.
        tokens: (1,), int64, grows by the rows that were committed.
        gate: (1,), int64. If it holds 0, nothing changes.

    Raises:
        ValueError, TypeError: for a wrong argument, or rows that do not fit from ``at`` on; nothing has been written
            then. If ``counters`` are negative or leave no room for the rows, the call is refused on CPU; on CUDA, where
            the host does not read them, rows outside of the window are not written.
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
    """Write T tokens into ``weight`` and ``trace``, in place, correcting for R replay rows.

    With d = W - W*, sums in float32 (float64 for float64 weights):

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

    Precision: products are summed in float32 from factors that are exact or rounded to at least 16 bits. Two products
    are less precise with bfloat16 weights. The trace's S is made from factors rounded to bfloat16 (squares, or |P| and
    |X|) on processors with AVX512-BF16 or AMX and on GPUs: for T = 1 an element is off by up to 0.7 % (0.69 % in
    1000 x 1000 normal ones; 0.23 % root mean square). And for more than 256 tokens on a GPU, the factor eta D of G is
    rounded to bfloat16. AVX512-BF16 and AMX flush subnormal numbers: inputs and sums below 1.2e-38 count as zero.

    With ``momentum`` M the tokens' part of G, G' = D^T diag(eta) X, passes through a velocity. With ``decay`` all
    weights are pulled to the anchor, whatever their importance. These are the momentum and the forget gate of Titans
    (Behrouz et al. 2024), with W* in place of 0:

        G = G'' + E^T V,  G'' = carry M + gain G'          E = X_r (W - G'' - W*)^T: the drift includes the momentum
        M <- keep M + share G'                             `ttt.ops.momentum` derives the four coefficients
        a = (sum eta) (lam Omega + decay)

    For T = 1 this is M <- mu M + eta delta x^T; W <- W* + (W - M - E^T V - W*) / (1 + eta (lam Omega + decay)). For
    T > 1 the result is that of T such steps with every g_t taken as G' / T, except that replay and the pull to the
    anchor are applied once, at the end.

    Args:
        weight: (m, n), float32, bfloat16, float16 or float64.
        anchor: W* like ``weight``; needed for lam > 0 and for replay.
        importance: Omega >= 0, (m, n), float32 or bfloat16, or the uint8 tensor of `ttt.ops.log8`; needed for lam > 0.
        trace: F like ``importance``, or None for none. In 8 bits it holds values >= 0 only: not for ``"si"``.
        x: (T, n); delta: (T, m), dL/dy of the summed loss; both of ``weight``'s dtype. T may be 0.
        eta: (T,), float32: the step of each token.
        step: (1,), int64: the counter of commits.
        trace_delta: (T, m), the gradient that the trace uses; ``delta`` if None.
        memory: (K, n) of ``weight``'s dtype, the replay memory; its first min(seen, K) rows are filled.
        seen: (1,), int64, >= 0, the rows that have entered the memory so far. If None, nothing is drawn: ``memory``
            (R, n) holds the replay rows X_r themselves.
        replay_rows: R in [0, 64], drawn uniformly with replacement. Nothing is replayed while the memory is empty.
        beta: strength of the projection V = beta (X_r X_r^T + eps tr/R I)^-1 X_r, with tr the trace of X_r X_r^T; it is
            stable for 0 < beta < 2.
        eps: ridge of the projection, >= 0, relative to the mean squared norm of the replay rows.
        gamma: decay of the trace per token, in (0, 1].
        trace_every: one random token of each ``trace_every`` consecutive ones stands for all of them in S. The estimate
            is unbiased, and the product for S is cheaper by that factor. With 4, S of 2048 normal tokens is off by
            11 %.
        gate: (1,), int64. If it holds 0, the call changes nothing, not even ``step``. On a GPU the kernels read the
            gate themselves and the host does not wait, so a CUDA graph can contain a commit that only some of its
            replays make.
        momentum: M, (m, n), float32 or bfloat16 (float64 for float64 weights); None for none.
        mu: decay of M per token, in [0, 1); needs ``momentum`` if > 0.
        decay: the pull to the anchor per token and unit of eta, at least 0; needs ``anchor`` if > 0.

    Raises:
        ValueError, TypeError: for a wrong argument; nothing has been written then. A negative ``seen`` is refused on
            CPU; on CUDA, where the host does not read it, it counts as an empty memory.
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
    """Insert the rows of ``x`` (T, n) into ``memory`` (K, n) by reservoir sampling, in place.

    Algorithm R (Vitter 1985): after N rows each of them is in the memory with probability K / N.

    Args:
        memory: (K, n), float32, bfloat16, float16 or float64.
        seen: (1,), int64, >= 0: the rows that have entered so far, at most 2^31. It grows by T.
        x: (T, n), of the memory's dtype.
        seed: the key of the random choices.
        gate: (1,), int64. If it holds 0, the call changes nothing; on a GPU the host does not wait for it.

    Raises:
        ValueError, TypeError: for a wrong argument; nothing has been written then. A negative ``seen`` is refused on
            CPU; on CUDA, where the host does not read it, rows with a negative number are not written.
    """
    torch.ops.ttt.reservoir_insert(memory, seen, x, seed, gate)


def reservoir_draw(seen: torch.Tensor, step: torch.Tensor, *, capacity: int, rows: int, seed: int = 0) -> torch.Tensor:
    """The indices of the memory rows that the commit with counter ``step`` replays.

    Args:
        seen, step: (1,), int64, as in `commit`.
        capacity: K, rows of the memory.
        rows: R, rows to draw.

    Returns:
        (R,), int64; -1 while the memory is empty.

    Raises:
        ValueError, TypeError: for a wrong argument.
    """
    return torch.ops.ttt.reservoir_draw(seen, step, capacity, rows, seed)


__getattr__ = old_names(
    __name__, {f"fleet_{name}": f"low_rank_{name}" for name in ("append", "compress", "linear")}, globals()
)
