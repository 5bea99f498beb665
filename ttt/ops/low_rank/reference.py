"""The ops of low-rank weights in plain torch: their definition, in any floating dtype, on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ttt.ops.dtypes import accumulation
from ttt.ops.reference import replay_rows as draw_replay
from ttt.ops.rounding import rounding_bits, stochastic_round_


def _by_user(users: Tensor) -> list[tuple[int, Tensor]]:
    """(slot, indices of its tokens in order) for each slot that has tokens."""
    return [(u, (users == u).nonzero().flatten()) for u in users.unique().tolist() if u >= 0]


def add_delta_(y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: Tensor, users: Tensor) -> Tensor:
    """y_t (T, m) += B_u^T (A_u x_t) for x (T, n), in place."""
    wide = accumulation(x.dtype)
    for u, tokens in _by_user(users):
        held = int(rows[u])
        inner = x[tokens].to(wide) @ a[u, :held].to(wide).T
        y[tokens] = (y[tokens].to(wide) + inner @ b[u, :held].to(wide)).to(y.dtype)
    return y


def isolated_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W x_t + bias for each row x_t, whose bits depend on no value of other rows; NaN for rows that are not finite.

    On processors with AMX, torch's 16-bit product reads past the end of a row into the next one and multiplies what it
    finds by 0. Finite numbers times 0 add nothing, but an infinity or NaN makes the other row NaN. So rows that are not
    finite are replaced by zeros before the product.

    Args:
        x: (..., n); weight: (m, n); bias: (m,) or None.
    """
    finite = torch.isfinite(x).all(-1, keepdim=True)
    y = torch.nn.functional.linear(torch.where(finite, x, 0.0), weight, bias)
    return torch.where(finite, y, torch.nan)


def low_rank_linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, a: Tensor, b: Tensor, rows: Tensor, users: Tensor
) -> Tensor:
    y = x.new_zeros((*x.shape[:-1], b.shape[2])) if weight is None else isolated_linear(x, weight, bias)
    add_delta_(y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), a, b, rows, users)
    return y


def low_rank_append(
    a: Tensor, b: Tensor, rows: Tensor, eta_sum: Tensor, x: Tensor, delta: Tensor, eta: Tensor, users: Tensor
) -> None:
    # The C++ kernel is `low_rank_append` of csrc/low_rank.h; test_append_is_the_gradient_step of
    # tests/ops/test_low_rank.py compares the two.
    capacity, wide = a.shape[1], eta_sum.dtype
    for u, tokens in _by_user(users):
        first = int(rows[u])
        tokens = tokens[: capacity - first]
        to = slice(first, first + len(tokens))
        a[u, to] = x[tokens]
        b[u, to] = (-eta[tokens].unsqueeze(1) * delta[tokens].to(wide)).to(b.dtype)
        rows[u] += len(tokens)
        for t in tokens.tolist():  # one after the other, in the order in which the kernels add
            eta_sum[u] += eta[t]


def low_rank_compress(
    a: Tensor, b: Tensor, rows: Tensor, eta_sum: Tensor, lost: Tensor, step: Tensor, slots: Tensor, rank: int,
    lam: float, importance_m: Tensor | None, importance_n: Tensor | None, memory: Tensor | None,
    seen: Tensor | None, seed: int, replay_rows: int, beta: float, eps: float,
) -> None:  # fmt: skip
    """See `ttt.ops.low_rank_compress`. One slot at a time, because the bits of batched routines depend on the batch."""
    for u in slots[slots >= 0].tolist():
        held, spent, counter = int(rows[u]), eta_sum[u].double(), step[u : u + 1]
        left, right = a[u, :held].double(), b[u, :held].double()
        if held and replay_rows and int(seen) > 0:
            xr, v = draw_replay(memory, seen, counter, replay_rows, seed, beta, eps, spent.dtype)
            left = left - (left @ xr.T) @ v
        if held > rank:
            by = truncate if a.dtype == torch.float64 else truncate_by_gram
            left, right, gone = by(left, right, rank)
            lost[u] = (lost[u] + gone).clamp_max(torch.finfo(lost.dtype).max)
        if held and lam > 0:
            left, right = pull(left, right, lam * spent, importance_m.double(), importance_n.double())
        kept = len(left)
        for pool, part in ((a, left), (b, right)):
            size = pool.shape[2]
            bits = rounding_bits(kept, size, counter, seed) if pool.itemsize == 2 else None
            top = torch.finfo(pool.dtype).max  # values stay finite, however large the user's updates were
            stochastic_round_(pool[u, :kept], part.clamp(-top, top).to(accumulation(pool.dtype)), bits)
            pool[u, kept:held].zero_()
        rows[u] = kept
        eta_sum[u] = 0
        step[u] += 1


