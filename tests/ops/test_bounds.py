"""Counters of windows and reservoirs at and beyond their limits, in the ops, the GPU kernels and bound layers."""

import pytest
import torch
from helpers import plain_config
from test_append import count, rows_of, window_of

from ttt import ops
from ttt.nn import Linear, Update
from ttt.ops import cpu
from ttt.ops.triton.append import window_append
from ttt.ops.triton.common import INTERPRETED
from ttt.ops.triton.reservoir import reservoir_insert
from ttt.ops.triton.window_linear import window_linear

DEVICE = "cpu" if INTERPRETED else "cuda"
MOST = 2**31


@pytest.fixture(params=[True, False], ids=["kernels", "reference"])
def maybe_without_kernels(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(cpu, "_C", None)
        monkeypatch.setitem(cpu.unavailable, "cpu", "for this test")


def equal(state, before):
    return all(torch.equal(t.nan_to_num(7.0), old.nan_to_num(7.0)) for t, old in zip(state, before, strict=True))


def refused(call, state, message):
    before = [t.clone() for t in state]
    with pytest.raises(ValueError, match=message):
        call()
    assert equal(state, before)


# -- products of no inputs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_the_product_of_no_inputs_is_the_bias(isa, dtype, tokens):
    bias = torch.randn(5).to(dtype)
    args = [torch.empty(tokens, 0), torch.empty(5, 0), torch.empty(2, 0), torch.randn(2, 5)]
    x, weight, win_x, win_delta = (t.to(dtype) for t in args)
    assert torch.equal(ops.window_linear(x, weight, bias, win_x, win_delta, torch.rand(2)), bias.expand(tokens, 5))


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_the_product_of_no_inputs_in_triton(tokens):
    x, weight, win_x = (torch.empty(rows, 0, device=DEVICE) for rows in (tokens, 5, 2))
    bias, win_delta, win_eta = (torch.rand(*shape, device=DEVICE) for shape in ((5,), (2, 5), (2,)))
    assert torch.equal(window_linear(x, weight, bias, win_x, win_delta, win_eta), bias.expand(tokens, 5))


# -- counts of rows seen ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "message"),
    [(-4, "seen must be at least 0, got -4"), (MOST - 1, "at most 2.31 after 2 further rows, got 2147483647"),
     (2**62, "seen must be at most")],
)  # fmt: skip
def test_the_reservoir_refuses_a_wrong_count(maybe_without_kernels, seen, message):
    memory, counter, x = torch.randn(4, 3), torch.tensor([seen]), torch.randn(2, 3)
    refused(lambda: ops.reservoir_insert(memory, counter, x), (memory, counter, x), message)
    ops.reservoir_insert(memory, counter, x, gate=torch.tensor([0]))
    if seen != MOST - 1:
        draw = lambda: ops.reservoir_draw(counter, torch.tensor([0]), capacity=4, rows=2)  # noqa: E731
        refused(draw, (counter,), "seen must be")


def test_the_last_row_that_can_be_counted_enters(maybe_without_kernels):
    memory, counter = torch.zeros(4, 3), torch.tensor([MOST - 2])
    ops.reservoir_insert(memory, counter, torch.ones(2, 3))
    assert int(counter) == MOST


@pytest.mark.parametrize("seen", [-3, -(2**40), 2**62])
def test_a_gpu_writes_no_row_outside_of_the_reservoir(seen):
    memory, guarded = torch.zeros(12, 3, device=DEVICE), slice(4, 8)
    before = memory.clone()
    reservoir_insert(memory[guarded], torch.tensor([seen], device=DEVICE), torch.ones(3, 3, device=DEVICE), 5)
    before[guarded] = memory[guarded]
    assert torch.equal(memory, before)


# -- rows of the window -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [0, 1])
@pytest.mark.parametrize("held", [5, 2**40])
def test_append_refuses_too_large_a_count_of_rows_in_use(held, full):
    win = [t.cpu() for t in window_of(4, 3, 5, torch.float32)]
    new = [t.cpu() for t in rows_of(2, 3, 5, torch.float32)]
    state = (*win, counters := count(held, full, 0).cpu(), tokens := count(7).cpu())
    call = lambda: ops.window_append(*win, *new[:3], counters=counters, tokens=tokens)  # noqa: E731
    refused(call, state, f"counters must hold at most the 4 rows of the window, got {held}")


@pytest.mark.parametrize("held", [-1, -2, 4, 5])
def test_a_gpu_writes_no_row_outside_of_the_window(held):
    whole = [torch.full((12, k), 5.0, device=DEVICE) for k in (3, 6)]
    eta = torch.full((12,), 5.0, device=DEVICE)
    eta[4:8] = 0
    before = [t.clone() for t in (*whole, eta)]
    x, delta, new_eta, _ = rows_of(2, 3, 6, torch.float32)
    window_append(*(t[4:8] for t in whole), eta[4:8], None, x, delta, new_eta, None, 0, count(held, 0, 0), None, None)
    for t, old in zip((*whole, eta), before, strict=True):
        old[4:8] = t[4:8]
        assert torch.equal(t, old)


def layer_of(dtype, window=4):
    layer = Linear(6, 5, dtype=dtype, config=plain_config(window=window, replay_rows=2, replay_capacity=5, seed=3))
    layer.memory.normal_()
    layer.seen.fill_(9)
    return layer


def update_of(rows, dtype):
    x, delta = torch.randn(rows, 6).to(dtype), torch.randn(rows, 5).to(dtype)
    return Update(x, delta, torch.rand(rows), None, torch.tensor(True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"_pending": -1}, r"pending must be in \[0, 4\], got -1"),
     ({"_pending": -(10**6)}, r"pending must be in \[0, 4\], got -1000000"),
     ({"_pending": 5}, r"pending must be in \[0, 4\], got 5"),
     ({"recent_seen": -1}, "recent_seen must be at least 0, got -1"),
     ({"_pending": 2, "seen": -3}, "seen must be at least 0, got -3")],
)  # fmt: skip
def test_a_bound_layer_refuses_wrong_counters(isa, dtype, wrong, message):
    layer = layer_of(dtype)
    for name, value in wrong.items():
        if name == "_pending":
            layer._pending = value
        else:
            getattr(layer, name).fill_(value)
    state = [t for t in (*layer.parameters(), *layer.buffers()) if t is not None]
    with torch.no_grad():
        refused(lambda: layer.learn(update_of(2, dtype)), state, message)
    assert layer._binding.kernels is not None
    assert layer._pending == wrong.get("_pending", 0)
