"""Slots of users brought back to their rank: a: S x R x n, b: S x R x m, slots (K,), of which -1 stands for none

    E = A X_r^T, X_r X_r^T                          `_cross`
    F = E beta (X_r X_r^T + eps tr/R I)^-1          `_shares`: replay is A <- A - F X_r
    A A^T, B B^T                                    `_gram`: in pieces of columns. A's after replay have one more, made
                                                    by `_shares`: F (X_r X_r^T) F^T - F E^T - E F^T
    the new rows as combinations of the old         `_decide`: one program a slot, see `ttt.ops.triton.truncate`
    A_new, B_new in float64                         `_renew`, into scratch memory
    A A^T, A diag(kappa) A^T, and those of B        `_weigh`: of the new rows, where they are pulled
    A_new diag(q), B_new diag(p), rounded           `_finish`, into the slot; zeros into the rows that become free
    rows, lost, eta_sum, step                       `_end`

Each launch is over all K slots, and what there is to do in one is decided on the device: the host does not wait, and
all of it can be captured in a CUDA graph. A slot with rows that are not finite stays as it was, if there was anything
to do but to count. Sums are float64, in an order that the shapes decide. No tl.dot: Triton 3.6 cannot compile some of
its float64 products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ttt.ops.triton.common import draw, padded_rows, rounding_words, signed, weight_bits
from ttt.ops.triton.replay import ridged_inverse
from ttt.ops.triton.truncate import diagonal, times, truncate
from ttt.ops.triton.update import rounded

MOST_ROWS = 1024  # of a slot: `_decide` holds vectors of them
MOST_PIECES = 8
LEAST_COLUMNS = 1024  # of a piece


@triton.jit
def _work(rows, slots, seen, k, capacity, rank, PULLS: tl.constexpr):
    """(u, how many rows of the k-th slot there are): none where there is nothing to do but to count."""
    u = tl.load(slots + k)
    held = tl.where(u >= 0, tl.minimum(tl.load(rows + tl.maximum(u, 0)), capacity), 0)
    if not PULLS:
        if seen is None:
            held = tl.where(held > rank, held, 0)
        else:
            held = tl.where((held > rank) | (tl.load(seen) > 0), held, 0)
    return u, held


@triton.jit
def _pair(left, right):
    """All products of rows of two blocks: BR x BR x BK, whose sum over the columns is left right^T."""
    return left[:, None, :] * right[None, :, :]


@triton.jit
def _cross_rows(a, memory, u, r, j, mine, held, capacity, n):
    """Columns ``j`` of rows ``r`` of A with X_r below it, whose rows stand at ``mine`` in the memory: -1 for none."""
    column = (j < n)[None, :]
    at = a + (u * capacity + r)[:, None] * n + j[None, :]
    value = tl.load(at, mask=(r < held)[:, None] & column, other=0).to(tl.float64)
    at = memory + mine[:, None] * n + j[None, :]
    return value + tl.load(at, mask=(mine >= 0)[:, None] & column, other=0).to(tl.float64)


@triton.jit(do_not_specialize=["capacity", "rank", "replay_rows", "memory_rows", "seed"])
def _cross(
    out, a, rows, memory, seen, step, slots, capacity, rank, n, replay_rows, memory_rows, seed,
    PULLS: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out (K x (R + replay rows) x replay rows): E, and below it X_r X_r^T."""
    k = tl.program_id(0).to(tl.int64)
    u, held = _work(rows, slots, seen, k, capacity, rank, PULLS)
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
        acc += _pair(left, right.to(tl.float64))
    at = out + (k * (capacity + replay_rows) + r[:, None]) * replay_rows + q[None, :]
    tl.store(at, tl.sum(acc, axis=2), mask=(r < capacity + replay_rows)[:, None] & (q < replay_rows)[None, :])