def truncate(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Factors (A, B) of B^T A with its ``rank`` largest singular values, and |change|_F. a: R x n, b: R x m."""
    reflect_a, ra = _factored(a.T)
    reflect_b, rb = _factored(b.T)
    u, s, zt = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    root = s[:rank].sqrt().unsqueeze(1)
    return root * reflect_a(zt[:rank].T).T, root * reflect_b(u[:, :rank]).T, s[rank:].norm()


def truncate_by_gram(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """`truncate` from R x R Gram matrices, in half the time, for rows that are stored in float32 or less.

    With A A^T = U L U^T the rows of L^-1/2 U^T A are orthonormal, so the singular values of B^T A are those of
    B^T U L^1/2, whose squares are the eigenvalues of L^1/2 U^T (B B^T) U L^1/2. In float64 the squaring loses singular
    values below 1e-8 of the largest, which is less than the rounding of the rows.
    """
    rank = min(rank, a.shape[1], b.shape[1])
    squares, u = torch.linalg.eigh(a @ a.T)
    squares = torch.where(squares > 1e-15 * squares[-1], squares, 0)
    scaled = u * squares.sqrt()
    power, v = torch.linalg.eigh(scaled.T @ (b @ b.T) @ scaled)
    power, v = power.flip(0).clamp_min(0), v.flip(1)
    s = torch.where(power > 1e-15 * power[0], power, 0).sqrt()
    root, v = s[:rank].sqrt().unsqueeze(1), v[:, :rank].T
    to_a = root * ((v * torch.where(squares > 0, squares.rsqrt(), 0)) @ u.T)
    to_b = torch.where(s[:rank] > 0, root.squeeze(1) / s[:rank], 0).unsqueeze(1) * (v @ scaled.T)
    return to_a @ a, to_b @ b, s[rank:].norm()


def _factored(t: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """(Z -> Q Z, R) of t = Q R, without forming Q, which halves the time. t: k x R, Z: min(k, R) x r."""
    reflectors, tau = torch.geqrf(t)
    size = len(tau)

    def times(z: Tensor) -> Tensor:
        return torch.ormqr(reflectors[:, :size], tau, torch.nn.functional.pad(z, (0, 0, 0, len(t) - size)))

    return times, reflectors[:size].triu()


def pull(a: Tensor, b: Tensor, strength: Tensor, rho: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of diag(p) B^T A diag(q); see `ttt.ops.low_rank_compress`. a: R x n, b: R x m, rho: m, kappa: n."""
    p = _restricted(b, a, rho, kappa, strength)
    q = _restricted(a, b, kappa, rho, strength)
    return a * q, b * p


def _restricted(own: Tensor, other: Tensor, weights: Tensor, others: Tensor, strength: Tensor) -> Tensor:
    """(1 + strength w_i o'_i)^-1/2, where o'_i is the mean of ``others`` weighted by row i of (own^T other)^2."""
    total = ((other @ other.T) @ own * own).sum(0)
    mean = (((other * others) @ other.T) @ own * own).sum(0) / total
    # In a row of very small numbers the mean consists of rounding errors.
    mean = torch.where(total > 0, mean, 0).clamp_min(0).minimum(others.max())
    return (1 + strength * weights * mean).rsqrt()
