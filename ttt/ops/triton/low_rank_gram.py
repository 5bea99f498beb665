"""The small matrices of `ttt.ops.triton.low_rank_compress`: products of a slot's rows, and what is decided from them.

All kernels call `work_of` to find what there is to do for a slot. There is no tl.dot, because Triton 3.6 cannot compile
some of its float64 products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ttt.ops.triton.common import draw
from ttt.ops.triton.replay import ridged_inverse
from ttt.ops.triton.truncate import diagonal, times, truncate


@triton.jit
def work_of(rows, slots, seen, k, capacity, rank, PULLS: tl.constexpr):
    """(u, rows in use) of the k-th slot; 0 rows if nothing but its counters changes."""
    u = tl.load(slots + k)
    held = tl.where(u >= 0, tl.minimum(tl.load(rows + tl.maximum(u, 0)), capacity), 0)
    if not PULLS:
        if seen is None:
            held = tl.where(held > rank, held, 0)
        else:
            held = tl.where((held > rank) | (tl.load(seen) > 0), held, 0)
    return u, held


@triton.jit
def row_products(left, right):
    """Elementwise products of all pairs of rows, BR x BR x BK: left right^T before its sum over columns."""
    return left[:, None, :] * right[None, :, :]


@triton.jit
def _cross_rows(a, memory, u, r, j, mine, held, capacity, n):
    """Columns ``j`` of rows ``r`` of A and, below them, X_r; ``mine``: indices of its rows in the memory, or -1."""
    column = (j < n)[None, :]
    at = a + (u * capacity + r)[:, None] * n + j[None, :]
    value = tl.load(at, mask=(r < held)[:, None] & column, other=0).to(tl.float64)
    at = memory + mine[:, None] * n + j[None, :]
    return value + tl.load(at, mask=(mine >= 0)[:, None] & column, other=0).to(tl.float64)


@triton.jit(do_not_specialize=["capacity", "rank", "replay_rows", "memory_rows", "seed"])
def _cross(
    out, a, rows, memory, seen, step, slots, capacity, rank, n, replay_rows, memory_rows, seed: tl.int64,
    PULLS: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Store E and, below it, X_r X_r^T in ``out`` (K x (R + replay rows) x replay rows)."""
    k = tl.program_id(0).to(tl.int64)
    u, held = work_of(rows, slots, seen, k, capacity, rank, PULLS)
    if held == 0:
        return
    r, q = tl.program_id(1) * BR + tl.arange(0, BR), tl.program_id(2) * BR + tl.arange(0, BR)
    mine = draw(tl.maximum(r - capacity, 0), seen, step + u, memory_rows, seed)
    mine = tl.where((r >= capacity) & (r < capacity + replay_rows), mine, -1)
    other = tl.where(q < replay_rows, draw(q, seen, step + u, memory_rows, seed), -1)
    acc = tl.zeros((BR, BR, BK), tl.float64)
    for j0 in range(0, n, BK):
        j = j0 + tl.arange(0, BK)
        left = _cross_rows(a, memory, u, r, j, mine, held, capacity, n)
        right = tl.load(
            memory + other[:, None] * n + j[None, :], mask=(other >= 0)[:, None] & (j < n)[None, :], other=0
        )
        acc += row_products(left, right.to(tl.float64))
    at = out + (k * (capacity + replay_rows) + r[:, None]) * replay_rows + q[None, :]
    tl.store(at, tl.sum(acc, axis=2), mask=(r < capacity + replay_rows)[:, None] & (q < replay_rows)[None, :])


@triton.jit(do_not_specialize=["capacity", "rank", "replay_rows", "pieces", "at_piece"])
def _shares(
    out, middle, inverse, gram, cross, rows, seen, slots, capacity, rank, replay_rows, pieces, at_piece, beta,
    eps, PULLS: tl.constexpr, BR: tl.constexpr, QP: tl.constexpr,
):  # fmt: skip
    """Store F in ``out`` (K x R x replay rows), and a piece of A's Gram matrix.

    With U = E - F (X_r X_r^T) / 2, stored in ``middle`` in the layout of ``out``, that piece is -(F U^T + U F^T).
    """
    k = tl.program_id(0).to(tl.int64)
    _, held = work_of(rows, slots, seen, k, capacity, rank, PULLS)
    if held == 0:
        return
    q, c = tl.arange(0, QP)[:, None], tl.arange(0, QP)[None, :]
    cross += k * (capacity + replay_rows) * replay_rows
    square, whole, inside = cross + capacity * replay_rows, q * replay_rows + c, (q < replay_rows) & (c < replay_rows)
    out += k * capacity * replay_rows
    middle += k * capacity * replay_rows
    inverse += k * replay_rows * replay_rows
    by = ridged_inverse(tl.load(square + whole, mask=inside, other=0), q, c, replay_rows, eps)
    tl.store(inverse + whole, by, mask=inside)
    tl.debug_barrier()
    times(out, cross, inverse, held, replay_rows, replay_rows, replay_rows, replay_rows, 1, beta, QP, BR)
    times(middle, out, square, held, replay_rows, replay_rows, replay_rows, replay_rows, 1, -0.5, QP, BR)
    gram += (k * pieces + at_piece) * capacity * capacity
    for r0 in range(0, held, BR):
        r = r0 + tl.arange(0, BR)
        at = r[:, None] * replay_rows + c
        live = (r < held)[:, None] & (c < replay_rows)
        half = tl.load(middle + at, mask=live, other=0) + tl.load(cross + at, mask=live, other=0)
        tl.debug_barrier()  # several threads may hold the same numbers: all must have read before one writes
        tl.store(middle + at, half, mask=live)
    tl.debug_barrier()
    for r0 in range(0, held, BR):
        r = r0 + tl.arange(0, BR)
        for i0 in range(0, held, BR):
            i = i0 + tl.arange(0, BR)
            acc = tl.zeros((BR, BR), tl.float64)
            for d in range(0, replay_rows):
                fr = tl.load(out + r * replay_rows + d, mask=r < held, other=0)
                ur = tl.load(middle + r * replay_rows + d, mask=r < held, other=0)
                fi = tl.load(out + i * replay_rows + d, mask=i < held, other=0)
                ui = tl.load(middle + i * replay_rows + d, mask=i < held, other=0)
                acc -= fr[:, None] * ui[None, :] + ur[:, None] * fi[None, :]
            tl.store(gram + r[:, None] * capacity + i[None, :], acc, mask=(r < held)[:, None] & (i < held)[None, :])


