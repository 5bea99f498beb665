"""Write T tokens into W (m x n) and the trace F, correcting for R replay rows.

With d = W - W*, X: T x n, D and P: T x m, X_r: R x n drawn from the memory, U: R x m from `replay`:

    G = D^T diag(eta) X + U^T X_r              m x n     computed tile by tile, never stored
    S = (P*P)^T diag(c gamma^age) (X*X), |P|^T diag(c gamma^age) |X| or P^T diag(c) X, by kind
    W <- W - (G + a d) / (1 + a)               a = (sum eta) (lam Omega + decay); `update` does it
    F <- gamma^T F + S                         for SI with S * (W_old - W_new)

With a momentum M the tokens' part of G becomes carry M + gain G before U^T X_r is added, and M <- remember M + share G.
S sums over all tokens with c = 1, or over one token of each `trace_every`, with c the size of its group. For up to
FEW_TOKENS tokens `_commit` computes the products of a tile and writes it in one pass over W, W*, Omega and F, by which
it is bound. For more tokens `panels` uses torch's matmul. Nothing here waits for the host, and all of it can be
captured into a CUDA graph. If ``gate`` holds 0, every kernel returns at once.

Precision: sums are in float32. The operands of `_commit`'s products are float32 for float32 weights, and split into
three tf32 products for float16. For bfloat16 the left factor of G is split into two bfloat16 numbers (relative error
2^-17; the right factor is exact), and the factors of S are rounded to bfloat16 once, after the square and the decay.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ttt.ops import log8
from ttt.ops.arguments import CommitArguments
from ttt.ops.gate import advance
from ttt.ops.momentum import coefficients
from ttt.ops.triton import panels, replay
from ttt.ops.triton.common import GATED, INTERPRETED, begin, choose_token, overlapping, signed
from ttt.ops.triton.update import in_order, load_state, outer, pass_momentum, replayed, squares, update


@triton.jit
def _load_tokens(x, delta, trace_delta, eta, t0, i0, j0, i, j, b, tokens, m, n, row, column, TRACED: tl.constexpr):
    """x, delta, the gradient of the trace (or delta) and eta of the tokens from t0 on, for the rows of a tile."""
    token = b < tokens - t0
    d_at, x_at = tl.cast(t0, tl.int64) * m + i0 + (b * m + i), tl.cast(t0, tl.int64) * n + j0 + (b * n + j)
    xt = tl.load(x + x_at, mask=token & column, other=0)
    d = tl.load(delta + d_at, mask=token & row, other=0)
    p = d
    if TRACED and trace_delta is not None:
        p = tl.load(trace_delta + d_at, mask=token & row, other=0)
    return xt, d, p, tl.load(eta + t0 + b, mask=token, other=0)


@triton.jit
def commit_tile(
    weight, anchor, importance, trace, x, delta, trace_delta, eta, response, memory, seen, step, momentum,
    i0, j0, tokens, every, groups, rows, capacity, m, n, width, seed, lam, decay, keep, log2_gamma,
    carry, gain, remember, share,
    KIND: tl.constexpr, SAMPLED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    G_AS: tl.constexpr, S_AS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Write the BM x BN tile of W and F that begins at (i0, j0). Arguments that are not needed are None."""
    # 64-bit offsets for the tile, 32-bit ones within it: half the registers.
    i, j, b = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BT)[:, None]
    row, column = i < m - i0, j < n - j0
    # The tile's state is loaded first, so that it arrives from memory during the products.
    at, inside = (i0 * n + j0) + (i[:, None] * n + j), row[:, None] & column
    old = tl.load(weight + at, mask=inside, other=0)
    origin, omega, before, velocity = None, None, None, None
    if anchor is not None:
        origin = tl.load(anchor + at, mask=inside, other=0)
    if importance is not None:
        omega = load_state(importance, i0, j0, i, j, n, width, inside)
    if trace is not None:
        before = load_state(trace, i0, j0, i, j, n, width, inside)
    if momentum is not None:
        velocity = tl.load(momentum + at, mask=inside, other=0)

    TRACED: tl.constexpr = trace is not None and not SAMPLED
    g = tl.zeros((BM, BN), tl.float32)
    s = tl.zeros((BM, BN), tl.float32)
    total = 0.0
    if AHEAD:
        xt, d, p, e = _load_tokens(x, delta, trace_delta, eta, 0, i0, j0, i, j, b, tokens, m, n, row, column, TRACED)
    for t0 in range(0, tokens, BT):
        if AHEAD:  # the next tokens arrive during the products of these
            following = _load_tokens(
                x, delta, trace_delta, eta, t0 + BT, i0, j0, i, j, b, tokens, m, n, row, column, TRACED
            )
        else:
            xt, d, p, e = _load_tokens(
                x, delta, trace_delta, eta, t0, i0, j0, i, j, b, tokens, m, n, row, column, TRACED
            )
        total += tl.sum(e)
        g = outer(d.to(tl.float32) * e, xt, g, G_AS)
        if TRACED:
            # The exponent of a row past the end is positive, and 0 times infinity is not 0.
            left, right = squares(p, xt, tl.maximum(tokens - 1 - t0 - b, 0), None, log2_gamma, KIND, SAMPLED)
            s = outer(left, right, s, S_AS)
        if AHEAD:
            xt, d, p, e = following
    if trace is not None and SAMPLED:
        for k0 in range(0, groups, BT):
            chosen, size = choose_token(k0 + b, tokens, every, step, seed)
            group = b < groups - k0
            q = tl.load(x + (chosen * n + j0) + j, mask=group & column, other=0)
            p_at = (chosen * m + i0) + i
            p = tl.load((delta if trace_delta is None else trace_delta) + p_at, mask=group & row, other=0)
            age = tl.where(group, tokens - 1 - chosen, 0)
            left, right = squares(p, q, age, size.to(tl.float32), log2_gamma, KIND, SAMPLED)
            s = outer(left, right, s, S_AS)
    if momentum is not None:
        g = pass_momentum(
            in_order(g), velocity, momentum, step, seed, carry, gain, remember, share, i0, j0, i, j, m, n, BM, BN
        )
        if response is not None:
            u_x = tl.zeros((BM, BN), tl.float32)
            g += in_order(
                replayed(response, memory, seen, step, u_x, rows, capacity, i0, j0, i, j, m, n, seed, 16, G_AS)
            )
    else:
        if response is not None:
            g = replayed(response, memory, seen, step, g, rows, capacity, i0, j0, i, j, m, n, seed, 16, G_AS)
        g = in_order(g)
    if decay is not None:
        decay *= total
    update(
        g, in_order(s), old, origin, omega, before, weight, importance, trace, step, seed, lam * total, decay, keep,
        i0, j0, i, j, m, n, width, KIND, BM, BN,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "every", "groups", "rows", "capacity", "seed"], **GATED)
