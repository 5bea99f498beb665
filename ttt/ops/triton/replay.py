"""The drift of the outputs on remembered inputs, and the correction of W that pulls them back.

With d = W - W*, X_r (R x n) drawn from the memory, A = X_r X_r^T + eps tr/R I:

    E = X_r d^T - ((X_r X^T) * eta) D          R x m     `_products`, then `_drift` in slabs; with a momentum
                                                         X_r (d - carry M)^T - gain ((X_r X^T) * eta) D
    U = beta A^-1 E                            R x m     `_invert`, then `_project`

The commit subtracts U^T X_r, which equals E^T V with V = beta A^-1 X_r because A^-1 is symmetric. So the replay rows
are R more tokens with inputs X_r, which the weight's dtype holds exactly. An empty memory gives E = 0 on the device.

`_drift` reads W and W* a second time, because they do not stay in the cache: 4 bytes per weight in addition to the
commit's 12 at 16 bits. It is divided along n as well as m, so that there are enough programs for all multiprocessors.
`_project` adds the sums of the slabs in a fixed order, not by atomics, so results are the same in every run. A and its
inverse are float64. R is at most 64, so one program inverts A.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ttt.ops.arguments import CommitArguments
from ttt.ops.momentum import coefficients
from ttt.ops.triton.common import GATED, draw, padded_rows, signed


@triton.jit(do_not_specialize=["tokens", "columns", "capacity", "seed"], **GATED)
def _products(
    out, memory, seen, step, x, eta, gate, tokens, columns, capacity, n, seed: tl.int64,
    BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out (R x columns) = [(X_r X^T) * eta, X_r X_r^T]; each program computes BC numbers of one row."""
    if gate is not None:
        if tl.load(gate) == 0:
            return
    r, c = tl.program_id(1), tl.program_id(0) * BC + tl.arange(0, BC)
    index = draw(r, seen, step, capacity, seed)
    replayed = tl.maximum(draw(c - tokens, seen, step, capacity, seed), 0)
    of_x, of_memory = (x + c.to(tl.int64) * n)[:, None], (memory + replayed * n)[:, None]
    is_x, is_memory = (c < tokens)[:, None], ((c >= tokens) & (c < columns))[:, None]
    filled = tl.where(index >= 0, n, 0)  # columns of X_r to be read
    acc = tl.zeros((BC, BK), tl.float64)
    for k0 in range(0, n, BK):
        k = k0 + tl.arange(0, BK)
        xr = tl.load(memory + index * n + k, mask=k < filled, other=0).to(tl.float64)
        # One of the two is masked out; a choice between the pointers would prevent wide loads.
        other = tl.load(of_x + k, mask=is_x & (k < filled), other=0).to(tl.float64)
        other += tl.load(of_memory + k, mask=is_memory & (k < filled), other=0).to(tl.float64)
        acc += xr * other
    scale = tl.load(eta + c, mask=c < tokens, other=1).to(tl.float64)
    tl.store(out + r.to(tl.int64) * columns + c, scale * tl.sum(acc, axis=1), mask=c < columns)


@triton.jit
def ridged_inverse(a, r, c, rows, eps):
    """(A + eps tr A / rows I)^-1 of a matrix of ``rows`` rows, padded with zeros, by the sweep operator."""
    ridge = eps * tl.sum(tl.sum(tl.where(r == c, a, 0.0), axis=1)) / rows
    # If all rows are zeros, U^T X_r is zero with any ridge.
    a += tl.where(r == c, tl.where(ridge > 0, ridge, 1.0), 0.0)
    for k in range(0, rows):
        row = tl.sum(tl.where(r == k, a, 0.0), axis=0)[None, :]
        col = tl.sum(tl.where(c == k, a, 0.0), axis=1)[:, None]
        pivot = 1.0 / tl.sum(tl.sum(tl.where((r == k) & (c == k), a, 0.0), axis=1))
        swept = tl.where(r == k, tl.where(c == k, -pivot, row * pivot), col * pivot)
        a = tl.where((r == k) | (c == k), swept, a - col * row * pivot)
    return -a


@triton.jit(do_not_specialize=["tokens", "rows"], **GATED)
def _invert(inverse, products, gate, tokens, rows, eps, RP: tl.constexpr):
    """inverse = (X_r X_r^T + eps tr/R I)^-1, in one program."""
    if gate is not None:
        if tl.load(gate) == 0:
            return
    r, c = tl.arange(0, RP)[:, None], tl.arange(0, RP)[None, :]
    inside = (r < rows) & (c < rows)
    a = tl.load(products + r * (tokens + rows).to(tl.int64) + tokens + c, mask=inside, other=0)
    tl.store(inverse + r * rows + c, ridged_inverse(a, r, c, rows, eps), mask=inside)


