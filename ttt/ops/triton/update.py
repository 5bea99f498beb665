"""Writes one tile of W and F from its G and S, and makes the factors of both; shared by the fused kernel and panels.

    G <- carry M + gain G;  M <- keep M + share G        with a momentum, before the replay rows are added to G
    W <- W - (G + a d) / (1 + a)               a = (sum eta) (lam Omega + decay), d = W - W*
    F <- gamma^T F + S                         for SI: S = S' * (W_old - W_new), with S' = P^T X

16-bit weights and traces are rounded stochastically and 8-bit traces are written in the blocks of `ttt.ops.log8`, with
the same random bits as in the reference.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ttt.ops import log8
from ttt.ops.triton.common import draw, momentum_bits, rounding_words, trace_bits, weight_bits

BLOCK = tl.constexpr(log8.BLOCK)
FIRST = tl.constexpr(log8.FIRST)
SMALLEST = tl.constexpr(log8.SMALLEST)
MAX_EXPONENT = tl.constexpr(log8.MAX_EXPONENT)
ROOM = tl.constexpr(log8.ROOM)


@triton.jit
def squares(p, x, age, count, log2_gamma, KIND: tl.constexpr, SAMPLED: tl.constexpr):
    """The two factors of S for tokens of the given age; if sampled, each token stands for ``count`` tokens.

    ``log2_gamma`` is None if gamma = 1.
    """
    if KIND == "si":
        if SAMPLED:
            p = p.to(tl.float32) * count
    else:
        p, x = p.to(tl.float32), x.to(tl.float32)
        if KIND == "fisher":
            p, x = p * p, x * x
        else:
            p, x = tl.abs(p), tl.abs(x)
        if log2_gamma is not None:
            p *= tl.exp2(age.to(tl.float32) * log2_gamma)
        if SAMPLED:
            p *= count
    return p, x


@triton.jit
def _permuted(left, right):
    """Permute the columns of both factors such that `in_order` moves nothing between threads."""
    BT: tl.constexpr = left.shape[0]
    BM: tl.constexpr = left.shape[1]
    BN: tl.constexpr = right.shape[1]
    left = tl.reshape(tl.permute(tl.reshape(left, (BT, BM // 32, 4, 8)), (0, 2, 1, 3)), (BT, BM))
    right = tl.reshape(tl.permute(tl.reshape(right, (BT, 4, BN // 8, 2)), (0, 2, 1, 3)), (BT, BN))
    return left, right


@triton.jit
def in_order(acc):
    """Bring a sum that `outer` made into the order of rows and columns.

    Tensor cores leave each thread pairs of columns that are 8 apart, while wide loads and stores need 8 neighbours. The
    compiler would pass every tile of the state through shared memory, with some 25 barriers. Instead the factors, which
    are small, are permuted such that with four warps each thread's sums are neighbours, in the rows that it loads. This
    saves a fifth of the instructions; with other shapes it gains nothing.
    """
    BM: tl.constexpr = acc.shape[0]
    BN: tl.constexpr = acc.shape[1]
    acc = tl.reshape(acc, (4, BM // 32, 8, BN // 8, 4, 2))
    return tl.reshape(tl.permute(acc, (1, 0, 2, 4, 3, 5)), (BM, BN))


@triton.jit
def outer(left, right, acc, AS: tl.constexpr):
    """acc + left^T right, permuted as `in_order` says.

    ``AS`` is how operands are converted: "bf16", "bf16x2" (the left one in two parts), or an input_precision of tl.dot.
    """
    left, right = _permuted(left, right)
    if AS == "bf16":
        acc = tl.dot(tl.trans(left.to(tl.bfloat16)), right.to(tl.bfloat16), acc)
    elif AS == "bf16x2":
        high = left.to(tl.bfloat16)
        acc = tl.dot(tl.trans(high), right, acc)
        acc = tl.dot(tl.trans((left - high.to(tl.float32)).to(tl.bfloat16)), right, acc)
    else:
        acc = tl.dot(tl.trans(left.to(tl.float32)), right.to(tl.float32), acc, input_precision=AS)
    return acc


@triton.jit
def replayed(
    response, memory, seen, step, acc, rows, capacity, i0, j0, i, j, m, n, seed, BR: tl.constexpr, AS: tl.constexpr
):
    """acc + U^T X_r for a tile, permuted as `in_order` says; X_r is drawn from the memory."""
    b = tl.arange(0, BR)[:, None]
    for r0 in range(0, rows, BR):
        index = draw(r0 + b, seen, step, capacity, seed)
        live = (b < rows - r0) & (index >= 0)
        xr = tl.load(memory + (index * n + j0) + j, mask=live & (j < n - j0), other=0)
        u = tl.load(response + tl.cast(r0, tl.int64) * m + i0 + (b * m + i), mask=live & (i < m - i0), other=0)
        acc = outer(u, xr, acc, AS)
    return acc


@triton.jit
def rounded(value, bits, dtype: tl.constexpr):
    """float32 ``value`` in ``dtype``; 16-bit types are rounded stochastically by the 16 of ``bits``."""
    if dtype == tl.float32:
        return value
    DROPPED: tl.constexpr = 16 if dtype == tl.bfloat16 else 13
    LOW: tl.constexpr = (1 << DROPPED) - 1
    raw = value.to(tl.int32, bitcast=True)
    # Non-finite values have no mantissa to round: adding bits could turn an infinity into a NaN.
    finite = (raw & 0x7F800000) != 0x7F800000
    raw = tl.where(finite, raw + (bits & LOW).to(tl.int32), raw) & (-1 - LOW)
    return raw.to(tl.float32, bitcast=True).to(dtype)


@triton.jit
def load_state(state, i0, j0, i, j, n, width, inside):
    """A tile of importance or trace as it is stored: numbers, or the codes of 8-bit blocks."""
    if state.dtype.element_ty == tl.uint8:
        at = (i0 * width + j0) + tl.max_contiguous(i[:, None] * width + j, (1, 8))
    else:
        at = (i0 * n + j0) + (i[:, None] * n + j)
    return tl.load(state + at, mask=inside, other=0)


@triton.jit
def _exponents_at(state, i0, j0, i, n, width, COUNT: tl.constexpr):
    return state + (i0 * width + n + j0 // BLOCK) + (i[:, None] * width + tl.arange(0, COUNT))


@triton.jit
def _over_blocks(scale, BM: tl.constexpr, BN: tl.constexpr):
    return tl.reshape(tl.broadcast_to(scale[:, :, None], (BM, BN // BLOCK, BLOCK)), (BM, BN))


@triton.jit
def _values(stored, state, i0, j0, i, m, n, width, BM: tl.constexpr, BN: tl.constexpr):
    """Decode a tile from `load_state` to float32."""
    if stored.dtype == tl.uint8:
        COUNT: tl.constexpr = BN // BLOCK
        mask = (i < m - i0)[:, None] & (tl.arange(0, COUNT) * BLOCK < n - j0)
        exponent = tl.load(_exponents_at(state, i0, j0, i, n, width, COUNT), mask=mask, other=0)
        scale = _over_blocks((exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True), BM, BN)
        value = ((stored.to(tl.int32) + FIRST) << 19).to(tl.float32, bitcast=True) * scale
        return tl.where(stored > 0, value, 0.0)
    return stored.to(tl.float32)


@triton.jit
def _store_codes(state, value, bits, i0, j0, i, j, m, n, width, inside, BM: tl.constexpr, BN: tl.constexpr):
    """Encode values >= 0 as `ttt.ops.log8.encode` does; those past column n are zeros."""
    COUNT: tl.constexpr = BN // BLOCK
    # Floats >= 0 are ordered like their bits.
    top = tl.max(tl.reshape(value.to(tl.int32, bitcast=True), (BM, COUNT, BLOCK)), axis=2)
    exponent = tl.minimum(((top + ROOM) >> 23) + 1, MAX_EXPONENT)
    exponent = tl.where(top > 0, exponent, 0)
    scaled = value * _over_blocks(((254 - exponent) << 23).to(tl.float32, bitcast=True), BM, BN)
    r = bits.to(tl.int32)
    code = ((scaled.to(tl.int32, bitcast=True) + ((r << 3) | 4)) >> 19) - FIRST
    small = (scaled > SMALLEST * 0.0000152587890625 * (r.to(tl.float32) + 0.5)).to(tl.int32)  # 2^-16
    code = tl.where(scaled < SMALLEST, small, tl.minimum(tl.maximum(code, 1), 255))
    at = (i0 * width + j0) + tl.max_contiguous(i[:, None] * width + j, (1, 8))
    tl.store(state + at, code.to(tl.uint8), mask=inside)
    mask = (i < m - i0)[:, None] & (tl.arange(0, COUNT) * BLOCK < n - j0)
    tl.store(_exponents_at(state, i0, j0, i, n, width, COUNT), exponent.to(tl.uint8), mask=mask)


@triton.jit
def pass_momentum(
    g, velocity, momentum, step, seed, carry, gain, remember, share, i0, j0, i, j, m, n, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Return carry M + gain G for a tile in order, and write M <- remember M + share G; ``velocity`` is M's tile."""
    velocity = velocity.to(tl.float32)
    after = remember * velocity + share * g
    bits = tl.zeros((BM, BN), tl.uint32)
    if momentum.dtype.element_ty != tl.float32:
        bits = momentum_bits(i0 + i, j0 // 2 + tl.arange(0, BN // 2), tl.load(step).to(tl.uint32), seed)
    inside = (i < m - i0)[:, None] & (j < n - j0)
    after = rounded(after, bits, momentum.dtype.element_ty)
    tl.store(momentum + (i0 * n + j0) + (i[:, None] * n + j), after, mask=inside)
    return carry * velocity + gain * g


@triton.jit
def update(
    g, s, old, origin, omega, before, weight, importance, trace, step, seed, pull, decay, keep, i0, j0, i, j, m, n,
    width, KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write the tile of W and F whose first element is (i0, j0), from its G and S.

    ``old``, ``origin``, ``omega`` and ``before`` are its W, W*, Omega and F as stored, or None if not needed. ``pull``
    and ``decay`` are lam and decay times sum eta.
    """
    inside = (i < m - i0)[:, None] & (j < n - j0)
    old = old.to(tl.float32)
    if origin is not None:
        # The proximal step W* + (W - G - W*) / (1 + a), written so that G = 0 and a = 0 change no bit.
        a = 0.0
        if importance is not None:
            a = pull * _values(omega, importance, i0, j0, i, m, n, width, BM, BN)
        if decay is not None:
            a += decay
        g = (g + a * (old - origin.to(tl.float32))) / (1.0 + a)
    words = tl.zeros((BM, BN // 2), tl.uint32)
    if weight.dtype.element_ty != tl.float32 or (trace is not None and trace.dtype.element_ty != tl.float32):
        words = rounding_words(i0 + i, j0 // 2 + tl.arange(0, BN // 2), tl.load(step).to(tl.uint32), seed)
    new = rounded(old - g, weight_bits(words), weight.dtype.element_ty)
    tl.store(weight + (i0 * n + j0) + (i[:, None] * n + j), new, mask=inside)
    if trace is not None:
        if KIND == "si":
            s *= old - new.to(tl.float32)
        f = keep * _values(before, trace, i0, j0, i, m, n, width, BM, BN) + s
        if trace.dtype.element_ty == tl.uint8:
            _store_codes(trace, f, trace_bits(words), i0, j0, i, j, m, n, width, inside, BM, BN)
        else:
            f = rounded(f, trace_bits(words), trace.dtype.element_ty)
            tl.store(trace + (i0 * n + j0) + (i[:, None] * n + j), f, mask=inside)
