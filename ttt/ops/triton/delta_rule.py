"""The gated delta rule: chunks of 16 tokens, and one token        q, k: T x H x K, v: T x H x V, S: H x K x V

A program holds a block of columns of one head's S in registers, and goes through the text. In each chunk it inverts the
triangular system I + A by rows, which is stable for all step sizes (powers of A would cancel each other).
`ttt.ops.sequence.delta_rule` has the formulas.

Products with S and with the errors have float32 operands, in three passes of tf32 on tensor cores: S must not lose what
it learns to rounding. Those of q and k with each other are exact in one pass for 16-bit inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MOST_KEYS = 256
CHUNK = 16

# e^-80 is zero beside anything that is kept. Differences of sums of lower logarithms would be imprecise, or NaN.
LOWEST = tl.constexpr(-80.0)


@triton.jit
def _inverse(a, C: tl.constexpr):
    """(I + a)^-1 for a strictly lower triangular ``a`` (C x C)."""
    row = tl.arange(0, C)
    found = -a
    for i in range(1, C):
        now = tl.sum(tl.where(row[:, None] == i, found, 0.0), 0)
        now += tl.sum(now[:, None] * found, 0)
        found = tl.where(row[:, None] == i, now[None, :], found)
    return found + tl.where(row[:, None] == row[None, :], 1.0, 0.0)


@triton.jit(do_not_specialize=["tokens", "heads", "scale"])
def _delta_chunks(
    out, last, q, k, v, beta, gate, first, begins, tokens, heads, keys, values, scale,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BV columns of the outputs and of the last state of one head of one sequence."""
    sequence = tl.program_id(1).to(tl.int64) // heads
    head = tl.program_id(1).to(tl.int64) % heads
    i = tl.arange(0, BK).to(tl.int64)
    j = tl.program_id(0).to(tl.int64) * BV + tl.arange(0, BV)
    c = tl.arange(0, C)
    inside = (i < keys)[:, None] & (j < values)[None, :]
    at_state = (sequence * heads + head) * keys * values + i[:, None] * values + j[None, :]
    state = tl.zeros((BK, BV), tl.float32)
    if first is not None:
        state = tl.load(first + at_state, mask=inside, other=0)
    if begins is None:
        begin = sequence * tokens
        end = begin + tokens
    else:
        begin = tl.load(begins + sequence)
        end = tl.load(begins + sequence + 1)
    for at in range(begin, end, C):
        t = at + c.to(tl.int64)
        row = t * heads + head
        here = t < end
        of_keys = here[:, None] & (i < keys)[None, :]
        of_values = here[:, None] & (j < values)[None, :]
        kt = tl.load(k + row[:, None] * keys + i[None, :], mask=of_keys, other=0).to(tl.float32)
        b = tl.load(beta + row, mask=here, other=0)
        total = tl.zeros((C,), tl.float32)
        if gate is not None:
            total = tl.cumsum(tl.maximum(tl.load(gate + row, mask=here, other=0), LOWEST), 0)
        ratio = tl.exp(tl.where(c[:, None] >= c[None, :], total[:, None] - total[None, :], -float("inf")))
        system = tl.dot(kt, tl.trans(kt), input_precision=PRECISION) * ratio * b[:, None]
        inverse = _inverse(tl.where(c[:, None] > c[None, :], system, 0.0), C)
        grown = tl.exp(total)
        vt = tl.load(v + row[:, None] * values + j[None, :], mask=of_values, other=0).to(tl.float32)
        error = b[:, None] * (vt - grown[:, None] * tl.dot(kt, state, input_precision="tf32x3"))
        error = tl.dot(inverse, error, input_precision="tf32x3")
        qt = tl.load(q + row[:, None] * keys + i[None, :], mask=of_keys, other=0).to(tl.float32)
        seen = tl.dot(qt, tl.trans(kt), input_precision=PRECISION) * ratio
        o = grown[:, None] * tl.dot(qt, state, input_precision="tf32x3")
        o += tl.dot(seen, error, input_precision="tf32x3")
        tl.store(out + row[:, None] * values + j[None, :], (scale * o).to(out.dtype.element_ty), mask=of_values)
        whole = tl.sum(tl.where(c == C - 1, total, 0.0), 0)
        left = kt * tl.exp(whole - total)[:, None]
        state = tl.exp(whole) * state + tl.dot(tl.trans(left), error, input_precision="tf32x3")
    tl.store(last + at_state, state, mask=inside)


@triton.jit(do_not_specialize=["scale"])
def _delta_token(
    out, state, q, k, v, beta, gate, keys, values, scale, BK: tl.constexpr, BV: tl.constexpr
):  # fmt: skip
    """One token of BV columns of one head: the state is read and written once."""
    row = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, BK).to(tl.int64)
    j = tl.program_id(0).to(tl.int64) * BV + tl.arange(0, BV)
    inside = (i < keys)[:, None] & (j < values)[None, :]
    at_state = row * keys * values + i[:, None] * values + j[None, :]
    s = tl.load(state + at_state, mask=inside, other=0)
    qt = tl.load(q + row * keys + i, mask=i < keys, other=0).to(tl.float32)
    kt = tl.load(k + row * keys + i, mask=i < keys, other=0).to(tl.float32)
    vt = tl.load(v + row * values + j, mask=j < values, other=0).to(tl.float32)
    if gate is not None:
        s *= tl.exp(tl.load(gate + row))
    error = tl.load(beta + row) * (vt - tl.sum(kt[:, None] * s, 0))
    s += kt[:, None] * error[None, :]
    tl.store(state + at_state, s, mask=inside)
    o = scale * tl.sum(qt[:, None] * s, 0)
    tl.store(out + row * values + j, o.to(out.dtype.element_ty), mask=j < values)


def _blocks(keys: int, values: int) -> tuple[int, int]:
    """(BK, BV): the state's block has at most 4096 numbers, 32 for each thread of 4 warps."""
    most = max(16, triton.next_power_of_2(keys))
    return most, max(16, min(32, 4096 // most, triton.next_power_of_2(values)))


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    gate: torch.Tensor | None,
    state: torch.Tensor | None,
    begins: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, tokens, heads, keys = q.shape
    values, rows = v.shape[-1], batch if begins is None else begins.numel() - 1
    out = torch.empty_like(v)
    last = torch.empty(rows, heads, keys, values, dtype=torch.float32, device=q.device)
    block_k, block_v = _blocks(keys, values)
    if rows * heads and values:
        _delta_chunks[triton.cdiv(values, block_v), rows * heads](
            out, last, q, k, v, beta, gate, state, begins, tokens, heads, keys, values, scale,
            C=CHUNK, BK=block_k, BV=block_v, PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32", num_warps=4,
        )  # fmt: skip
    return out, last


def delta_rule_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    gate: torch.Tensor | None,
    state: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    batch, heads, keys = q.shape
    values = v.shape[-1]
    out = torch.empty_like(v)
    block_k, block_v = _blocks(keys, values)
    if batch * heads and values:
        _delta_token[triton.cdiv(values, block_v), batch * heads](
            out, state, q, k, v, beta, gate, keys, values, scale, BK=block_k, BV=block_v, num_warps=4
        )
    return out
