"""Ops of low-rank weights: W + B_u^T A_u for the user u of each token, learnt by appending rows.

A layer has S slots of R rows, of which the first ``rows[u]`` of slot u are in use:

    a (S, R, n)    b (S, R, m)    rows (S,) int32    eta_sum (S,) float32 (float64)
"""

from __future__ import annotations

import torch

from ttt.ops.low_rank import cpu as cpu
from ttt.ops.low_rank import cuda as cuda

__all__ = ["low_rank_append", "low_rank_compress", "low_rank_linear"]


def low_rank_linear(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    rows: torch.Tensor,
    users: torch.Tensor,
) -> torch.Tensor:
    """y_t = W x_t + bias + B_u^T (A_u x_t) with u = users[t]: a mixed batch, each token with its own user's weights.

    The base product is `torch.nn.functional.linear` of the whole batch, so that a token of no user gets the bits of the
    base model. Tokens that are not finite are replaced by zeros in it and get NaN, because on processors with AMX
    torch's 16-bit product lets them reach other tokens. So the bits of a token's output do not depend on tokens of
    other users. They may depend on the shape of the batch, as torch's product does.

    Args:
        x: (..., n), T tokens in all, dtype of ``a``, contiguous.
        weight: (m, n), float32, bfloat16, float16 or float64; contiguous, or the transpose of such a matrix. None for a
            base of zeros, to which ``x`` does not contribute, finite or not.
        bias: (m,) or None; None without ``weight``.
        a: (S, R, n), A of each slot; b: (S, R, m); dtype of ``weight``.
        rows: (S,), int32: rows of each slot in use. The others are not read.
        users: (T,), int32: the slot of each token; -1 for none.

    Returns:
        (..., m), dtype of ``x``. Sums of the low-rank part are made in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: for a wrong shape, dtype, device or stride; on CPU also for a slot that does not exist,
            or that holds less than 0 or more than R rows. On CUDA such slots add nothing, or are taken as full.
        RuntimeError: if grad mode is on and an argument requires grad (`ttt.nn.LowRankLinear` has the derivative).
    """
    return torch.ops.ttt.low_rank_linear(x, weight, bias, a, b, rows, users)


def low_rank_append(
    a: torch.Tensor,
    b: torch.Tensor,
    rows: torch.Tensor,
    eta_sum: torch.Tensor,
    x: torch.Tensor,
    delta: torch.Tensor,
    eta: torch.Tensor,
    users: torch.Tensor,
) -> None:
    """Append the step -eta_t delta_t x_t^T of each token as a row to its user's slot, in place:

        for t = 0 ... T - 1 with u = users[t] >= 0:
            a[u, rows[u]] <- x_t;  b[u, rows[u]] <- -eta_t delta_t;  rows[u] += 1;  eta_sum[u] += eta_t

    Args:
        a: (S, R, n); b: (S, R, m); rows: (S,), int32.
        eta_sum: (S,), float32 (float64 for float64): sum of eta_t since the slot was compressed.
        x: (T, n); delta: (T, m), both of ``a``'s dtype; eta: (T,), like ``eta_sum``. T may be 0.
        users: (T,), int32; tokens with -1 change nothing.

    Raises:
        ValueError, TypeError: for a wrong argument; on CPU also for a slot that does not exist, whose ``rows`` is out
            of range, or that has no room for its tokens. Nothing has been written then. On CUDA, where the host does
            not wait, rows for such slots, or beyond the room, are not written.
    """
    torch.ops.ttt.low_rank_append(a, b, rows, eta_sum, x, delta, eta, users)


