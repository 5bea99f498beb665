"""Commit a window if it is full, and append new rows to it: the learning step of a layer that counts on the device.

    if full:  W, F <- commit of the window's first ``held`` rows;  tokens += held;  held = 0;  eta = 0
    rows held ... held + B - 1 of the window <- x, delta, eta, trace_delta;  held += B;  full = no room for B more

This is `commit` followed by `append`, with the same bits. In a CUDA graph every step launches both, although only one
step in C / B has a full window, and a commit of many programs that find nothing to do takes longer than the append. So
there are only as many programs as fit the GPU at once, and each writes its share of the tiles of W and F.

Few new rows are written by the same launch. No program waits for another one: each takes a ticket when it has read what
it needs, and the program with the last ticket writes what all of them read, which are the counters, and the new rows
where the window was full. For more rows than one program writes quickly, the append is a launch of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ttt.ops.arguments import WindowStepArguments
from ttt.ops.triton import common
from ttt.ops.triton.append import count_rows, load_row, store_row, take_ticket, window_append
from ttt.ops.triton.commit import FEW_TOKENS, blocks_of, commit_tile, launch_arguments
from ttt.ops.triton.common import GATED, begin, multiprocessors, overlapping

PART = 1024
"""Columns of a new row that a program writes at a time."""

MOST_PARTS = 4
"""The most parts of new rows that this launch writes: the program with the last ticket takes about 2 us for each."""

FITTING = {128: 4, 168: 3}
"""Programs of 4 warps that fit a multiprocessor at once, by the largest number of registers for a thread."""


def _most_registers(dtype: torch.dtype, state: set[torch.dtype], momentum: bool, blocks: dict) -> int | None:
    """The limit for the registers of a thread; None where the assembler may take what it wants.

    Left alone, it takes 164 to 203 for the loop over tiles, and fewer programs fit. GPUs before compute capability 9.0
    need more: their tensor cores take the operands from registers.
    """
    if dtype != torch.bfloat16 or momentum or torch.float32 in state or common.capability() < (9, 0):
        return blocks.get("maxnreg")
    return 128 if blocks["BT"] == 16 and torch.uint8 not in state else 168


@triton.jit(do_not_specialize=["committed", "every", "groups", "added", "window", "seed"], **GATED)
def _window_step(
    weight, anchor, importance, trace, win_x, win_delta, win_trace, win_eta, momentum, step,
    x, delta, trace_delta, eta, counters, tokens, gate, win_weight, row_weight,
    committed, every, groups, added, window, m, n, width, seed: tl.int64, lam, decay, keep, log2_gamma,
    carry, gain, remember, share,
    KIND: tl.constexpr, SAMPLED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    G_AS: tl.constexpr, S_AS: tl.constexpr, AHEAD: tl.constexpr, BJ: tl.constexpr, BC: tl.constexpr,
    APPENDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Commit the window if it is full, and append the new rows if ``APPENDS``; else `_append` is to do so."""
    begin(PDL)
    program, programs = tl.program_id(0), tl.num_programs(0)
    across = tl.cdiv(tl.maximum(m, n), BJ)
    if APPENDS:
        # What an append needs is asked for together with the counters, which decide whether it is one.
        row = load_row(x, delta, trace_delta, program // across, program % across, added, m, n, BJ)
    held, full = tl.load(counters), tl.load(counters + 1) != 0
    if gate is not None:
        if tl.load(gate) == 0:
            return
    first = tl.where(full, 0, held)
    if win_weight is not None:
        if program == 0:
            for b0 in range(0, added, BC):
                b = b0 + tl.arange(0, BC).to(tl.int64)
                fits = (b < added) & (first + b >= 0) & (first + b < window)
                tl.store(win_weight + first + b, tl.load(row_weight + b, mask=fits, other=0), mask=fits)
    if full:
        columns = tl.cdiv(n, BN)
        for tile in range(program, tl.cdiv(m, BM) * columns, programs):
            i0, j0 = (tile // columns).to(tl.int64) * BM, (tile % columns).to(tl.int64) * BN
            commit_tile(
                weight, anchor, importance, trace, win_x, win_delta, win_trace, win_eta, None, None, None, step,
                momentum, i0, j0, committed, every, groups, 0, 0, m, n, width, seed, lam, decay, keep, log2_gamma,
                carry, gain, remember, share, KIND, SAMPLED, BM, BN, BT, G_AS, S_AS, AHEAD,
            )  # fmt: skip
    elif APPENDS:  # there are at least as many programs as parts
        store_row(win_x, win_delta, win_trace, row, first, program // across, program % across, added, window, m, n, BJ)
    if APPENDS or full:
        if take_ticket(counters) == programs - 1:
            if full:
                tl.store(step, tl.load(step) + 1)
            if APPENDS:
                if full:
                    for block in range(0, added * across):
                        b, at = block // across, block % across
                        row = load_row(x, delta, trace_delta, b, at, added, m, n, BJ)
                        store_row(win_x, win_delta, win_trace, row, first, b, at, added, window, m, n, BJ)
                count_rows(win_eta, eta, counters, tokens, held, full, first, added, window, BC)
            else:
                tl.store(counters + 2, 0)


def window_step(a: WindowStepArguments) -> None:
    """Launch the kernel of ``torch.ops.ttt.window_step``, if there is no reason against it; see `why_not`."""
    c = a.commit
    (m, n), blocks = c.weight.shape, blocks_of(c)
    (weight, anchor, importance, trace, *_), (*_, momentum), shared = launch_arguments(c, None)
    committed = shared.pop("tokens")
    del shared["rows"], shared["capacity"]
    state = {t.dtype for t in (importance, trace) if t is not None}
    registers = _most_registers(a.weight.dtype, state, momentum is not None, blocks)
    if registers is not None:  # which ROCm has no option for
        blocks = {**blocks, "maxnreg": registers}
    added = a.x.shape[0]
    parts = added * triton.cdiv(max(m, n), PART)
    appends = parts <= MOST_PARTS
    tiles = triton.cdiv(m, blocks["BM"]) * triton.cdiv(n, blocks["BN"])
    programs = min(tiles, FITTING.get(registers, 2) * multiprocessors())
    if appends:
        programs = max(programs, parts)  # each writes one part
    _window_step[(programs,)](
        weight, anchor, importance, trace, a.win_x, a.win_delta, a.win_trace, a.win_eta, momentum, a.step,
        a.x, a.delta, a.delta if a.trace_delta is None and a.win_trace is not None else a.trace_delta, a.eta,
        a.counters, a.tokens, a.gate, a.win_weight, a.row_weight, committed, added=added,
        window=a.win_eta.numel(), BJ=PART, BC=128, APPENDS=appends, **shared, **blocks, **overlapping(),
    )  # fmt: skip
    if not appends:
        window_append(*a.append)


def why_not(a: WindowStepArguments) -> str:
    """Why one launch cannot do the step; empty if it can."""
    if a.replay_rows:
        return "replay rows are drawn before the commit"
    if not 0 < a.held <= FEW_TOKENS:
        return f"the window holds {a.held} rows, and one launch commits 1 to {FEW_TOKENS}"
    return "" if a.weight.numel() and a.x.shape[0] else "the layer or the step is empty"
