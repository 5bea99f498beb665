"""Rows that enter the window: the Triton kernel (in the interpreter, without a GPU), the CPU op and the reference."""

import pytest
import torch

import ttt
from ttt.ops.triton import append, low_rank
from ttt.ops.triton.append import window_append as by_triton
from ttt.ops.triton.common import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"


def by_op(*args):
    torch.ops.ttt.window_append(*args)


def rows_of(rows, n, m, dtype, traced=True):
    x, delta, p = (torch.randn(rows, k, device=DEVICE).to(dtype) for k in (n, m, m))
    eta = torch.rand(rows, device=DEVICE) + 0.1
    return x, delta, eta, p if traced else None


def window_of(window, n, m, dtype, traced=True):
    """An empty window, whose rows hold NaN."""
    kept = [torch.full((window, k), float("nan"), dtype=dtype, device=DEVICE) for k in (n, m)]
    kept.append(torch.zeros(window, device=DEVICE))
    return [*kept, torch.full_like(kept[1], float("nan")) if traced else None]


def count(*values):
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def same(a, b):
    return a is b or torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("append", [by_triton, by_op])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("window", "rows", "n", "m"), [(1, 1, 1, 1), (16, 5, 33, 7), (12, 3, 127, 1000), (7, 7, 2050, 33), (130, 1, 5, 1)]
)
def test_rows_enter_where_the_counters_say(append, dtype, window, rows, n, m):
    """Compared with lists of rows: a window is emptied if another step would not fit, and `tokens` counts its rows."""
    win, counters, tokens = window_of(window, n, m, dtype), count(0, 0, 0), count(3)
    live, committed = [], 0
    for step in range(2 * (window // rows) + 2 if window < 100 else 133):
        if len(live) + rows > window:
            committed, live = committed + len(live), []
        new = rows_of(rows, n, m, dtype)
        gate = count(step % 3) if rows > 1 else None
        before = [t.clone() for t in (*win, counters, tokens)]
        append(*win, *new, 0, counters, tokens, gate)
        if gate is not None and int(gate) == 0:
            assert all(same(t, old) for t, old in zip((*win, counters, tokens), before, strict=True))
            if len(live) == 0 and committed:  # taken back: the window still is full
                live, committed = [None] * int(before[4][0]), committed - int(before[4][0])
            continue
        live += list(zip(*new, strict=True))
        assert counters.tolist() == [len(live), int(len(live) + rows > window), 0]
        assert int(tokens) == 3 + committed
        assert torch.equal(win[2] != 0, torch.arange(window, device=DEVICE) < len(live))
        for i, row in enumerate(live):
            if row is not None:
                for t, part in zip((win[0], win[1], win[2], win[3]), (row[0], row[1], row[2], row[3]), strict=True):
                    assert torch.equal(t[i], part)


@pytest.mark.parametrize("append", [by_triton, by_op])
@pytest.mark.parametrize("traced", [False, True])
def test_rows_enter_where_the_host_says(append, traced):
    win = window_of(9, 33, 1025, torch.float32, traced)
    x, delta, eta, _ = rows_of(2, 33, 1025, torch.float32)
    append(*win, x, delta, eta, None, 4, None, None, None)
    assert torch.equal(win[2].nonzero().flatten(), torch.tensor([4, 5], device=DEVICE))
    for t, part in ((win[0], x), (win[1], delta), (win[3], delta)):
        if t is not None:
            assert torch.equal(t[4:6], part)
            assert torch.isnan(t[:4]).all()
            assert torch.isnan(t[6:]).all()
    append(*win, x[:0], delta[:0], eta[:0], None, 9, None, None, None)
    before = [None if t is None else t.clone() for t in win]
    append(*win, x, -delta, eta, None, 4, None, None, count(0))
    assert all(same(t, old) for t, old in zip(win, before, strict=True))


def test_rows_that_do_not_fit_are_never_written():
    win, counters = window_of(4, 3, 5, torch.float32), count(3, 0, 0)
    guard = torch.full((6, 3), 5.0, device=DEVICE)
    win[0] = guard[:4]
    by_triton(*win, *rows_of(2, 3, 5, torch.float32), 0, counters, None, None)
    assert bool((guard[4:] == 5).all())
    assert counters.tolist() == [4, 1, 0]


@pytest.mark.skipif(not INTERPRETED, reason="the reference checks what it knows")
def test_refusals_name_the_argument_and_change_nothing():
    win, new = window_of(4, 3, 5, torch.float32), rows_of(2, 3, 5, torch.float32)
    cases = [
        ({"at": 3}, ValueError, r"at must be in \[0, 2\] for 2 rows in a window of 4, got 3"),
        ({"at": -1}, ValueError, "at must be in"),
        ({"counters": count(3, 0, 0)}, ValueError, "3 of 4 rows are in use: 2 more do not fit"),
        ({"counters": count(3, 0)}, ValueError, r"counters must have shape \(3,\), got \(2,\)"),
        ({"tokens": count(3)}, ValueError, "tokens needs counters"),
        ({"gate": torch.ones(1)}, TypeError, "gate must be torch.int64"),
        ({"trace_delta": new[1].double()}, TypeError, "trace_delta must be torch.float32"),
    ]
    before = [t.clone() for t in win]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            ttt.ops.window_append(*win, *new[:3], **options)
    with pytest.raises(ValueError, match="trace_delta needs win_trace"):
        ttt.ops.window_append(*win[:3], None, *new[:3], trace_delta=new[1])
    assert all(same(t, old) for t, old in zip(win, before, strict=True))


@pytest.mark.skipif(not INTERPRETED, reason="once is enough")
def test_opcheck():
    win, new = window_of(4, 3, 5, torch.float32), rows_of(2, 3, 5, torch.float32)
    win = [torch.zeros_like(t) for t in win]
    for tail in ((1,), (0, count(0, 0, 0), count(0), count(1))):
        torch.library.opcheck(torch.ops.ttt.window_append.default, (*win, *new, *tail))


@pytest.mark.parametrize("users", [False, True])
def test_any_number_of_tokens_fits_the_grid(users, monkeypatch):
    """CUDA allows 65,535 programs along every axis but the first."""
    grids, n, m, tokens = [], 2048 + 1, 3, 70_000

    class Recorded:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **options: None

    kernels, name = (low_rank, "_low_rank_append") if users else (append, "_append")
    monkeypatch.setattr(kernels, name, Recorded())
    x, delta, eta, _ = rows_of(tokens, n, m, torch.bfloat16)
    if users:
        monkeypatch.setattr(kernels, "_low_rank_count", Recorded())
        a, b = torch.zeros(1, 4, n, device=DEVICE), torch.zeros(1, 4, m, device=DEVICE)
        held, users = count(0).int(), torch.zeros(tokens, dtype=torch.int32, device=DEVICE)
        low_rank.low_rank_append(a, b, held, torch.zeros(1, device=DEVICE), x, delta, eta, users)
    else:
        by_triton(*window_of(tokens, n, m, torch.bfloat16, traced=False), x, delta, eta, None)
    assert grids[0] == (tokens, 3)
    assert all(axis <= 65_535 for grid in grids for axis in grid[1:])
