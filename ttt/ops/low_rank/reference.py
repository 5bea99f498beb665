"""The ops of users' low-rank weights in plain torch: the definition, in any floating dtype, on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ttt.ops.reference import _wide
from ttt.ops.reference import replay_rows as draw_replay
from ttt.ops.rounding import rounding_bits, stochastic_round_


def _by_user(users: Tensor) -> list[tuple[int, Tensor]]:
    """(slot, its tokens in order) for each slot that has tokens."""
    return [(u, (users == u).nonzero().flatten()) for u in users.unique().tolist() if u >= 0]


def add_delta_(y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: Tensor, users: Tensor) -> Tensor:
    """y_t (T, m) += B_u^T (A_u x_t) for x (T, n), in place."""
    wide = _wide(x.dtype)
    for u, tokens in _by_user(users):
        held = int(rows[u])
        inner = x[tokens].to(wide) @ a[u, :held].to(wide).T
        y[tokens] = (y[tokens].to(wide) + inner @ b[u, :held].to(wide)).to(y.dtype)
    return y


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, rows: Tensor, users: Tensor):
    y = torch.nn.functional.linear(x, weight, bias)
    add_delta_(y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), a, b, rows, users)
    return y


def low_rank_append(
    a: Tensor, b: Tensor, rows: Tensor, eta_sum: Tensor, x: Tensor, delta: Tensor, eta: Tensor, users: Tensor
) -> None:
    capacity, wide = a.shape[1], eta_sum.dtype
    for u, tokens in _by_user(users):
        first = int(rows[u])
        tokens = tokens[: capacity - first]
        to = slice(first, first + len(tokens))
        a[u, to] = x[tokens]
        b[u, to] = (-eta[tokens].unsqueeze(1) * delta[tokens].to(wide)).to(b.dtype)
        rows[u] += len(tokens)
        for t in tokens.tolist():  # in order, as the kernels add
            eta_sum[u] += eta[t]


def low_rank_compress(
    a: Tensor, b: Tensor, rows: Tensor, eta_sum: Tensor, lost: Tensor, step: Tensor, slots: Tensor, rank: int,
    shrink: str, lam: float, importance_m: Tensor | None, importance_n: Tensor | None, memory: Tensor | None,
    seen: Tensor | None, seed: int, replay_rows: int, replay: str, beta: float, eps: float,
) -> None:  # fmt: skip
    """See `ttt.ops.low_rank_compress`. One slot at a time: batched routines give bits that depend on the batch."""
    for u in slots[slots >= 0].tolist():
        held, spent, counter = int(rows[u]), eta_sum[u].double(), step[u : u + 1]
        left, right = a[u, :held].double(), b[u, :held].double()
        if held and replay_rows and int(seen) > 0:
            xr, v = draw_replay(memory, seen, counter, replay_rows, seed, replay, beta, eps, spent)
            left = left - (left @ xr.T) @ v
        if held > rank:
            by = truncate if a.dtype == torch.float64 else truncate_by_gram
            left, right, gone = by(left, right, rank, shrink)
            lost[u] = (lost[u] + gone).clamp_max(torch.finfo(lost.dtype).max)
        if held and lam > 0:
            left, right = pull(left, right, lam * spent, importance_m.double(), importance_n.double())
        kept = len(left)
        for pool, part in ((a, left), (b, right)):
            size = pool.shape[2]
            bits = rounding_bits(kept, size, counter, seed) if pool.itemsize == 2 else None
            top = torch.finfo(pool.dtype).max  # what one user learnt may be absurd, but stays finite
            stochastic_round_(pool[u, :kept], part.clamp(-top, top).to(_wide(pool.dtype)), bits)
            pool[u, kept:held].zero_()
        rows[u] = kept
        eta_sum[u] = 0
        step[u] += 1


def truncate(a: Tensor, b: Tensor, rank: int, shrink: str) -> tuple[Tensor, Tensor, Tensor]:
    """(A, B of at most ``rank`` rows, |change|_F): B^T A by its largest singular values. a: R x n, b: R x m."""
    reflect_a, ra = _factored(a.T)
    reflect_b, rb = _factored(b.T)
    u, s, zt = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    cut = s[rank] if rank < len(s) else s.new_zeros(())
    kept = s[:rank] - cut if shrink == "directions" else s[:rank]
    gone = torch.cat([s[:rank] - kept, s[rank:]]).norm()
    root = kept.sqrt().unsqueeze(1)
    return root * reflect_a(zt[:rank].T).T, root * reflect_b(u[:, :rank]).T, gone


def truncate_by_gram(a: Tensor, b: Tensor, rank: int, shrink: str) -> tuple[Tensor, Tensor, Tensor]:
    """As `truncate`, for rows that are kept in float32 or less, from R x R Gram matrices: in half the time.

    With A A^T = U L U^T the rows of L^-1/2 U^T A are orthonormal, so the singular values of B^T A are those of
    B^T U L^1/2, whose squares are the eigenvalues of L^1/2 U^T (B B^T) U L^1/2. In float64 that squaring costs what
    is below 1e-8 of the largest: less than the rows' own rounding.
    """
    rank = min(rank, a.shape[1], b.shape[1])
    squares, u = torch.linalg.eigh(a @ a.T)
    squares = torch.where(squares > 1e-15 * squares[-1], squares, 0)
    scaled = u * squares.sqrt()
    power, v = torch.linalg.eigh(scaled.T @ (b @ b.T) @ scaled)
    power, v = power.flip(0).clamp_min(0), v.flip(1)
    s = torch.where(power > 1e-15 * power[0], power, 0).sqrt()
    kept = s[:rank] - s[rank] if shrink == "directions" else s[:rank]
    gone = torch.cat([s[:rank] - kept, s[rank:]]).norm()
    root, v = kept.sqrt().unsqueeze(1), v[:, :rank].T
    to_a = root * ((v * torch.where(squares > 0, squares.rsqrt(), 0)) @ u.T)
    to_b = torch.where(s[:rank] > 0, root.squeeze(1) / s[:rank], 0).unsqueeze(1) * (v @ scaled.T)
    return to_a @ a, to_b @ b, gone


def _factored(t: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """(Z -> Q Z, R) of t = Q R; Q is never formed, which halves the time. t: k x R, Z: min(k, R) x r."""
    reflectors, tau = torch.geqrf(t)
    size = len(tau)

    def times(z: Tensor) -> Tensor:
        return torch.ormqr(reflectors[:, :size], tau, torch.nn.functional.pad(z, (0, 0, 0, len(t) - size)))

    return times, reflectors[:size].triu()


def pull(a: Tensor, b: Tensor, strength: Tensor, rho: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of diag(p) B^T A diag(q); see `ttt.ops.low_rank_compress`. a: R x n, b: R x m, rho: m, kappa: n."""
    p = _restricted(b, a, rho, kappa, strength)
    q = _restricted(a, b, kappa, rho, strength)
    return a * q, b * p


def _restricted(own: Tensor, other: Tensor, weights: Tensor, others: Tensor, strength: Tensor) -> Tensor:
    """(1 + strength w_i o'_i)^-1/2, o'_i being the mean of ``others`` under the squares of row i of own^T other."""
    total = ((other @ other.T) @ own * own).sum(0)
    mean = (((other * others) @ other.T) @ own * own).sum(0) / total
    mean = (
        torch.where(total > 0, mean, 0).clamp_min(0).minimum(others.max())
    )  # a row of nearly nothing has rounding errors only
    return (1 + strength * weights * mean).rsqrt()
