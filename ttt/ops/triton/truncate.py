"""The largest singular values of D = B^T A from the Gram matrices of its factors: one program a slot, in float64.

The rows of both factors are first scaled to equal lengths, which leaves D unchanged. With A A^T = L L^T (pivoted
Cholesky) the eigenvalues of C = L^T H, H = (B B^T) L, are the squares of D's singular values s. With C = N N^T (pivoted
Cholesky again), rotations that make pairs of N's columns orthogonal turn N into V diag(s), where V are C's eigenvectors
(one-sided Jacobi: Hestenes 1958). Columns are paired in round-robin order (Brent & Luk, SIAM J. Sci. Stat. Comput.
1985): the pairs of a round are disjoint, and every pair occurs once per sweep. Then:

    B <- s^-1/2 V^T L^T B     A <- s^-3/2 V^T H^T A

because B^T L V / s and A^T H V / s^2 are the singular vectors of D; no matrix is inverted. L, H and N are stored
transposed in scratch memory, small enough for the first-level cache. Each round ends with a barrier.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEGLIGIBLE = tl.constexpr(1e-15)  # relative to the largest square, or to the sum of all
SWEEPS = tl.constexpr(40)  # most sweeps; four to ten are enough


@triton.jit
def diagonal(gram, pieces, held, size, RP: tl.constexpr):
    """The squared lengths of the rows, from the pieces of their Gram matrix; infinity and NaN are kept."""
    c = tl.arange(0, RP)
    total = tl.zeros((RP,), tl.float64)
    for p in range(0, pieces):
        at = gram + tl.cast(p, tl.int64) * size * size + c * (size + 1)
        total += tl.load(at, mask=c < held, other=0)
    return tl.where(total < 0, 0.0, total)  # rounding can make it negative


@triton.jit
def _scaled_sum(to, gram, pieces, scale, held, size, RP: tl.constexpr, BQ: tl.constexpr):
    """to (held x held) = diag(scale) (the sum of the pieces of a Gram matrix) diag(scale)."""
    c = tl.arange(0, RP)
    mine = tl.load(scale + c, mask=c < held, other=0)
    for r0 in range(0, held, BQ):
        r = r0 + tl.arange(0, BQ)
        at, live = r[:, None] * size + c, (r < held)[:, None] & (c < held)
        total = tl.zeros((BQ, RP), tl.float64)
        for p in range(0, pieces):
            total += tl.load(gram + tl.cast(p, tl.int64) * size * size + at, mask=live, other=0)
        other = tl.load(scale + r, mask=r < held, other=0)
        tl.store(to + at, total * other[:, None] * mine, mask=live)
    tl.debug_barrier()


@triton.jit
def _cholesky(lt, g, rows, size, RP: tl.constexpr, BQ: tl.constexpr):
    """Compute L^T of G = L L^T row by row; each pivot is the largest number left on the diagonal.

    Returns the number of rows that are not negligible.
    """
    c = tl.arange(0, RP)
    left = tl.load(g + c * (size + 1), mask=c < rows, other=0)
    most = tl.max(left, axis=0)
    first, count = most, 0
    while (count < rows) & (most > NEGLIGIBLE * first):
        pivot = tl.argmax(left, axis=0)
        value = tl.load(g + pivot * size + c, mask=c < rows, other=0)
        for q0 in range(0, count, BQ):
            q = q0 + tl.arange(0, BQ)
            before = tl.load(lt + q[:, None] * size + c, mask=(q < count)[:, None] & (c < rows), other=0)
            factor = tl.load(lt + q * size + pivot, mask=q < count, other=0)
            value -= tl.sum(factor[:, None] * before, axis=0)
        root = tl.sqrt(most)
        value = tl.where(c == pivot, root, tl.where(left < 0, 0.0, value / root))
        tl.store(lt + count * size + c, value, mask=c < rows)
        left = tl.where((c == pivot) | (left < 0), -1.0, tl.maximum(left - value * value, 0.0))
        tl.debug_barrier()
        most = tl.max(left, axis=0)
        count += 1
    return count


@triton.jit
def times(
    to, x, g, rows, depth, columns, size, g_row, g_column, by, RP: tl.constexpr, BQ: tl.constexpr
):  # fmt: skip
    """to (rows x columns) = ``by`` X (rows x depth) G. G has the strides given, ``to`` and X have rows of ``size``."""
    c = tl.arange(0, RP)
    for q0 in range(0, rows, BQ):
        q = q0 + tl.arange(0, BQ)
        acc = tl.zeros((BQ, RP), tl.float64)
        for r in range(0, depth):
            factor = tl.load(x + q * size + r, mask=q < rows, other=0)
            acc += factor[:, None] * tl.load(g + r * g_row + c * g_column, mask=c < columns, other=0)[None, :]
        tl.store(to + q[:, None] * size + c, by * acc, mask=(q < rows)[:, None] & (c < columns))
    tl.debug_barrier()


@triton.jit
def _rotate(nt, turn, players, count, depth, size, negligible, RP: tl.constexpr, BQ: tl.constexpr):
    """One round of rotations of pairs of N's columns, the ``turn``-th pairing. Returns the number of rotated pairs."""
    c, ring = tl.arange(0, RP), players - 1
    turned = 0
    for k0 in range(0, players // 2, BQ):
        k = k0 + tl.arange(0, BQ)
        # Round-robin pairing of columns.
        i = (turn + k) % ring
        j = tl.where(k == 0, ring, (turn + ring - k) % ring)
        live = (k < players // 2) & (i < count) & (j < count)
        to_x, to_y, mask = nt + i[:, None] * size + c, nt + j[:, None] * size + c, live[:, None] & (c < depth)
        x, y = tl.load(to_x, mask=mask, other=0), tl.load(to_y, mask=mask, other=0)
        between, apart = tl.sum(x * y, axis=1), tl.sum((y - x) * (y + x), axis=1)
        wanted = live & (tl.abs(between) > negligible)
        cot = apart / (2 * tl.where(wanted, between, 1.0))  # of twice the angle; its magnitude is at most 1e15
        tan = tl.where(cot < 0, -1.0, 1.0) / (tl.abs(cot) + tl.sqrt(1 + cot * cot))
        cos = 1 / tl.sqrt(1 + tan * tan)
        cos, sin = cos[:, None], (cos * tan)[:, None]
        mask = mask & wanted[:, None]
        tl.debug_barrier()  # several threads may hold the same numbers: all must have read before one writes
        tl.store(to_x, cos * x - sin * y, mask=mask)
        tl.store(to_y, sin * x + cos * y, mask=mask)
        turned += tl.sum(wanted.to(tl.int32), axis=0)
    tl.debug_barrier()
    return turned


@triton.jit
def _squares(values, nt, count, depth, size, RP: tl.constexpr, BQ: tl.constexpr):
    """Squared lengths of N's columns."""
    c = tl.arange(0, RP)
    for q0 in range(0, count, BQ):
        q = q0 + tl.arange(0, BQ)
        x = tl.load(nt + q[:, None] * size + c, mask=(q < count)[:, None] & (c < depth), other=0)
        tl.store(values + q, tl.sum(x * x, axis=1), mask=q < count)
    tl.debug_barrier()


@triton.jit
def _places(values, count, RP: tl.constexpr, BQ: tl.constexpr):
    """The place of each of ``count`` values in falling order; RP for entries behind them."""
    c = tl.arange(0, RP)
    mine = tl.load(values + c, mask=c < count, other=0)
    place = tl.zeros((RP,), tl.int32)
    for q0 in range(0, count, BQ):
        q = q0 + tl.arange(0, BQ)[:, None]
        other = tl.load(values + q, mask=q < count, other=0)
        before = (other > mine[None, :]) | ((other == mine[None, :]) & (q < c[None, :]))
        place += tl.sum((before & (q < count)).to(tl.int32), axis=0)
    return tl.where(c < count, place, RP)


@triton.jit
def _clear(to, rows, size, RP: tl.constexpr):
    c = tl.arange(0, RP)
    for r in range(0, rows):
        tl.store(to + r * size + c, tl.zeros((RP,), tl.float64), mask=c < size)
    tl.debug_barrier()


@triton.jit
def _scale(to, by_row, by_column, rows, columns, size, RP: tl.constexpr, BQ: tl.constexpr):
    c = tl.arange(0, RP)
    mine = tl.load(by_column + c, mask=c < columns, other=0)
    for q0 in range(0, rows, BQ):
        q = q0 + tl.arange(0, BQ)
        at, live = to + q[:, None] * size + c, (q < rows)[:, None] & (c < columns)
        factor = tl.load(by_row + q, mask=q < rows, other=0)
        value = tl.load(at, mask=live, other=0) * factor[:, None] * mine
        tl.debug_barrier()  # as above
        tl.store(at, value, mask=live)


@triton.jit
def truncate(
    to_a, to_b, work, gram, pieces_a, pieces_b, held, kept, size, RP: tl.constexpr, BQ: tl.constexpr
):  # fmt: skip
    """The ``kept`` new rows of A are to_a (kept x size) times the ``held`` old ones, those of B to_b times them.

    Args:
        work: 4 size^2 + 6 size numbers.
        gram: the pieces of A A^T, size x size each, then those of B B^T.
        size: at most RP.

    Returns:
        (|change of D|_F, whether all rows are finite); if they are not, nothing is stored.
    """
    c = tl.arange(0, RP)
    square = size * size
    of_a, of_b, lt, nt, vectors = work, work + square, work + 2 * square, work + 3 * square, work + 4 * square
    scale_a, scale_b, values = vectors, vectors + size, vectors + 2 * size
    places, by_a, by_b = vectors + 3 * size, vectors + 4 * size, vectors + 5 * size
    gram_b = gram + tl.cast(pieces_a, tl.int64) * square
    norm_a = tl.sqrt(diagonal(gram, pieces_a, held, size, RP))
    norm_b = tl.sqrt(diagonal(gram_b, pieces_b, held, size, RP))
    product = norm_a * norm_b
    finite = tl.sum(((norm_a < float("inf")) & (norm_b < float("inf"))).to(tl.int32), axis=0) == RP
    gone = tl.sum(product, axis=0)
    if finite:
        # Equal row lengths of at most 1 in A and B: large rows of one factor must not hide large rows of the other.
        largest = tl.max(product, axis=0)
        unit = tl.sqrt(tl.where(largest > 0, largest, 1.0))
        positive = product > 0
        ratio = tl.sqrt(tl.where(positive, norm_b, 1.0) / tl.where(positive, norm_a, 1.0))
        tl.store(scale_a + c, tl.where(positive, ratio / unit, 0.0), mask=c < held)
        tl.store(scale_b + c, tl.where(positive, 1 / ratio / unit, 0.0), mask=c < held)
        tl.debug_barrier()
        _scaled_sum(of_a, gram, pieces_a, scale_a, held, size, RP, BQ)
        _scaled_sum(of_b, gram_b, pieces_b, scale_b, held, size, RP, BQ)
        depth = _cholesky(lt, of_a, held, size, RP, BQ)
        ht = of_a  # A A^T is not needed any more; B B^T is overwritten next
        times(ht, lt, of_b, depth, held, held, size, size, 1, 1.0, RP, BQ)
        times(of_b, lt, ht, depth, held, depth, size, 1, size, 1.0, RP, BQ)
        negligible = NEGLIGIBLE * tl.sum(tl.load(of_b + c * (size + 1), mask=c < depth, other=0), axis=0)
        count = _cholesky(nt, of_b, depth, size, RP, BQ)
        players = count + count % 2
        turned, sweep = count, 0
        while (turned > 0) & (sweep < SWEEPS):
            turned = 0
            for turn in range(0, players - 1):
                turned += _rotate(nt, turn, players, count, depth, size, negligible, RP, BQ)
            sweep += 1

        _squares(values, nt, count, depth, size, RP, BQ)
        value, place = tl.load(values + c, mask=c < count, other=0), _places(values, count, RP, BQ)
        s = tl.where(value > NEGLIGIBLE * tl.max(value, axis=0), tl.sqrt(value), 0.0)
        stays = tl.where(place < kept, s, 0.0)
        gone = largest * tl.sqrt(tl.sum((s - stays) * (s - stays), axis=0))
        # The columns of V that are kept, in falling order, as rows; zeros if there are fewer.
        vt = of_b
        _clear(vt, kept, size, RP)
        safe = tl.where(s > 0, s, 1.0)
        factor = tl.where(s > 0, unit * tl.sqrt(stays) / safe, 0.0)  # N's columns already have the length s
        tl.store(by_b + place, factor / safe, mask=place < kept)
        tl.store(by_a + place, factor / safe / safe, mask=place < kept)
        tl.store(places + c, place.to(tl.float64), mask=c < count)
        tl.debug_barrier()
        for q0 in range(0, count, BQ):
            q = q0 + tl.arange(0, BQ)
            row = tl.load(places + q, mask=q < count, other=RP).to(tl.int32)
            live = (row < kept)[:, None] & (c < depth)
            column = tl.load(nt + q[:, None] * size + c, mask=live, other=0)
            tl.store(vt + row[:, None] * size + c, column, mask=live)
        tl.debug_barrier()
        times(to_a, vt, ht, kept, depth, held, size, size, 1, 1.0, RP, BQ)
        times(to_b, vt, lt, kept, depth, held, size, size, 1, 1.0, RP, BQ)
        found = tl.minimum(kept, count)
        _scale(to_a, by_a, scale_a, found, held, size, RP, BQ)
        _scale(to_b, by_b, scale_b, found, held, size, RP, BQ)
    return gone, finite