def low_rank_compress(
    a: torch.Tensor,
    b: torch.Tensor,
    rows: torch.Tensor,
    eta_sum: torch.Tensor,
    lost: torch.Tensor,
    step: torch.Tensor,
    slots: torch.Tensor,
    *,
    rank: int,
    lam: float = 0.0,
    importance_m: torch.Tensor | None = None,
    importance_n: torch.Tensor | None = None,
    memory: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
    seed: int = 0,
    replay_rows: int = 0,
    beta: float = 0.1,
    eps: float = 1e-3,
) -> None:
    """Reduce slots to ``rank`` rows, with replay and the pull to the anchor, in place.

    With D = B^T A (m x n), a user's change of W, and X_r, V as in `ttt.ops.commit`:

        A <- A - (A X_r^T) V             replay: with the drift E = X_r D^T of the remembered outputs,
                                         D - E^T V = B^T (A - (A X_r^T) V)
        A^T = Q_A R_A, B^T = Q_B R_B     (QR);   R_B R_A^T = U diag(s) Z^T   (SVD)
        s_i <- s_i for i < r, 0 for others
        A <- diag(s)^1/2 Z^T Q_A^T;  B <- diag(s)^1/2 U^T Q_B^T
        B_ki <- p_i B_ki;  A_kj <- q_j A_kj
        lost += |D - D_new|_F of the truncation;  eta_sum <- 0;  step += 1

    Pull. The penalty a/2 sum Omega D^2 with a = lam eta_sum and Omega_ij = rho_i kappa_j has the proximal step
    D_ij / (1 + a rho_i kappa_j), which would raise the rank. Its minimum over all diag(p) D is at
    p_i = 1 / (1 + a rho_i kappa'_i), kappa'_i = sum_j D_ij^2 kappa_j / sum_j D_ij^2, and that over all D diag(q)
    likewise at q_j = 1 / (1 + a kappa_j rho'_j). The geometric mean of the two is used:

        p_i = (1 + a rho_i kappa'_i)^-1/2       q_j = (1 + a kappa_j rho'_j)^-1/2

    so that the rank stays the same, no entry of D grows (any lam is stable), a constant Omega gives exactly
    1 / (1 + a), and |D|^2 falls, to first order in a, as under the proximal step.

    ``lost`` bounds, by the triangle inequality, the Frobenius norm of everything that a slot has lost to truncation;
    one call adds exactly (sum over i >= r of s_i^2)^1/2. Each slot is treated by itself, so its bits do not depend on
    which others are compressed. The computation is in float64. For rows of float32 or less it starts from the factors'
    R x R Gram matrices, which give the same approximation faster, up to 1e-8 of its norm. Products of 16-bit rows are
    first summed in float32, and 16-bit rows are rounded stochastically (`ttt.ops.philox`).

    Args:
        a, b, rows, eta_sum: as in `low_rank_append`.
        lost: (S,), float32 (float64 for float64). step: (S,), int64: compressions so far, the counter of random draws.
        slots: (K,), int64: the slots to compress, each at most once; -1 stands for none, so that a device can choose.
        rank: r, at least 1. A slot with no more rows keeps them; replay and pull apply to it.
        lam: strength of the pull; needs ``importance_m`` (m,) and ``importance_n`` (n,): rho and kappa, float32
            (float64), >= 0.
        memory, seen, seed, replay_rows, beta, eps: as in `ttt.ops.commit`; ``memory`` and ``seen`` are shared
            by all users, and the draws depend only on the slot's ``step``.

    Raises:
        ValueError, TypeError: for a wrong argument; on CPU also for counters out of range (``rows`` not in [0, R],
            ``eta_sum``, ``lost``, ``step`` or ``seen`` negative or NaN, ``eta_sum`` infinite). Nothing has been written
            then.
        RuntimeError: on CPU for a slot of more than ``rank`` rows that are not all finite, which stays as it was. On
            CUDA, where the host does not wait, such a slot stays as it was and nothing is raised. Slots of more than
            1024 rows, float64 and empty factors are left to the reference there, for which the host does wait.
    """
    torch.ops.ttt.low_rank_compress(
        a, b, rows, eta_sum, lost, step, slots, rank, lam, importance_m, importance_n, memory, seen, seed,
        replay_rows, beta, eps,
    )  # fmt: skip