@triton.jit
def _gram_piece(to, pool, u, i, r, held, capacity, size, first, width, BR: tl.constexpr, BK: tl.constexpr):
    """Store the products of rows ``i`` and ``r`` over ``width`` columns, and the mirror image."""
    acc = tl.zeros((BR, BR, BK), tl.float64)
    of_i, of_r = pool + (u * capacity + i)[:, None] * size, pool + (u * capacity + r)[:, None] * size
    for j0 in range(first, tl.minimum(first + width, size), BK):
        j = (j0 + tl.arange(0, BK))[None, :]
        left = tl.load(of_i + j, mask=(i < held)[:, None] & (j < size), other=0).to(tl.float64)
        right = tl.load(of_r + j, mask=(r < held)[:, None] & (j < size), other=0).to(tl.float64)
        acc += row_products(left, right)
    total, mask = tl.sum(acc, axis=2), (i < held)[:, None] & (r < held)[None, :]
    tl.store(to + i[:, None] * capacity + r[None, :], total, mask=mask)
    tl.store(to + r[None, :] * capacity + i[:, None], total, mask=mask)


@triton.jit(do_not_specialize=["capacity", "rank", "pieces", "pieces_a", "skip"])
def _gram(
    out, a, b, rows, seen, slots, capacity, rank, m, n, pieces, pieces_a, skip, width_a, width_b,
    PULLS: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Store a tile of A A^T or B B^T over one piece of the columns, and its mirror image, in ``out``.

    ``out``: (K x pieces x R x R), of which ``skip`` pieces between those of A and those of B are written by `_shares`.
    """
    k = tl.program_id(0).to(tl.int64)
    u, held = work_of(rows, slots, seen, k, capacity, rank, PULLS)
    tiles, piece = tl.cdiv(capacity, BR), tl.program_id(2)
    i0, r0 = tl.program_id(1) // tiles * BR, tl.program_id(1) % tiles * BR
    if (r0 > i0) | (i0 >= held):
        return
    i, r = i0 + tl.arange(0, BR).to(tl.int64), r0 + tl.arange(0, BR).to(tl.int64)
    if piece < pieces_a:
        to = out + (k * pieces + piece) * capacity * capacity
        _gram_piece(to, a, u, i, r, held, capacity, n, piece * width_a, width_a, BR, BK)
    else:
        to = out + (k * pieces + piece + skip) * capacity * capacity
        _gram_piece(to, b, u, i, r, held, capacity, m, (piece - pieces_a) * width_b, width_b, BR, BK)


@triton.jit(do_not_specialize=["capacity", "rank", "keep", "least", "pieces_a", "pieces_b"])
def _decide(
    factors, plan, gone, work, gram, rows, seen, slots, capacity, rank, keep, least, pieces_a, pieces_b,
    PULLS: tl.constexpr, RP: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """Find the factors of the new rows in the old ones, and the number of new rows.

    ``factors``: (K x 2 x keep x R), for A and for B; ``plan``: (K,), the number of rows, -1 if the slot stays as it is.
    """
    k = tl.program_id(0).to(tl.int64)
    _, held = work_of(rows, slots, seen, k, capacity, rank, PULLS)
    if held == 0:
        return
    to_a = factors + 2 * k * keep * capacity
    to_b = to_a + keep * capacity
    gram += k * (pieces_a + pieces_b) * capacity * capacity
    if held > rank:
        kept = tl.minimum(rank, least)
        work += k * (4 * capacity + 6) * capacity
        change, finite = truncate(to_a, to_b, work, gram, pieces_a, pieces_b, held, kept, capacity, RP, BQ)
        tl.store(gone + k, change)
        tl.store(plan + k, tl.where(finite, kept, -1))
    else:
        c = tl.arange(0, RP)
        good = diagonal(gram, pieces_a + pieces_b, held, capacity, RP) < float("inf")
        for r in range(0, held):
            one = tl.where(c == r, 1.0, 0.0).to(tl.float64)
            tl.store(to_a + r * capacity + c, one, mask=c < held)
            tl.store(to_b + r * capacity + c, one, mask=c < held)
        tl.store(plan + k, tl.where(tl.sum(good.to(tl.int32), axis=0) == RP, held, -1))