@triton.jit(do_not_specialize=["capacity", "rank", "replay_rows", "pieces", "at_piece"])
def _shares(
    out, middle, inverse, gram, cross, eta_sum, rows, seen, slots, capacity, rank, replay_rows, pieces, at_piece, beta,
    eps, GRADIENT: tl.constexpr, PULLS: tl.constexpr, BR: tl.constexpr, QP: tl.constexpr,
):  # fmt: skip
    """out (K x R x replay rows): F; with GRADIENT it is beta eta_sum E. And a piece of the Gram matrix of A.

    With U = E - F (X_r X_r^T) / 2, which ``middle`` holds as ``out`` does F, that piece is -(F U^T + U F^T).
    """
    k = tl.program_id(0).to(tl.int64)
    u, held = _work(rows, slots, seen, k, capacity, rank, PULLS)
    if held == 0:
        return
    q, c = tl.arange(0, QP)[:, None], tl.arange(0, QP)[None, :]
    cross += k * (capacity + replay_rows) * replay_rows
    square, whole, inside = cross + capacity * replay_rows, q * replay_rows + c, (q < replay_rows) & (c < replay_rows)
    out += k * capacity * replay_rows
    middle += k * capacity * replay_rows
    inverse += k * replay_rows * replay_rows
    if GRADIENT:
        by = tl.where(q == c, tl.load(eta_sum + u).to(tl.float64), 0.0)
    else:
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
        tl.debug_barrier()  # where several threads hold the same numbers, all have read them
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
    acc = tl.zeros((BR, BR, BK), tl.float64)
    of_i, of_r = pool + (u * capacity + i)[:, None] * size, pool + (u * capacity + r)[:, None] * size
    for j0 in range(first, tl.minimum(first + width, size), BK):
        j = (j0 + tl.arange(0, BK))[None, :]
        left = tl.load(of_i + j, mask=(i < held)[:, None] & (j < size), other=0).to(tl.float64)
        right = tl.load(of_r + j, mask=(r < held)[:, None] & (j < size), other=0).to(tl.float64)
        acc += _pair(left, right)
    total, mask = tl.sum(acc, axis=2), (i < held)[:, None] & (r < held)[None, :]
    tl.store(to + i[:, None] * capacity + r[None, :], total, mask=mask)
    tl.store(to + r[None, :] * capacity + i[:, None], total, mask=mask)


