"""Write T tokens, checked against R replay rows, into W (m x n) and the trace F.

With d = W - W*, X: T x n, D and P: T x m, X_r: R x n drawn from the memory, A = X_r X_r^T + eps tr/R I::

    E = X_r d^T - ((X_r X^T) * eta) D          R x m     `_products`, then `_drift`
    U = beta A^-1 E                            R x m     `_invert`, then `_project`; or beta (sum eta) E
    G = D^T diag(eta) X + U^T X_r              m x n     never stored: `_commit` makes it tile by tile
    W <- W - (G + a d) / (1 + a)               a = lam (sum eta) Omega
    F <- gamma^T F + S                         S by kind: (P*P)^T diag(gamma^age) (X*X), |P|^T diag(gamma^age) |X|,
                                               or -(P^T X) * (W_new - W_old)

As A^-1 is symmetric, U^T X_r = E^T V with V = beta A^-1 X_r, so the replay rows are R more tokens with
inputs X_r, which bfloat16 holds exactly. An empty memory gives E = 0 on the device: nothing here waits
for the host, and all of it can be captured into a CUDA graph.

Precision: sums in float32, A and its inverse in float64. Operands of the matrix products: float32 exactly
for float32 weights, as three tf32 products for float16. For bfloat16 the left factor of G is split into
two bfloat16 numbers (relative error 2^-17, its right factor is exact), while those of S are rounded to
bfloat16 once, after the square and the decay: S is as accurate as the product of rounded squares.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ttt.ops.triton.common import (
    INTERPRETED,
    draw,
    padded_rows,
    rounded,
    rounding_words,
    signed,
    trace_bits,
    weight_bits,
)


@triton.jit(do_not_specialize=["tokens", "columns", "capacity", "seed"])
def _products(
    out, memory, seen, step, x, eta, tokens, columns, capacity, n, seed, BC: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """out (R x columns): (X_r X^T) * eta beside X_r X_r^T; BC numbers of one row for each program."""
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
        # One of the two is masked out; choosing between the pointers would cost the wide loads.
        other = tl.load(of_x + k, mask=is_x & (k < filled), other=0).to(tl.float64)
        other += tl.load(of_memory + k, mask=is_memory & (k < filled), other=0).to(tl.float64)
        acc += xr * other
    scale = tl.load(eta + c, mask=c < tokens, other=1).to(tl.float64)
    tl.store(out + r.to(tl.int64) * columns + c, scale * tl.sum(acc, axis=1), mask=c < columns)


@triton.jit(do_not_specialize=["tokens", "rows"])
def _invert(inverse, products, tokens, rows, eps, RP: tl.constexpr):
    """inverse = (X_r X_r^T + eps tr/R I)^-1 in one program, by sweeping out one row after the other."""
    r, c = tl.arange(0, RP)[:, None], tl.arange(0, RP)[None, :]
    inside = (r < rows) & (c < rows)
    a = tl.load(products + r * (tokens + rows).to(tl.int64) + tokens + c, mask=inside, other=0)
    ridge = eps * tl.sum(tl.sum(tl.where(r == c, a, 0.0), axis=1)) / rows
    # Rows of zeros only: any ridge will do, as E is zero.
    a += tl.where(r == c, tl.where(ridge > 0, ridge, 1.0), 0.0)
    for k in range(0, rows):
        row = tl.sum(tl.where(r == k, a, 0.0), axis=0)[None, :]
        col = tl.sum(tl.where(c == k, a, 0.0), axis=1)[:, None]
        pivot = 1.0 / tl.sum(tl.sum(tl.where((r == k) & (c == k), a, 0.0), axis=1))
        swept = tl.where(r == k, tl.where(c == k, -pivot, row * pivot), col * pivot)
        a = tl.where((r == k) | (c == k), swept, a - col * row * pivot)
    tl.store(inverse + r * rows + c, -a, mask=inside)


@triton.jit(do_not_specialize=["tokens", "rows", "capacity", "columns", "seed"])
def _drift(
    drift, weight, anchor, memory, seen, step, products, delta, eta,
    tokens, rows, capacity, m, n, columns, seed, strength,
    GRADIENT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """E for BM rows of W and W*; times beta (sum eta) for the gradient step."""
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    r = tl.arange(0, RP)
    index = draw(r, seen, step, capacity, seed)
    live = (r < rows) & (index >= 0)
    acc = tl.zeros((RP, BM), tl.float32)
    for k0 in range(0, n, BK):
        k = k0 + tl.arange(0, BK)
        inside = (i < m)[:, None] & (k < n)
        xr = tl.load(memory + index[:, None] * n + k, mask=live[:, None] & (k < n), other=0).to(tl.float32)
        w = tl.load(weight + i[:, None] * n + k, mask=inside, other=0).to(tl.float32)
        w -= tl.load(anchor + i[:, None] * n + k, mask=inside, other=0).to(tl.float32)
        acc = tl.dot(xr, tl.trans(w), acc, input_precision=PRECISION)
    total = 0.0
    for t0 in range(0, tokens, 16):
        t = t0 + tl.arange(0, 16).to(tl.int64)
        total += tl.sum(tl.load(eta + t, mask=t < tokens, other=0))
        cross = tl.load(products + r[:, None] * columns + t, mask=live[:, None] & (t < tokens), other=0)
        d = tl.load(delta + t[:, None] * m + i, mask=(t < tokens)[:, None] & (i < m), other=0)
        # Unlike the rounding of d above, which all replay rows share, A^-1 would amplify one of the products.
        acc -= tl.dot(
            cross.to(tl.float32), d.to(tl.float32), input_precision="tf32x3" if PRECISION == "tf32" else PRECISION
        )
    if GRADIENT:
        acc *= strength * total
    # Where nothing was drawn a weight that is not finite must not become a replay gradient.
    tl.store(drift + r[:, None] * m + i, tl.where(live[:, None], acc, 0.0), mask=(r < rows)[:, None] & (i < m))


@triton.jit(do_not_specialize=["rows"])
def _project(out, inverse, drift, rows, m, strength, RP: tl.constexpr, BM: tl.constexpr):
    """U = beta A^-1 E in float64: the entries of A^-1 are large and cancel."""
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    r = tl.arange(0, RP)
    acc = tl.zeros((RP, BM), tl.float64)
    for k in range(0, rows):
        column = tl.load(inverse + r * rows + k, mask=r < rows, other=0)
        e = tl.load(drift + tl.cast(k, tl.int64) * m + i, mask=i < m, other=0).to(tl.float64)
        acc += column[:, None] * e[None, :]
    tl.store(out + r[:, None] * m + i, (strength * acc).to(tl.float32), mask=(r < rows)[:, None] & (i < m))


@triton.jit
def _outer(left, right, acc, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + left^T right; left: BT x BM float32, right: BT x BN of the weight's type."""
    if SPLIT:
        high = left.to(tl.bfloat16)
        acc = tl.dot(tl.trans(high), right, acc)
        return tl.dot(tl.trans((left - high.to(tl.float32)).to(tl.bfloat16)), right, acc)
    return tl.dot(tl.trans(left), right.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["tokens", "rows", "capacity", "seed"])
