"""Capturable layers, which count their window on the device, against ordinary layers: bit for bit, on the CPU."""

import copy

import pytest
import torch
from helpers import plain_config

import ttt
from ttt.nn import Linear

STATE = ("weight", "trace", "recent", "recent_seen", "step", "tokens", "win_eta")


def layer_of(m, n, dtype, **options):
    config = plain_config(**{"replay_capacity": 8, "lr": 0.01, **options})
    layer = Linear(n, m, dtype=dtype, config=config, name="layer")
    with torch.no_grad():
        if layer.importance is not None:
            layer.importance.copy_(torch.rand(m, n))
        if layer.memory is not None:
            layer.memory.normal_()
            layer.seen.fill_(6)
    return layer


def updates_of(layer, rows, count):
    """Random updates of ``rows`` tokens; with separate gradients for the trace if the layer uses MAS."""
    found = []
    for _ in range(count):
        x, d, p = (torch.randn(rows, k).to(layer.weight.dtype) for k in (layer.in_features, *[layer.out_features] * 2))
        found.append(layer.update_from([(x, d)], [(x, p)] if layer.win_trace is not None else None))
    return found


def assert_same(ours, theirs, what):
    """Compare all that a step changes; of the window only the rows in use."""
    for name in STATE:
        a, b = getattr(ours, name), getattr(theirs, name)
        assert a is b is None or torch.equal(a, b), f"{name} {what}"
    assert ours.pending == theirs.pending, what
    for name in ("win_x", "win_delta", "win_trace"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert a is b is None or torch.equal(a[: ours.pending], b[: ours.pending]), f"{name} {what}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("window", "rows"), [(1, 1), (12, 3), (16, 5), (7, 1), (8, 4), (8, 5), (8, 8), (8, 13)])
@pytest.mark.parametrize("options", [{}, {"importance": "mas", "clip": 0.5}, {"ewc_lambda": 0.0, "replay_rows": 0}])
def test_capturable_steps_equal_those_of_an_ordinary_layer(dtype, window, rows, options):
    """The ordinary layer is flushed when another step would not fit; ours commits one step later."""
    ordinary = layer_of(33, 65, dtype, window=window, **options)
    ours = copy.deepcopy(ordinary).capturable_(rows)
    assert ours.capturable == rows
    probe = torch.randn(2, 65).to(dtype)
    compared = 0
    for step, update in enumerate(updates_of(ordinary, rows, 11)):
        ordinary.learn(update)
        if ordinary.pending + rows > window or 2 * rows > window:
            ordinary.flush()
        ours.learn(update)
        if ordinary.pending or 2 * rows > window:  # both have committed the same rows
            compared += 1
            assert_same(ours, ordinary, f"after step {step}")
            with torch.no_grad():
                assert torch.equal(ours(probe), ordinary(probe))
        else:
            assert ours.pending == window // rows * rows
            flushed = copy.deepcopy(ours)
            flushed.flush()
            assert_same(flushed, ordinary, f"flushed after step {step}")
    assert compared or window < 2 * rows or window // rows == 1
    ours.capturable_(None)
    for update in updates_of(ordinary, 2, 5):  # and it goes on as an ordinary one
        if ours.pending == window:
            ours.flush()
        ordinary.learn(update)
        ours.learn(update)
    ordinary.flush()
    ours.flush()
    assert_same(ours, ordinary, "as an ordinary layer again")


@pytest.mark.parametrize(("window", "rows"), [(8, 2), (8, 8)])
def test_a_closed_gate_changes_no_bit(window, rows):
    layer = layer_of(5, 7, torch.float32, window=window).capturable_(rows)
    shut, opened = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    for step, update in enumerate(updates_of(layer, rows, 9)):
        before = {name: t.clone() for name, t in layer.state().items()}
        layer.learn(update, shut)
        assert all(torch.equal(t, before[name]) for name, t in layer.state().items()), step
        other = copy.deepcopy(layer)
        layer.learn(update, opened)
        other.learn(update)
        assert_same(layer, other, step)


@pytest.mark.parametrize(("window", "rows"), [(6, 2), (4, 3)])
def test_a_gate_with_any_other_number_than_0_is_open(window, rows):
    gated = layer_of(5, 9, torch.float32, window=window).capturable_(rows)
    ungated = copy.deepcopy(gated)
    for update in updates_of(gated, rows, 5):
        gated.learn(update, torch.tensor([3]))
        ungated.learn(update)
        assert_same(gated, ungated, "under a gate of 3")


def test_input_gradients_of_capturable_layers_include_the_window():
    ordinary = layer_of(5, 7, torch.float64, window=9, replay_rows=0)
    ours = copy.deepcopy(ordinary).capturable_(2)
    for update in updates_of(ordinary, 2, 3):
        ordinary.learn(update)
        ours.learn(update)
    grads = []
    for layer in (ours, ordinary):
        x = torch.ones(3, 7, dtype=torch.float64, requires_grad=True)
        layer(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_capturable_steps_change_no_address_and_no_host_state():
    """A graph's replay repeats work on the same tensors and cannot change attributes of the layer."""
    layer = layer_of(5, 7, torch.float32, window=6).capturable_(2)
    tensors = {**layer.state(), "counters": layer._counter.counters}
    tensors.pop("pending")
    addresses = {name: t.data_ptr() for name, t in tensors.items()}
    kept = set(vars(layer)) - {"_binding"}
    remembered = {k: vars(layer)[k] for k in kept}
    for update in updates_of(layer, 2, 8):
        layer.learn(update)
    tensors = {**layer.state(), "counters": layer._counter.counters}
    assert addresses == {name: t.data_ptr() for name, t in tensors.items() if name != "pending"}
    assert all(vars(layer)[k] is v for k, v in remembered.items())


def test_wrong_rows_gates_states_and_conversions_are_refused_and_change_nothing():
    layer = layer_of(5, 7, torch.float32, window=8)
    for rows in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="rows must be a whole number"):
            layer.capturable_(rows)
    (update,) = updates_of(layer, 3, 1)
    with pytest.raises(ValueError, match="gate needs a capturable layer"):
        layer.learn(update, torch.ones(1, dtype=torch.int64))
    layer.learn(update)
    held = {name: t.clone() for name, t in layer.state().items()}
    layer.capturable_(2)  # three rows are no steps of two
    assert layer.pending == 0
    assert int(layer.step) == 1
    before = {name: t.clone() for name, t in layer.state().items()}
    with pytest.raises(ValueError, match=r"capturable for steps of 2 rows, got 3; capturable_\(None\)"):
        layer.learn(update)
    with pytest.raises(ValueError, match="pending = 3 is no whole number of the layer's steps of 2 rows"):
        layer.load_state(held)
    with pytest.raises(RuntimeError, match="cannot be moved or converted"):
        layer.double()
    assert all(torch.equal(t, before[name]) for name, t in layer.state().items())
    layer.shared.add("anchor")
    with pytest.raises(RuntimeError, match=r"'anchor'.*shared with a fork"):
        layer.unshare("anchor")


def test_capturable_layers_survive_snapshot_rollback_reset_and_consolidate():
    layer = layer_of(5, 7, torch.float32, window=8)
    model = torch.nn.Sequential(layer)
    learner = ttt.Learner(model)
    ttt.capturable_(model, 2)
    first, second = updates_of(layer, 2, 6)[:3], updates_of(layer, 2, 6)
    for update in first:
        layer.learn(update)
    snapshot = learner.snapshot()
    ends = []
    for _ in range(2):
        for update in second:
            layer.learn(update)
        ends.append({name: t.clone() for name, t in layer.state().items()})
        learner.rollback(snapshot)
        assert layer.pending == 6
    assert all(torch.equal(t, ends[1][name]) for name, t in ends[0].items() if name not in ("win_x", "win_delta"))
    learner.consolidate()
    assert layer.pending == 0
    learner.reset()
    for update in first:
        layer.learn(update)
    assert layer.pending == 6


def test_learning_with_capturable_layers_skips_gradients_that_are_not_finite():
    plain = layer_of(5, 7, torch.float64, window=6, ewc_lambda=0.0, replay_rows=0)
    model = torch.nn.Sequential(plain, torch.nn.ReLU(), torch.nn.Linear(5, 3).double())
    ordinary = copy.deepcopy(model)
    assert ttt.capturable_(model, 2) is model
    for step in range(7):
        x = torch.randn(2, 7, dtype=torch.float64)
        x[0, 0] = float("nan") if step == 4 else 1.0
        before = {name: t.clone() for name, t in model[0].state().items()}
        with ttt.learning(model) as outcome:
            model(x).square().sum().backward()
        if step == 4:
            assert outcome.learned.tolist() == [0]
            assert all(torch.equal(t, before[name]) for name, t in model[0].state().items())
            continue
        assert outcome.learned.tolist() == [1]
        with ttt.learning(ordinary) as outcome:
            ordinary(x).square().sum().backward()
        assert outcome.learned is None
    model[0].flush()
    ordinary[0].flush()
    # Not to the bit: our full window acts from the side for one step more.
    torch.testing.assert_close(model[0].weight, ordinary[0].weight, rtol=1e-10, atol=1e-12)
    assert int(model[0].tokens) == int(ordinary[0].tokens) == 12