@triton.jit(do_not_specialize=["capacity", "rank", "pieces", "pieces_a", "skip"])
def _gram(
    out, a, b, rows, seen, slots, capacity, rank, m, n, pieces, pieces_a, skip, width_a, width_b,
    PULLS: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out (K x pieces x R x R): a tile of A A^T or B B^T, summed over one piece of the columns, and its mirror image.

    ``skip`` of the pieces between those of A and of B are made elsewhere.
    """
    k = tl.program_id(0).to(tl.int64)
    u, held = _work(rows, slots, seen, k, capacity, rank, PULLS)
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
    DIRECTIONS: tl.constexpr, PULLS: tl.constexpr, RP: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """factors (K x 2 x keep x R): new rows from old ones; plan (K,): how many, -1 if the slot stays as it is."""
    k = tl.program_id(0).to(tl.int64)
    _, held = _work(rows, slots, seen, k, capacity, rank, PULLS)
    if held == 0:
        return
    to_a = factors + 2 * k * keep * capacity
    to_b = to_a + keep * capacity
    gram += k * (pieces_a + pieces_b) * capacity * capacity
    if held > rank:
        kept = tl.minimum(rank, least)
        work += k * (4 * capacity + 6) * capacity
        change, finite = truncate(
            to_a, to_b, work, gram, pieces_a, pieces_b, held, kept, capacity, DIRECTIONS, RP, BQ
        )  # fmt: skip
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


@triton.jit
def _renew_block(
    to, factor, pool, shares, memory, seen, step, u, i, held, kept, replay_rows, memory_rows, capacity, size, block,
    seed, BI: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
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
    capacity, rank, keep, m, n, replay_rows, memory_rows, blocks_a, seed,
    PULLS: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """fresh (K x keep (n + m)): BI new rows of A and then of B, BN columns of them."""
    k = tl.program_id(0).to(tl.int64)
    u, held = _work(rows, slots, seen, k, capacity, rank, PULLS)
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
    acc, acc_weighted = tl.zeros((BI, BI, BK), tl.float64), tl.zeros((BI, BI, BK), tl.float64)
    for j0 in range(first, tl.minimum(first + width, size), BK):
        j = (j0 + tl.arange(0, BK))[None, :]
        left = tl.load(own + i[:, None] * size + j, mask=(i < kept)[:, None] & (j < size), other=0)
        right = tl.load(own + r[:, None] * size + j, mask=(r < kept)[:, None] & (j < size), other=0)
        weight = tl.load(weights + j, mask=j < size, other=0).to(tl.float64)
        acc += _pair(left, right)
        acc_weighted += _pair(left * weight, right)
    at, mask = i[:, None] * keep + r[None, :], (i < kept)[:, None] & (r < kept)[None, :]
    tl.store(plain + at, tl.sum(acc, axis=2), mask=mask)
    tl.store(weighted + at, tl.sum(acc_weighted, axis=2), mask=mask)


@triton.jit(do_not_specialize=["capacity", "rank", "keep", "pieces_a"])
def _weigh(
    plain, weighted, fresh, plan, rows, slots, importance_m, importance_n,
    capacity, rank, keep, m, n, pieces_a, width_a, width_b, BI: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """plain, weighted (K x pieces x keep x keep): products of the new rows, without and with the importance between."""
    k = tl.program_id(0).to(tl.int64)
    _, held = _work(rows, slots, None, k, capacity, rank, True)
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
    """(1 + strength w_j o'_j)^-1/2 for columns ``j``, the products of the other factor's rows being given in pieces."""
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
    # A column of nearly nothing has rounding errors only.
    mean = tl.minimum(tl.maximum(mean, 0.0), top)
    weight = tl.load(weights + j, mask=j < size, other=0).to(tl.float64)
    return 1 / tl.sqrt(1 + strength * weight * mean)


@triton.jit
def _finish_block(
    pool, own, plain, weighted, pieces, weights, top, strength, count, u, held, kept, keep, capacity, size, block, seed,
    LARGEST: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
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
        # What one user learnt may be absurd, but stays finite.
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
    capacity, rank, keep, m, n, pieces_a, pieces_b, blocks_a, seed, lam,
    LARGEST: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BN columns of a slot's rows of A or B."""
    k = tl.program_id(0).to(tl.int64)
    u, held = _work(rows, slots, seen, k, capacity, rank, plain is not None)
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


@triton.jit(do_not_specialize=["capacity", "rank"])
def _end(rows, eta_sum, lost, step, gone, plan, seen, slots, capacity, rank, PULLS: tl.constexpr):
    k = tl.program_id(0).to(tl.int64)
    u, held = _work(rows, slots, seen, k, capacity, rank, PULLS)
    if u >= 0:
        kept = tl.load(rows + u)
        if held > 0:
            kept = tl.load(plan + k)
        if kept >= 0:
            if held > rank:
                total = tl.load(lost + u).to(tl.float64) + tl.load(gone + k)
                tl.store(lost + u, tl.minimum(total, 3.4028234663852886e38).to(tl.float32))
            tl.store(rows + u, kept)
            tl.store(eta_sum + u, 0.0)
            tl.store(step + u, tl.load(step + u) + 1)


def why_not(a: torch.Tensor, b: torch.Tensor) -> str:
    """What keeps these kernels from compressing such a pool; empty if nothing does."""
    capacity = a.shape[1]
    if capacity > MOST_ROWS:
        return f"no Triton kernel for slots of {capacity} rows (at most {MOST_ROWS}); torch decomposes one at a time"
    return "" if a.numel() and b.numel() else "no Triton kernel for empty factors"


def _pieces(columns: int) -> tuple[int, int]:
    """(pieces, columns of each): by the number of columns alone."""
    width = max(LEAST_COLUMNS, triton.cdiv(triton.cdiv(columns, MOST_PIECES), 64) * 64)
    return triton.cdiv(columns, width), width


# Of `_decide`, by the slot's padded rows. A tile has at most 2048 numbers: twice as many spill. Left alone, the
# assembler aims at 168 registers in one variant, and spills a little; so it does in one of `_shares`.
_WARPS = {16: 1, 32: 4, 64: 8, 128: 8, 256: 8, 512: 8, 1024: 8}
_PRODUCTS = {"BR": 8, "BK": 64, "num_warps": 4, "num_stages": 1}
_RENEW = {"BI": 16, "BN": 128, "BC": 32, "num_warps": 4, "num_stages": 1}
_WEIGH = {"BI": 8, "BK": 64, "num_warps": 8, "num_stages": 1}
_FINISH = {"BI": 16, "BN": 64, "num_warps": 4, "num_stages": 1}


def low_rank_compress(
    a, b, rows, eta_sum, lost, step, slots, rank, shrink, lam, importance_m, importance_n, memory, seen, seed,
    replay_rows, replay, beta, eps,
) -> None:  # fmt: skip
    (_, capacity, n), m, chosen = a.shape, b.shape[2], slots.numel()
    if chosen == 0:
        return
    keep, padded, seed = min(rank, capacity), padded_rows(capacity), signed(seed)
    pulls, replays = lam > 0, replay_rows > 0
    (columns_a, width_a), (columns_b, width_b) = _pieces(n), _pieces(m)
    pieces_a, pieces = columns_a + replays, columns_a + replays + columns_b

    def scratch(*shape: int, dtype=torch.float64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=a.device)

    shares, memory_rows, block = None, 0, _PRODUCTS["BR"]
    gram = scratch(chosen, pieces, capacity, capacity)
    if replays:
        memory_rows, padded_replay = memory.shape[0], padded_rows(replay_rows)
        cross = scratch(chosen, capacity + replay_rows, replay_rows)
        shares, middle = (scratch(chosen, capacity, replay_rows) for _ in range(2))
        _cross[(chosen, triton.cdiv(capacity + replay_rows, block), triton.cdiv(replay_rows, block))](
            cross, a, rows, memory, seen, step, slots, capacity, rank, n, replay_rows, memory_rows, seed,
            PULLS=pulls, **_PRODUCTS,
        )  # fmt: skip
        _shares[(chosen,)](
            shares, middle, scratch(chosen, replay_rows, replay_rows), gram, cross, eta_sum, rows, seen, slots,
            capacity, rank, replay_rows, pieces, columns_a, beta, eps, GRADIENT=replay == "gradient", PULLS=pulls,
            BR=32, QP=padded_replay, num_warps={16: 4, 32: 4, 64: 8}[padded_replay], num_stages=1,
            maxnreg=255,
        )  # fmt: skip
    else:
        memory = seen = None
    _gram[(chosen, triton.cdiv(capacity, block) ** 2, columns_a + columns_b)](
        gram, a, b, rows, seen, slots, capacity, rank, m, n, pieces, columns_a, pieces_a - columns_a, width_a, width_b,
        PULLS=pulls, **_PRODUCTS,
    )  # fmt: skip
    factors, gone, plan = scratch(chosen, 2, keep, capacity), scratch(chosen), scratch(chosen, dtype=torch.int32)
    _decide[(chosen,)](
        factors, plan, gone, scratch(chosen, 4 * capacity + 6, capacity), gram, rows, seen, slots, capacity, rank, keep,
        min(m, n), pieces_a, columns_b, DIRECTIONS=shrink == "directions", PULLS=pulls, RP=padded,
        BQ=min(padded // 2, 2048 // padded), num_warps=_WARPS[padded], num_stages=1, maxnreg=255,
    )  # fmt: skip
    fresh, blocks_a, blocks_b = scratch(chosen, keep * (m + n)), *(triton.cdiv(k, _RENEW["BN"]) for k in (n, m))
    _renew[(chosen, triton.cdiv(keep, _RENEW["BI"]), blocks_a + blocks_b)](
        fresh, factors, plan, a, b, rows, shares, memory, seen, step, slots, capacity, rank, keep, m, n, replay_rows,
        memory_rows, blocks_a, seed, PULLS=pulls, **_RENEW,
    )  # fmt: skip
    plain = weighted = tops = None
    if pulls:
        plain, weighted = (scratch(chosen, columns_a + columns_b, keep, keep) for _ in range(2))
        tops = torch.stack([importance_m.amax(), importance_n.amax()])
        _weigh[(chosen, triton.cdiv(keep, _WEIGH["BI"]) ** 2, columns_a + columns_b)](
            plain, weighted, fresh, plan, rows, slots, importance_m, importance_n, capacity, rank, keep, m, n,
            columns_a, width_a, width_b, **_WEIGH,
        )  # fmt: skip
    else:
        importance_m = importance_n = None
    blocks_a, blocks_b = (triton.cdiv(k, _FINISH["BN"]) for k in (n, m))
    _finish[(chosen, blocks_a + blocks_b)](
        a, b, fresh, plain, weighted, plan, rows, seen, step, eta_sum, slots, importance_m, importance_n, tops,
        capacity, rank, keep, m, n, columns_a, columns_b, blocks_a, seed, lam,
        LARGEST=torch.finfo(a.dtype).max, **_FINISH,
    )  # fmt: skip
    _end[(chosen,)](rows, eta_sum, lost, step, gone, plan, seen, slots, capacity, rank, PULLS=pulls, num_warps=1)