@triton.jit(do_not_specialize=["tokens", "rows", "capacity", "columns", "slabs", "seed"], **GATED)
def _drift(
    drift, weight, anchor, memory, seen, step, products, delta, gate, momentum,
    tokens, rows, capacity, m, n, columns, slabs, seed: tl.int64, carry, gain,
    BM: tl.constexpr, BK: tl.constexpr, SLAB: tl.constexpr, RP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """drift (slabs x R x m): the part of E for BM rows of W and W*, over SLAB of their columns or SLAB tokens."""
    if gate is not None:
        if tl.load(gate) == 0:
            return
    i, slab = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM), tl.program_id(1)
    r = tl.arange(0, RP)
    index = draw(r, seen, step, capacity, seed)
    live = (r < rows) & (index >= 0)
    acc = tl.zeros((RP, BM), tl.float32)
    # The first slabs are columns of W, the last ones are tokens; the other loop has no iterations.
    first = slab * SLAB
    for k0 in range(first, tl.where(slab < slabs, tl.minimum(first + SLAB, n), 0), BK):
        k = k0 + tl.arange(0, BK)
        inside = (i < m)[:, None] & (k < n)
        xr = tl.load(memory + index[:, None] * n + k, mask=live[:, None] & (k < n), other=0).to(tl.float32)
        w = tl.load(weight + i[:, None] * n + k, mask=inside, other=0).to(tl.float32)
        w -= tl.load(anchor + i[:, None] * n + k, mask=inside, other=0).to(tl.float32)
        if momentum is not None:
            w -= carry * tl.load(momentum + i[:, None] * n + k, mask=inside, other=0).to(tl.float32)
        acc = tl.dot(xr, tl.trans(w), acc, input_precision=PRECISION)
    first = (slab - slabs) * SLAB
    for t0 in range(first, tl.where(slab < slabs, first, tl.minimum(first + SLAB, tokens)), 16):
        t = t0 + tl.arange(0, 16).to(tl.int64)
        cross = tl.load(products + r[:, None] * columns + t, mask=live[:, None] & (t < tokens), other=0)
        if gain is not None:
            cross *= gain
        d = tl.load(delta + t[:, None] * m + i, mask=(t < tokens)[:, None] & (i < m), other=0)
        # tf32 is not enough here: A^-1 would amplify the rounding of this product. Rounding of w above is the same for
        # all replay rows, and is not amplified.
        acc -= tl.dot(
            cross.to(tl.float32), d.to(tl.float32), input_precision="tf32x3" if PRECISION == "tf32" else PRECISION
        )
    at = drift + (slab.to(tl.int64) * rows + r[:, None]) * m + i
    # Rows that were not drawn must give zero, even if a weight is not finite.
    tl.store(at, tl.where(live[:, None], acc, 0.0), mask=(r < rows)[:, None] & (i < m))


@triton.jit(do_not_specialize=["rows", "slabs"], **GATED)
def _project(
    out, inverse, drift, gate, rows, slabs, m, strength, RP: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """U from the slabs of E, in float64: the entries of A^-1 are large and cancel."""
    if gate is not None:
        if tl.load(gate) == 0:
            return
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    r = tl.arange(0, RP)
    mask = (r < rows)[:, None] & (i < m)
    e = tl.zeros((RP, BM), tl.float64)
    for slab in range(0, slabs):
        at = drift + (tl.cast(slab, tl.int64) * rows + r[:, None]) * m + i
        e += tl.load(at, mask=mask, other=0).to(tl.float64)
    acc = tl.zeros((RP, BM), tl.float64)
    for k in range(0, rows):
        column = tl.load(inverse + r * rows + k, mask=r < rows, other=0)
        acc += column[:, None] * tl.sum(tl.where(r[:, None] == k, e, 0.0), axis=0)[None, :]
    tl.store(out + r[:, None] * m + i, (strength * acc).to(tl.float32), mask=mask)


_BLOCKS = {  # _drift, by the weight's dtype
    torch.bfloat16: {"BM": 32, "BK": 64, "SLAB": 1024, "PRECISION": "tf32", "num_warps": 4, "num_stages": 4},
    torch.float16: {"BM": 32, "BK": 64, "SLAB": 1024, "PRECISION": "tf32", "num_warps": 4, "num_stages": 4},
    torch.float32: {"BM": 32, "BK": 32, "SLAB": 1024, "PRECISION": "ieee", "num_warps": 8, "num_stages": 3},
}


def respond(c: CommitArguments) -> torch.Tensor:
    """U (R x m), float32, for the commit ``c``. Where its gate holds 0 the content of U is undefined."""
    weight, memory, seen, step, gate, rows = c.weight, c.memory, c.seen, c.step, c.gate, c.replay_rows
    (m, n), tokens, capacity, seed = weight.shape, c.eta.numel(), c.memory.shape[0], signed(c.seed)
    momentum = c.momentum if tokens else None
    _, _, carry, gain = coefficients(c.mu, tokens) if momentum is not None else [None] * 4
    padded, blocks = padded_rows(rows), _BLOCKS[weight.dtype]
    if momentum is not None:
        blocks = {**blocks, "maxnreg": 255}  # left alone, the assembler aims at 80 in one variant, and spills a little
    columns = tokens + rows
    slabs = triton.cdiv(n, blocks["SLAB"])
    all_slabs = slabs + triton.cdiv(tokens, blocks["SLAB"])

    def scratch(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=weight.device)

    products, inverse = scratch(rows, columns, dtype=torch.float64), scratch(rows, rows, dtype=torch.float64)
    drift, response = scratch(all_slabs, rows, m), scratch(rows, m)
    _products[(triton.cdiv(columns, 4), rows)](
        products, memory, seen, step, c.x, c.eta, gate, tokens, columns, capacity, n, seed, BC=4, BK=512, num_warps=8
    )
    _invert[(1,)](inverse, products, gate, tokens, rows, c.eps, RP=padded, num_warps={16: 2, 32: 4, 64: 8}[padded])
    _drift[(triton.cdiv(m, blocks["BM"]), all_slabs)](
        drift, weight, c.anchor, memory, seen, step, products, c.delta, gate, momentum, tokens, rows, capacity, m, n,
        columns, slabs, seed, carry, gain, RP=padded, **blocks,
    )  # fmt: skip
    _project[(triton.cdiv(m, 32),)](
        response, inverse, drift, gate, rows, all_slabs, m, c.beta, RP=padded, BM=32, num_warps=1 if padded == 16 else 4
    )
    return response
