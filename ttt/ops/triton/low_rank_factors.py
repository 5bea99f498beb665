"""The new rows of `ttt.ops.triton.low_rank_compress`: combined from the old ones, pulled to the anchor, and rounded."""

from __future__ import annotations

import triton
import triton.language as tl

from ttt.ops.triton.common import draw, rounding_words, weight_bits
from ttt.ops.triton.low_rank_gram import row_products, work_of
from ttt.ops.triton.update import rounded


@triton.jit
def _renew_block(
    to, factor, pool, shares, memory, seen, step, u, i, held, kept, replay_rows, memory_rows, capacity, size, block,
    seed, BI: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Store rows ``i`` and BN columns of a new factor, in float64."""
    j = block.to(tl.int64) * BN + tl.arange(0, BN)
    acc = tl.zeros((BI, BN), tl.float64)
    for r in range(0, held):
        by = tl.load(factor + i * capacity + r, mask=i < kept, other=0)
        row = tl.load(pool + (u * capacity + r) * size + j, mask=j < size, other=0).to(tl.float64)
        acc += by[:, None] * row[None, :]
    if shares is not None:
        for q in range(0, replay_rows):
            by = tl.zeros((BI,), tl.float64)
            for r0 in range(0, held, BC):
                s = r0 + tl.arange(0, BC)
                at, live = factor + i[:, None] * capacity + s[None, :], (i < kept)[:, None] & (s < held)[None, :]
                share = tl.load(shares + s * replay_rows + q, mask=s < held, other=0)
                by += tl.sum(tl.load(at, mask=live, other=0) * share[None, :], axis=1)
            index = draw(tl.cast(q, tl.int32), seen, step + u, memory_rows, seed)
            row = tl.load(memory + index * size + j, mask=j < tl.where(index >= 0, size, 0), other=0).to(tl.float64)
            acc -= by[:, None] * row[None, :]
    tl.store(to + i[:, None] * size + j[None, :], acc, mask=(i < kept)[:, None] & (j < size)[None, :])


@triton.jit(do_not_specialize=["capacity", "rank", "keep", "replay_rows", "memory_rows", "blocks_a", "seed"])
def _renew(
    fresh, factors, plan, a, b, rows, shares, memory, seen, step, slots,
    capacity, rank, keep, m, n, replay_rows, memory_rows, blocks_a, seed: tl.int64,
    PULLS: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Store BN columns of BI new rows of A or B in ``fresh`` (K x keep (n + m)), which holds those of A first."""
    k = tl.program_id(0).to(tl.int64)
    u, held = work_of(rows, slots, seen, k, capacity, rank, PULLS)
    if held == 0:
        return
    kept, i0, block = tl.load(plan + k), tl.program_id(1) * BI, tl.program_id(2)
    if i0 >= kept:
        return
    i = i0 + tl.arange(0, BI).to(tl.int64)
    to, factor = fresh + k * keep * (m + n), factors + 2 * k * keep * capacity
    if block < blocks_a:
        if shares is not None:
            shares += k * capacity * replay_rows
        _renew_block(to, factor, a, shares, memory, seen, step, u, i, held, kept, replay_rows, memory_rows, capacity, n,
                     block, seed, BI, BN, BC)  # fmt: skip
    else:
        to += tl.cast(keep, tl.int64) * n
        factor += keep * capacity
        _renew_block(to, factor, b, None, None, None, None, u, i, held, kept, 0, 0, capacity, m, block - blocks_a, seed,
                     BI, BN, BC)  # fmt: skip


@triton.jit
def _weigh_piece(
    plain, weighted, own, weights, i, r, kept, keep, size, first, width, BI: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Store the products of rows ``i`` and ``r`` over ``width`` columns, without and with the importance."""
    acc, acc_weighted = tl.zeros((BI, BI, BK), tl.float64), tl.zeros((BI, BI, BK), tl.float64)
    for j0 in range(first, tl.minimum(first + width, size), BK):
        j = (j0 + tl.arange(0, BK))[None, :]
        left = tl.load(own + i[:, None] * size + j, mask=(i < kept)[:, None] & (j < size), other=0)
        right = tl.load(own + r[:, None] * size + j, mask=(r < kept)[:, None] & (j < size), other=0)
        weight = tl.load(weights + j, mask=j < size, other=0).to(tl.float64)
        acc += row_products(left, right)
        acc_weighted += row_products(left * weight, right)
    at, mask = i[:, None] * keep + r[None, :], (i < kept)[:, None] & (r < kept)[None, :]
    tl.store(plain + at, tl.sum(acc, axis=2), mask=mask)
    tl.store(weighted + at, tl.sum(acc_weighted, axis=2), mask=mask)


@triton.jit(do_not_specialize=["capacity", "rank", "keep", "pieces_a"])
def _weigh(
    plain, weighted, fresh, plan, rows, slots, importance_m, importance_n,
    capacity, rank, keep, m, n, pieces_a, width_a, width_b, BI: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Store products of the new rows in ``plain`` and ``weighted`` (K x pieces x keep x keep).

    Those in ``weighted`` are weighted by the importance of each column.
    """
    k = tl.program_id(0).to(tl.int64)
    _, held = work_of(rows, slots, None, k, capacity, rank, True)
    if held == 0:
        return
    kept, tiles, piece = tl.load(plan + k), tl.cdiv(keep, BI), tl.program_id(2)
    i0, r0 = tl.program_id(1) // tiles * BI, tl.program_id(1) % tiles * BI
    if tl.maximum(i0, r0) >= kept:
        return
    i, r = i0 + tl.arange(0, BI).to(tl.int64), r0 + tl.arange(0, BI).to(tl.int64)
    own, at = fresh + k * keep * (m + n), (k * tl.num_programs(2) + piece) * keep * keep
    if piece < pieces_a:
        _weigh_piece(
            plain + at, weighted + at, own, importance_n, i, r, kept, keep, n, piece * width_a, width_a, BI, BK
        )
    else:
        own += tl.cast(keep, tl.int64) * n
        first = (piece - pieces_a) * width_b
        _weigh_piece(plain + at, weighted + at, own, importance_m, i, r, kept, keep, m, first, width_b, BI, BK)


@triton.jit
def _pull_of(
    own, plain, weighted, pieces, weights, top, strength, j, kept, keep, size, BI: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """(1 + strength w_j o'_j)^-1/2 for columns ``j``, from the products of the other factor's rows, given in pieces."""
    total, part = tl.zeros((BN,), tl.float64), tl.zeros((BN,), tl.float64)
    for i0 in range(0, kept, BI):
        i = i0 + tl.arange(0, BI).to(tl.int64)
        acc, acc_weighted = tl.zeros((BI, BN), tl.float64), tl.zeros((BI, BN), tl.float64)
        for r in range(0, kept):
            x = tl.load(own + tl.cast(r, tl.int64) * size + j, mask=j < size, other=0)
            g, w = tl.zeros((BI,), tl.float64), tl.zeros((BI,), tl.float64)
            for p in range(0, pieces):
                at = (tl.cast(p, tl.int64) * keep + i) * keep + r
                g += tl.load(plain + at, mask=i < kept, other=0)
                w += tl.load(weighted + at, mask=i < kept, other=0)
            acc += g[:, None] * x[None, :]
            acc_weighted += w[:, None] * x[None, :]
        live = (i < kept)[:, None] & (j < size)[None, :]
        x = tl.load(own + i[:, None] * size + j[None, :], mask=live, other=0)
        total += tl.sum(acc * x, axis=0)
        part += tl.sum(acc_weighted * x, axis=0)
    mean = tl.where(total > 0, part / tl.where(total > 0, total, 1.0), 0.0)
    # In a column of very small numbers the mean consists of rounding errors.
    mean = tl.minimum(tl.maximum(mean, 0.0), top)
    weight = tl.load(weights + j, mask=j < size, other=0).to(tl.float64)
    return 1 / tl.sqrt(1 + strength * weight * mean)


@triton.jit
def _finish_block(
    pool, own, plain, weighted, pieces, weights, top, strength, count, u, held, kept, keep, capacity, size, block, seed,
    LARGEST: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Pull, clamp, round and store BN columns of a slot's rows, and clear those of rows that become free."""
    j0 = block.to(tl.int64) * BN
    j = j0 + tl.arange(0, BN)
    column = (j < size)[None, :]
    if plain is not None:
        scale = _pull_of(own, plain, weighted, pieces, weights, top, strength, j, kept, keep, size, BI, BN)
    for i0 in range(0, kept, BI):
        i = i0 + tl.arange(0, BI).to(tl.int64)
        live = (i < kept)[:, None] & column
        value = tl.load(own + i[:, None] * size + j[None, :], mask=live, other=0)
        if plain is not None:
            value *= scale[None, :]
        # Values stay finite, however large the user's updates were.
        value = tl.minimum(tl.maximum(value, -LARGEST), LARGEST).to(tl.float32)
        bits = tl.zeros((BI, BN), tl.uint32)
        if pool.dtype.element_ty != tl.float32:
            bits = weight_bits(rounding_words(i, j0 // 2 + tl.arange(0, BN // 2), count.to(tl.uint32), seed))
        at = pool + (u * capacity + i)[:, None] * size + j[None, :]
        tl.store(at, rounded(value, bits, pool.dtype.element_ty), mask=live)
    for r0 in range(kept, held, BI):
        r = r0 + tl.arange(0, BI).to(tl.int64)
        at = pool + (u * capacity + r)[:, None] * size + j[None, :]
        tl.store(at, tl.zeros((BI, BN), pool.dtype.element_ty), mask=(r < held)[:, None] & column)


@triton.jit(do_not_specialize=["capacity", "rank", "keep", "pieces_a", "pieces_b", "blocks_a", "seed"])
def _finish(
    a, b, fresh, plain, weighted, plan, rows, seen, step, eta_sum, slots, importance_m, importance_n, tops,
    capacity, rank, keep, m, n, pieces_a, pieces_b, blocks_a, seed: tl.int64, lam,
    LARGEST: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write BN columns of a slot's rows of A or B."""
    k = tl.program_id(0).to(tl.int64)
    u, held = work_of(rows, slots, seen, k, capacity, rank, plain is not None)
    if held == 0:
        return
    kept, block = tl.load(plan + k), tl.program_id(1)
    if kept < 0:
        return
    count = tl.load(step + u)
    fresh_a = fresh + k * keep * (m + n)
    fresh_b = fresh_a + tl.cast(keep, tl.int64) * n
    strength, top_m, top_n = 0.0, 0.0, 0.0
    plain_a, plain_b, weighted_a, weighted_b = plain, plain, weighted, weighted
    if plain is not None:
        strength = lam * tl.load(eta_sum + u).to(tl.float64)
        top_m, top_n = tl.load(tops).to(tl.float64), tl.load(tops + 1).to(tl.float64)
        shift = k * (pieces_a + pieces_b) * keep * keep
        plain_a, weighted_a = plain + shift, weighted + shift
        shift = tl.cast(pieces_a, tl.int64) * keep * keep
        plain_b, weighted_b = plain_a + shift, weighted_a + shift
    if block < blocks_a:
        _finish_block(a, fresh_a, plain_b, weighted_b, pieces_b, importance_n, top_m, strength, count, u, held, kept,
                      keep, capacity, n, block, seed, LARGEST, BI, BN)  # fmt: skip
    else:
        _finish_block(b, fresh_b, plain_a, weighted_a, pieces_a, importance_m, top_n, strength, count, u, held, kept,
                      keep, capacity, m, block - blocks_a, seed, LARGEST, BI, BN)  # fmt: skip
