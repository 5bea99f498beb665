"""The commit of many tokens: torch's matmul computes panels of columns of G and S, which are used while in the cache.

    left = eta D, left_s = P*P c gamma^age, right_s = X*X      `_factors`: T x (m + n) numbers, by kind
    G, S = left^T X[:, j], left_s^T right_s[:, j]              torch.mm, float32, for the columns j of one panel
    W, F <- `update` of G + U^T X_r and S                      `_finish`, the same code as the fused kernel's

Both panels together take at most PANEL_BYTES, about the size of the second-level cache of an H200, so that nothing of
size m x n is allocated for large layers. With bfloat16 weights the factors are rounded to bfloat16 once, and products
and sums are float32; with other dtypes the factors are float32 and torch.mm follows torch.backends.cuda.matmul. With a
closed gate the products are computed from uninitialised factors, and `_finish` writes nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ttt.ops.triton.common import GATED, INTERPRETED, choose_token, product
from ttt.ops.triton.update import in_order, load_state, pass_momentum, replayed, squares, update

PANEL_BYTES = 64 << 20


@triton.jit(do_not_specialize=["tokens", "every", "groups", "seed"], **GATED)
def _factors(
    left, left_s, right_s, x, delta, trace_delta, eta, step, gate,
    tokens, every, groups, m, n, seed: tl.int64, log2_gamma,
    KIND: tl.constexpr, SAMPLED: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """Write left, and left_s and right_s if there is a trace, for BT tokens and BJ columns of D or of X."""
    if gate is not None:
        if tl.load(gate) == 0:
            return
    t, block = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)[:, None], tl.program_id(0)
    # Columns of D or of X; the loads of the other are masked out.
    of_m = tl.cdiv(m, BJ)
    j = block * BJ + tl.arange(0, BJ)[None, :]
    jx = j - of_m * BJ
    row, column = j < tl.where(block < of_m, m, 0), jx < tl.where(block < of_m, -m - BJ, n)
    token = t < tokens
    e = tl.load(eta + t, mask=token, other=0)
    d = tl.load(delta + t * m + j, mask=token & row, other=0).to(tl.float32)
    tl.store(left + t * m + j, (d * e).to(left.dtype.element_ty), mask=token & row)
    if left_s is not None:
        group, chosen, size = t < groups, t, 1.0
        if SAMPLED:
            chosen, size = choose_token(t.to(tl.int32), tokens, every, step, seed)
            size = size.to(tl.float32)
        age = tl.where(group, tokens - 1 - chosen, 0)
        p = tl.load(trace_delta + chosen * m + j, mask=group & row, other=0)
        q = tl.load(x + chosen * n + jx, mask=group & column, other=0)
        p, q = squares(p, q, age, size, log2_gamma, KIND, SAMPLED)
        if block < of_m:
            tl.store(left_s + t * m + j, p.to(left_s.dtype.element_ty), mask=group & (j < m))
        else:
            tl.store(right_s + t * n + jx, q.to(right_s.dtype.element_ty), mask=group & (jx < n))


@triton.jit(do_not_specialize=["rows", "capacity", "seed"], **GATED)
def _finish(
    weight, anchor, importance, trace, g_panel, s_panel, total, response, memory, seen, step, gate, momentum,
    rows, capacity, m, n, width, first, g_stride, s_stride, seed: tl.int64,
    lam, decay, keep, carry, gain, remember, share,
    KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, AS: tl.constexpr,
):  # fmt: skip
    """Write a BM x BN tile of W and F from panels of S and of G without replay, which begin at column ``first``."""
    if gate is not None:
        if tl.load(gate) == 0:
            return
    i0, local = tl.program_id(1).to(tl.int64) * BM, tl.program_id(0).to(tl.int64) * BN
    j0 = local + first
    i, j = tl.arange(0, BM), tl.arange(0, BN)
    at, inside = (i0 * n + j0) + (i[:, None] * n + j), (i < m - i0)[:, None] & (j < n - j0)
    old = tl.load(weight + at, mask=inside, other=0)
    origin, omega, before = None, None, None
    g = tl.load(g_panel + (i0 * g_stride + local) + (i[:, None] * g_stride + j), mask=inside, other=0)
    s = 0.0
    pull = 0.0
    if anchor is not None:
        origin = tl.load(anchor + at, mask=inside, other=0)
    if importance is not None:
        omega = load_state(importance, i0, j0, i, j, n, width, inside)
        pull = lam * tl.load(total)
    if decay is not None:
        decay *= tl.load(total)
    if trace is not None:
        before = load_state(trace, i0, j0, i, j, n, width, inside)
        s = tl.load(s_panel + (i0 * s_stride + local) + (i[:, None] * s_stride + j), mask=inside, other=0)
    if momentum is not None:
        velocity = tl.load(momentum + at, mask=inside, other=0)
        g = pass_momentum(g, velocity, momentum, step, seed, carry, gain, remember, share, i0, j0, i, j, m, n, BM, BN)
    if response is not None:
        u_x = tl.zeros((BM, BN), tl.float32)
        u_x = replayed(response, memory, seen, step, u_x, rows, capacity, i0, j0, i, j, m, n, seed, BR, AS)
        g += in_order(u_x)
    update(
        g, s, old, origin, omega, before, weight, importance, trace, step, seed, pull, decay, keep, i0, j0, i, j, m, n,
        width, KIND, BM, BN,
    )  # fmt: skip


_BLOCKS = {  # _finish, by the weight's dtype
    torch.bfloat16: {"BM": 64, "BN": 32, "BR": 16, "AS": "bf16x2", "num_warps": 4, "num_stages": 1},
    torch.float16: {"BM": 64, "BN": 32, "BR": 16, "AS": "tf32x3", "num_warps": 4, "num_stages": 1},
    torch.float32: {"BM": 64, "BN": 32, "BR": 16, "AS": "ieee", "num_warps": 4, "num_stages": 1},
}


def _factors_of(x, delta, trace_delta, eta, step, gate, dtype, traces, shared):
    """left (T x m), and left_s (groups x m) and right_s (groups x n) if there is a trace."""
    (tokens, n), m, device = x.shape, delta.shape[1], x.device
    groups, sampled = shared["groups"], shared["SAMPLED"]
    stored = torch.float32 if INTERPRETED else dtype  # the interpreter rounds to bfloat16 wrongly
    left = torch.empty((tokens, m), dtype=stored, device=device)
    left_s = right_s = None
    if traces and (sampled or shared["KIND"] != "si"):
        left_s = torch.empty((groups, m), dtype=stored, device=device)
        right_s = torch.empty((groups, n), dtype=stored, device=device)
    columns = triton.cdiv(m, 128) + (0 if left_s is None else triton.cdiv(n, 128))
    _factors[(columns, triton.cdiv(tokens, 32))](
        left, left_s, right_s, x, delta, trace_delta, eta, step, gate,
        tokens, shared["every"], groups, m, n, shared["seed"], shared["log2_gamma"],
        KIND=shared["KIND"], SAMPLED=sampled, BT=32, BJ=128, num_warps=8,
    )  # fmt: skip
    if left_s is None and traces:
        left_s, right_s = trace_delta.to(dtype), x.to(dtype)
    if INTERPRETED:
        left, left_s, right_s = (None if t is None else t.to(dtype) for t in (left, left_s, right_s))
    return left, left_s, right_s


def commit(
    weight, anchor, importance, trace, x, delta, trace_delta, eta, response, memory, seen, step, gate, momentum,
    *, rows, capacity, m, n, width, seed, lam, decay, keep, carry, gain, remember, share, **shared,
) -> None:  # fmt: skip
    dtype = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32
    left, left_s, right_s = _factors_of(
        x, delta, delta if trace_delta is None else trace_delta, eta, step, gate, dtype, trace is not None,
        {**shared, "seed": seed},
    )  # fmt: skip
    right = x.to(dtype)
    total, blocks = eta.sum(), _BLOCKS[weight.dtype]
    if INTERPRETED and weight.dtype == torch.bfloat16:
        blocks = {**blocks, "AS": "ieee"}
    if response is None:
        # Without a limit, the assembler aims at 96 registers and spills a little. With replay rows, whose products are
        # made in the order of `in_order`, other tiles gain nothing.
        blocks = {**blocks, "BM": 32, "BN": 64, "num_warps": 8, "maxnreg": 128}
    span = max(1, PANEL_BYTES // (8 * m * 128)) * 128
    for first in range(0, n, span):
        last = min(first + span, n)
        g = product(left.T, right[:, first:last])
        s = None if left_s is None else product(left_s.T, right_s[:, first:last])
        grid = (triton.cdiv(last - first, blocks["BN"]), triton.cdiv(m, blocks["BM"]))
        _finish[grid](
            weight, anchor, importance, trace, g, s, total, response, memory, seen, step, gate, momentum, rows,
            capacity, m, n, width, first, last - first, 0 if s is None else s.shape[1], seed, lam, decay, keep,
            carry, gain, remember, share, KIND=shared["KIND"], **blocks,
        )  # fmt: skip
        del g, s  # so that the next panel reuses their memory, which is in the cache
