"""The gated delta rule: chunks of 16 tokens, and one token        q, k: T x H x K, v: T x H x V, S: H x K x V

Two kernels read a text. `_delta_chunk` has a program for each chunk of a head: it inverts the triangular system I + A,
by rows, which is stable for all step sizes (powers of A would cancel each other), and makes the products of queries and
keys. `_delta_states` has a program for each block of columns of a head's S, which it holds in registers while it goes
through the chunks. `ttt.ops.sequence.delta_rule` has the formulas.

Products with S and with the errors have float32 operands, in three passes of tf32 on tensor cores: S must not lose what
it learns to rounding. Those of q and k with each other are exact in one pass for 16-bit inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ttt.ops.triton.tokens import bounds, rows

CHUNK = 16
MOST_KEYS = 64  # of a text: the operands of wider products do not fit into registers beside S

# e^-80 is zero beside anything that is kept. Differences of sums of lower logarithms would be imprecise, or NaN.
LOWEST = tl.constexpr(-80.0)


@triton.jit(do_not_specialize=["tokens", "heads", "chunks"])
def _delta_chunk(
    inverse, seen, totals, q, k, beta, gate, begins, tokens, heads, chunks, keys,
    C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(I + A)^-1 diag(beta), the weights of the errors in the outputs, and the sums of gates, of one chunk."""
    chunk = tl.program_id(0).to(tl.int64)
    sequence = tl.program_id(1).to(tl.int64) // heads
    head = tl.program_id(1).to(tl.int64) % heads
    begin, end = bounds(begins, sequence, tokens)
    c = tl.arange(0, C)
    t = begin + chunk * C + c.to(tl.int64)
    here = t < end
    row = t * heads + head
    i = tl.arange(0, BK).to(tl.int64)
    kt = rows(k, row, here, keys, i)
    kk = tl.dot(kt, tl.trans(kt), input_precision=PRECISION)
    qk = tl.dot(rows(q, row, here, keys, i), tl.trans(kt), input_precision=PRECISION)
    b = tl.load(beta + row, mask=here, other=0)
    total = tl.zeros((C,), tl.float32)
    if gate is not None:
        total = tl.cumsum(tl.maximum(tl.load(gate + row, mask=here, other=0), LOWEST), 0)
    ratio = tl.exp(tl.where(c[:, None] >= c[None, :], total[:, None] - total[None, :], -float("inf")))
    found = tl.where(c[:, None] > c[None, :], -kk * ratio * b[:, None], 0.0)
    for i in range(1, C):
        now = tl.sum(tl.where(c[:, None] == i, found, 0.0), 0)
        now += tl.sum(now[:, None] * found, 0)
        found = tl.where(c[:, None] == i, now[None, :], found)
    found += tl.where(c[:, None] == c[None, :], 1.0, 0.0)
    place = (tl.program_id(1).to(tl.int64) * chunks + chunk) * C
    at = (place + c)[:, None] * C + c[None, :]
    tl.store(inverse + at, found * b[None, :])
    tl.store(seen + at, qk * ratio)
    tl.store(totals + place + c, total)


@triton.jit(do_not_specialize=["tokens", "heads", "chunks"])
def _delta_states(
    out, last, inverse, seen, totals, q, k, v, first, begins, tokens, heads, chunks, keys, values, scale: tl.float32,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """BV columns of the outputs and of the last state of one head of one sequence."""
    sequence = tl.program_id(1).to(tl.int64) // heads
    head = tl.program_id(1).to(tl.int64) % heads
    begin, end = bounds(begins, sequence, tokens)
    i = tl.arange(0, BK).to(tl.int64)
    j = tl.program_id(0).to(tl.int64) * BV + tl.arange(0, BV)
    c = tl.arange(0, C)
    inside_state = (i < keys)[:, None] & (j < values)[None, :]
    at_state = (sequence * heads + head) * keys * values + i[:, None] * values + j[None, :]
    state = tl.zeros((BK, BV), tl.float32)
    if first is not None:
        state = tl.load(first + at_state, mask=inside_state, other=0)
    place = tl.program_id(1).to(tl.int64) * chunks * C
    for at in range(begin, end, C):
        t = at + c.to(tl.int64)
        here = t < end
        row = t * heads + head
        total = tl.load(totals + place + c)
        grown = tl.exp(total)
        square = (place + c)[:, None] * C + c[None, :]
        match = tl.dot(rows(k, row, here, keys, i), state, input_precision="tf32x3")
        error = rows(v, row, here, values, j) - grown[:, None] * match
        error = tl.dot(tl.load(inverse + square), error, input_precision="tf32x3")
        o = tl.dot(rows(q, row, here, keys, i), state, input_precision="tf32x3")
        o = tl.dot(tl.load(seen + square), error, grown[:, None] * o, input_precision="tf32x3")
        inside = here[:, None] & (j < values)[None, :]
        tl.store(out + row[:, None] * values + j[None, :], (scale * o).to(out.dtype.element_ty), mask=inside)
        whole = tl.sum(tl.where(c == C - 1, total, 0.0), 0)
        error *= tl.exp(whole - total)[:, None]
        left = tl.trans(rows(k, row, here, keys, i))
        state = tl.dot(left, error, tl.exp(whole) * state, input_precision="tf32x3")
        place += C
    tl.store(last + at_state, state, mask=inside_state)


@triton.jit
def _delta_token(
    out, state, q, k, v, beta, gate, keys, values, scale: tl.float32, BK: tl.constexpr, BV: tl.constexpr
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
    values, sequences = v.shape[-1], batch if begins is None else begins.numel() - 1
    out = torch.empty_like(v)
    last = torch.empty(sequences, heads, keys, values, dtype=torch.float32, device=q.device)
    if not sequences * heads * values:
        return out, last
    chunks = triton.cdiv(tokens, CHUNK)  # at most, for a packed sequence
    square = torch.empty(2, sequences * heads, chunks, CHUNK, CHUNK, dtype=torch.float32, device=q.device)
    totals = torch.empty(sequences * heads, chunks, CHUNK, dtype=torch.float32, device=q.device)
    block = max(16, triton.next_power_of_2(keys))
    if chunks:
        _delta_chunk[chunks, sequences * heads](
            square[0], square[1], totals, q, k, beta, gate, begins, tokens, heads, chunks, keys,
            C=CHUNK, BK=block, PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32", num_warps=4,
        )  # fmt: skip
    _delta_states[triton.cdiv(values, 16), sequences * heads](
        out, last, square[0], square[1], totals, q, k, v, state, begins, tokens, heads, chunks, keys, values, scale,
        C=CHUNK, BK=block, BV=16, num_warps=4, num_stages=2, maxnreg=255,
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
    columns = max(16, min(32, triton.next_power_of_2(values)))
    if batch * heads * values:
        _delta_token[triton.cdiv(values, columns), batch * heads](
            out, state, q, k, v, beta, gate, keys, values, scale,
            BK=max(16, triton.next_power_of_2(keys)), BV=columns, num_warps=4,
        )  # fmt: skip
    return out