def _commit(
    weight, anchor, importance, trace, x, delta, trace_delta, eta, response, memory, seen, step, gate,
    momentum, tokens, every, groups, rows, capacity, m, n, width, seed: tl.int64, lam, decay, keep, log2_gamma,
    carry, gain, remember, share,
    KIND: tl.constexpr, SAMPLED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    G_AS: tl.constexpr, S_AS: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write one tile in each program."""
    begin(PDL)
    if gate is not None:
        if tl.load(gate) == 0:
            return
    i0, j0 = tl.program_id(1).to(tl.int64) * BM, tl.program_id(0).to(tl.int64) * BN
    commit_tile(
        weight, anchor, importance, trace, x, delta, trace_delta, eta, response, memory, seen, step, momentum,
        i0, j0, tokens, every, groups, rows, capacity, m, n, width, seed, lam, decay, keep, log2_gamma,
        carry, gain, remember, share, KIND, SAMPLED, BM, BN, BT, G_AS, S_AS, AHEAD,
    )  # fmt: skip


_BLOCKS = {  # by the weight's dtype
    # 64 x 32 with 4 warps fits into 128 registers on sm_90, so that four programs share a multiprocessor and one waits
    # for memory while another computes; every other tile that was measured on an H200 takes longer. On sm_80 8-bit
    # state takes 205 registers, and spills if limited to 128.
    torch.bfloat16: {
        "BM": 64, "BN": 32, "BT": 16, "AHEAD": True, "G_AS": "bf16x2", "S_AS": "bf16", "num_warps": 4, "num_stages": 1,
    },
    # Without a limit, the assembler aims at 168 and 128 registers in one variant of each, and spills a little.
    torch.float16: {
        "BM": 64, "BN": 32, "BT": 16, "AHEAD": False, "G_AS": "tf32x3", "S_AS": "tf32x3", "num_warps": 4,
        "num_stages": 1,
        "maxnreg": 255,
    },
    torch.float32: {
        "BM": 64, "BN": 32, "BT": 16, "AHEAD": False, "G_AS": "ieee", "S_AS": "ieee", "num_warps": 4, "num_stages": 1,
        "maxnreg": 255,
    },
}  # fmt: skip

_PACKED: dict = {"BM": 32, "BN": 64}
"""For 8-bit state, of which a row of a wider tile has longer stretches (measured on an H200: 100 us instead of 157)."""

FEW_TOKENS = 128


def launch_arguments(c: CommitArguments, response: torch.Tensor | None) -> tuple[tuple, tuple, dict]:
    """What a launch that commits ``c`` takes: the tensors of `_commit`, in two parts, and other arguments by name."""
    (m, n), tokens = c.weight.shape, c.eta.numel()
    momentum = c.momentum if tokens else None
    remember, share, carry, gain = coefficients(c.mu, tokens) if momentum is not None else [None] * 4
    every = min(c.trace_every, max(tokens, 1))
    tensors = (
        c.weight,
        c.anchor if c.lam > 0 or c.decay > 0 else None,
        c.importance if c.lam > 0 else None,
        c.trace if tokens else None,
        *(c.x, c.delta, c.trace_delta, c.eta),
    )
    memory, seen = (c.memory, c.seen) if c.replay_rows else (None, None)
    shared = {
        "tokens": tokens, "every": every, "groups": triton.cdiv(tokens, every), "rows": c.replay_rows,
        "capacity": c.memory.shape[0] if c.replay_rows else 0, "m": m, "n": n, "width": log8.width(n),
        "seed": signed(c.seed), "lam": c.lam, "decay": c.decay if c.decay > 0 else None, "keep": c.gamma**tokens,
        "log2_gamma": None if c.gamma == 1 else math.log2(c.gamma), "carry": carry, "gain": gain,
        "remember": remember, "share": share, "KIND": c.kind, "SAMPLED": every > 1,
    }  # fmt: skip
    return tensors, (response, memory, seen, c.step, c.gate, momentum), shared


def blocks_of(c: CommitArguments) -> dict:
    """The block sizes and options of a launch that commits ``c`` tile by tile."""
    dtype, blocks = c.weight.dtype, _BLOCKS[c.weight.dtype]
    if dtype == torch.bfloat16 and any(log8.is_packed(t) for t in (c.importance, c.trace)):
        blocks = {**blocks, **_PACKED}
    elif dtype == torch.bfloat16 and c.eta.numel() > blocks["BT"]:
        blocks = {**blocks, "BT": 32}
    if INTERPRETED and dtype == torch.bfloat16:
        blocks = {**blocks, "G_AS": "ieee", "S_AS": "ieee"}
    return blocks


def commit(*args) -> None:
    """Launch the kernels of `ttt.ops.commit`."""
    c = CommitArguments(*args)
    (m, n), tokens = c.weight.shape, c.eta.numel()
    if m and n:
        response = replay.respond(c) if c.replay_rows else None
        tensors, rows, shared = launch_arguments(c, response)
        if tokens > FEW_TOKENS:
            panels.commit(*tensors, *rows, **shared)
        else:
            blocks = blocks_of(c)
            grid = (triton.cdiv(n, blocks["BN"]), triton.cdiv(m, blocks["BM"]))
            _commit[grid](*tensors, *rows, **shared, **blocks, **overlapping())
    advance(c.step, 1, c.gate)