def _commit(
    weight, anchor, importance, trace, x, delta, trace_delta, eta, replay, memory, seen, step,
    tokens, rows, capacity, m, n, seed, lam, keep, log2_gamma,
    KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W and F on a BM x BN tile. None stands for what is not needed: importance, trace, replay (U)."""
    i0, j0 = tl.program_id(1).to(tl.int64) * BM, tl.program_id(0).to(tl.int64) * BN
    # 64-bit offsets for the tile, 32-bit ones within it: half the registers.
    i, j, b = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BT)[:, None]
    row, column = i < m - i0, j < n - j0
    g = tl.zeros((BM, BN), tl.float32)
    s = tl.zeros((BM, BN), tl.float32)
    total = 0.0
    for t0 in range(0, tokens, BT):
        token = b < tokens - t0
        d_at, x_at = tl.cast(t0, tl.int64) * m + i0 + (b * m + i), tl.cast(t0, tl.int64) * n + j0 + (b * n + j)
        xt = tl.load(x + x_at, mask=token & column, other=0)
        d = tl.load(delta + d_at, mask=token & row, other=0).to(tl.float32)
        e = tl.load(eta + t0 + b, mask=token, other=0)
        total += tl.sum(e)
        g = _outer(d * e, xt, g, SPLIT, PRECISION)
        if trace is not None:
            p, q = tl.load(trace_delta + d_at, mask=token & row, other=0), xt
            if KIND != "si":
                p, q = p.to(tl.float32), q.to(tl.float32)
                # The exponent of a row past the end is positive, and 0 times infinity is not 0.
                decay = tl.exp2(tl.maximum(tokens - 1 - t0 - b, 0).to(tl.float32) * log2_gamma)
                p = (p * p if KIND == "fisher" else tl.abs(p)) * decay
                q = q * q if KIND == "fisher" else tl.abs(q)
            if SPLIT:
                s = tl.dot(tl.trans(p.to(tl.bfloat16)), q.to(tl.bfloat16), s)
            else:
                s = tl.dot(tl.trans(p.to(tl.float32)), q.to(tl.float32), s, input_precision=PRECISION)
    if replay is not None:
        for r0 in range(0, rows, BT):
            index = draw(r0 + b, seen, step, capacity, seed)
            live = (b < rows - r0) & (index >= 0)
            xr = tl.load(memory + (index * n + j0) + j, mask=live & column, other=0)
            u = tl.load(replay + tl.cast(r0, tl.int64) * m + i0 + (b * m + i), mask=live & row, other=0)
            g = _outer(u, xr, g, SPLIT, PRECISION)

    inside = row[:, None] & column
    tile, at = i0 * n + j0, i[:, None] * n + j
    old = tl.load(weight + tile + at, mask=inside, other=0).to(tl.float32)
    if importance is not None:
        # The proximal step W* + (W - G - W*) / (1 + a), written so that G = 0 and a = 0 change no bit.
        a = lam * total * tl.load(importance + tile + at, mask=inside, other=0).to(tl.float32)
        g = (g + a * (old - tl.load(anchor + tile + at, mask=inside, other=0).to(tl.float32))) / (1.0 + a)
    words = tl.zeros((BM, BN // 2), tl.uint32)
    if weight.dtype.element_ty != tl.float32 or (trace is not None and trace.dtype.element_ty != tl.float32):
        words = rounding_words(i0 + i, j0 // 8 + tl.arange(0, BN // 8), tl.load(step).to(tl.uint32), seed)
    new = rounded(old - g, weight_bits(words), weight.dtype.element_ty)
    tl.store(weight + tile + at, new, mask=inside)
    if trace is not None:
        if KIND == "si":
            s *= old - new.to(tl.float32)
        f = keep * tl.load(trace + tile + at, mask=inside, other=0).to(tl.float32) + s
        tl.store(trace + tile + at, rounded(f, trace_bits(words), trace.dtype.element_ty), mask=inside)


_BLOCKS = {  # weight's dtype: _commit, _drift
    # 64 x 32 with 4 warps stays below 128 registers, so that four programs share a multiprocessor and one
    # waits for memory while another computes; with bfloat16, 64 x 128 on 8 warps takes 224.
    torch.bfloat16: (
        {"BM": 64, "BN": 32, "BT": 16, "SPLIT": True, "PRECISION": "ieee", "num_warps": 4, "num_stages": 1},
        {"BM": 16, "BK": 64, "PRECISION": "tf32", "num_warps": 4, "num_stages": 4},
    ),
    torch.float16: (
        {"BM": 64, "BN": 32, "BT": 16, "SPLIT": False, "PRECISION": "tf32x3", "num_warps": 4, "num_stages": 1},
        {"BM": 16, "BK": 64, "PRECISION": "tf32", "num_warps": 4, "num_stages": 4},
    ),
    torch.float32: (
        {"BM": 64, "BN": 32, "BT": 16, "SPLIT": False, "PRECISION": "ieee", "num_warps": 4, "num_stages": 1},
        {"BM": 32, "BK": 32, "PRECISION": "ieee", "num_warps": 8, "num_stages": 3},
    ),
}


def commit(
    weight: torch.Tensor,
    anchor: torch.Tensor | None,
    importance: torch.Tensor | None,
    trace: torch.Tensor | None,
    x: torch.Tensor,
    delta: torch.Tensor,
    eta: torch.Tensor,
    trace_delta: torch.Tensor | None,
    memory: torch.Tensor | None,
    seen: torch.Tensor | None,
    step: torch.Tensor,
    seed: int,
    replay_rows: int,
    replay: str,
    beta: float,
    eps: float,
    lam: float,
    gamma: float,
    kind: str,
    trace_every: int = 1,
    trace_fp8: bool = False,
) -> None:
    (m, n), tokens, rows, seed = weight.shape, eta.numel(), replay_rows, signed(seed)
    commit_blocks, drift_blocks = _BLOCKS[weight.dtype]
    if INTERPRETED:
        commit_blocks = {**commit_blocks, "SPLIT": False}
    response, capacity = None, 0
    if m and n and rows:
        capacity = memory.shape[0]
        response = _respond(
            weight, anchor, x, delta, eta, memory, seen, step, seed, rows, replay, beta, eps, drift_blocks
        )
    if m and n:
        grid = (triton.cdiv(n, commit_blocks["BN"]), triton.cdiv(m, commit_blocks["BM"]))
        pulls = lam > 0
        _commit[grid](
            weight, anchor if pulls else None, importance if pulls else None, trace if tokens else None,
            x, delta, delta if trace_delta is None else trace_delta, eta,
            response, memory if rows else None, seen if rows else None, step,
            tokens, rows, capacity, m, n, seed, lam, gamma**tokens, math.log2(gamma), KIND=kind, **commit_blocks,
        )  # fmt: skip
    step.add_(1)


def _respond(weight, anchor, x, delta, eta, memory, seen, step, seed, rows, replay, beta, eps, blocks) -> torch.Tensor:
    """U (R x m), float32."""
    (m, n), tokens, capacity = weight.shape, eta.numel(), memory.shape[0]
    gradient, padded = replay == "gradient", padded_rows(rows)
    columns = tokens if gradient else tokens + rows

    def scratch(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=weight.device)

    products, drift = scratch(rows, columns, dtype=torch.float64), scratch(rows, m)
    if columns:
        _products[(triton.cdiv(columns, 8), rows)](
            products, memory, seen, step, x, eta, tokens, columns, capacity, n, seed, BC=8, BK=256, num_warps=4
        )  # fmt: skip
    grid = (triton.cdiv(m, blocks["BM"]),)
    _drift[grid](
        drift, weight, anchor, memory, seen, step, products, delta, eta, tokens, rows, capacity, m, n, columns, seed,
        beta, GRADIENT=gradient, RP=padded, **blocks,
    )  # fmt: skip
    if gradient:
        return drift
    inverse, response = scratch(rows, rows, dtype=torch.float64), scratch(rows, m)
    _invert[(1,)](inverse, products, tokens, rows, eps, RP=padded, num_warps=4 if padded <= 32 else 8)
    _project[(triton.cdiv(m, 32),)](response, inverse, drift, rows, m, beta, RP=padded, BM=32, num_warps=4)
    return response
