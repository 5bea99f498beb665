"""Rows p ... p + B - 1 of the window <- x, delta, eta, trace_delta          x: B x n, delta: B x m, eta: B

p is an argument, or ``counters`` = (p, full, ticket) on the device. With counters, a full window, which has been
committed, is emptied first: tokens += p, eta = 0, p = 0. Afterwards p += B and full = (p + B > C). All programs read
the counters. The program that takes the last ticket writes them, since all others have read them by then.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ttt.ops.triton.common import GATED, begin, overlapping


@triton.jit
def load_row(x, delta, trace_delta, b, block, rows, m, n, BN: tl.constexpr):
    """BN columns of x, delta and trace_delta, from ``block`` BN on, of new row ``b``."""
    j = tl.cast(block, tl.int64) * BN + tl.arange(0, BN)
    b = tl.cast(b, tl.int64)
    in_x, in_delta = j < tl.where(b < rows, n, 0), j < tl.where(b < rows, m, 0)
    of_delta = tl.load(delta + b * m + j, mask=in_delta, other=0)
    p = of_delta
    if trace_delta is not None:
        p = tl.load(trace_delta + b * m + j, mask=in_delta, other=0)
    return tl.load(x + b * n + j, mask=in_x, other=0), of_delta, p


@triton.jit
def store_row(win_x, win_delta, win_trace, row, first, b, block, rows, window, m, n, BN: tl.constexpr):
    """Write what `load_row` loaded to the window, whose row ``first`` is that of the first new row, if it fits."""
    j = tl.cast(block, tl.int64) * BN + tl.arange(0, BN)
    of_x, of_delta, p = row
    slot = first + b
    fits = (slot >= 0) & (slot < window) & (b < rows)
    in_x, in_delta = j < tl.where(fits, n, 0), j < tl.where(fits, m, 0)
    tl.store(win_x + slot * n + j, of_x, mask=in_x)
    tl.store(win_delta + slot * m + j, of_delta, mask=in_delta)
    if win_trace is not None:
        tl.store(win_trace + slot * m + j, p, mask=in_delta)


@triton.jit
def take_ticket(counters):
    """The number of programs that have taken a ticket before this one.

    All threads must have used what they loaded, not only have asked for it: the tickets order no loads and stores.
    """
    tl.debug_barrier()
    return tl.atomic_add(counters + 2, 1, sem="relaxed")


@triton.jit
def count_rows(win_eta, eta, counters, tokens, held, full, first, rows, window, BC: tl.constexpr):
    """Write the window's eta and the counters, after all programs have read them."""
    for c0 in range(0, window, BC):
        c = c0 + tl.arange(0, BC).to(tl.int64)
        new = (c >= first) & (c < first + rows)
        value = tl.load(eta + (c - first), mask=new, other=0)
        # Rows before the new ones keep their eta, and all do if the count is negative. Rows after the new ones get 0,
        # which means empty.
        tl.store(win_eta + c, value, mask=(c < window) & (c >= tl.where(first < 0, window, first)))
    if tokens is not None:
        if full:
            tl.store(tokens, tl.load(tokens) + held)
    tl.store(counters, tl.minimum(first + rows, window))
    tl.store(counters + 1, (first + 2 * rows > window).to(tl.int64))
    tl.store(counters + 2, 0)


@triton.jit(do_not_specialize=["at", "rows", "window"], **GATED)
def _append(
    win_x, win_delta, win_eta, win_trace, x, delta, eta, trace_delta, counters, tokens, gate,
    at, rows, window, m, n, BN: tl.constexpr, BC: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write one row, BN columns of it in each program."""
    begin(PDL)
    b = tl.program_id(0).to(tl.int64)  # along the first axis, the only one that may have more than 65,535 programs
    opened = True
    if gate is not None:
        opened = tl.load(gate) != 0
    if opened:
        first, held, full = tl.cast(at, tl.int64), tl.cast(at, tl.int64), False
        if counters is not None:
            held = tl.load(counters)
            full = tl.load(counters + 1) != 0
            first = tl.where(full, 0, held)
        block = tl.program_id(1)
        row = load_row(x, delta, trace_delta, b, block, rows, m, n, BN)
        store_row(win_x, win_delta, win_trace, row, first, b, block, rows, window, m, n, BN)
        if counters is None:
            if tl.program_id(1) == 0:
                tl.store(win_eta + first + b, tl.load(eta + b))
        else:
            if take_ticket(counters) == tl.num_programs(0) * tl.num_programs(1) - 1:
                count_rows(win_eta, eta, counters, tokens, held, full, first, rows, window, BC)


def window_append(
    win_x: torch.Tensor,
    win_delta: torch.Tensor,
    win_eta: torch.Tensor,
    win_trace: torch.Tensor | None,
    x: torch.Tensor,
    delta: torch.Tensor,
    eta: torch.Tensor,
    trace_delta: torch.Tensor | None,
    at: int = 0,
    counters: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
) -> None:
    rows, n, m, window = x.shape[0], win_x.shape[1], win_delta.shape[1], win_eta.shape[0]
    if rows:
        grid = (rows, max(1, triton.cdiv(max(m, n), 1024)))
        _append[grid](
            win_x, win_delta, win_eta, win_trace, x, delta, eta,
            delta if trace_delta is None and win_trace is not None else trace_delta, counters, tokens, gate,
            at, rows, window, m, n, BN=1024, BC=128, num_warps=4, **overlapping(),
        )  # fmt: skip
