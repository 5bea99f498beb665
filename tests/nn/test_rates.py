"""Steps relative to a layer's own inputs and gradients, against loops in float64; and how their means are kept."""

import copy

import pytest
import torch
from helpers import plain_config
from rates_by_hand import burst_by_hand, roots_by_hand, steps_by_hand
from tiny_models import adapted, assert_same, ids_of, state_of

import ttt
from ttt.nn import Linear
from ttt.nn.directions import project_rows
from ttt.nn.rates import CALIBRATED, STREAM

SCALED = ["energy", "rms", "decrease"]


def layer_of(m, n, dtype=torch.float64, **options):
    options = {"lr": 0.05, "window": 4, "replay_capacity": 8, **options}
    layer = Linear(n, m, dtype=dtype, config=plain_config(**options), name="layer")
    layer._largest_step = torch.inf  # tests/nn/test_kronecker.py has it
    if layer.memory is not None:
        layer.memory.normal_()
        layer.seen.fill_(8)
    return layer


def rows_of(layer, count):
    """x and delta of ``count`` tokens, with very different norms from row to row."""
    m, n, dtype = layer.out_features, layer.in_features, layer.weight.dtype
    size = torch.randn(count, 1).exp()
    return (torch.randn(count, n) * size).to(dtype), (torch.randn(count, m) * size.flip(0)).to(dtype)


@pytest.mark.parametrize("rate", SCALED)
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "sizes"), [(1, 1, (1, 1, 2)), (7, 33, (5, 1, 13)), (40, 3, (2, 9, 4))])
def test_steps_follow_the_definition_token_by_token(rate, clip, dtype, m, n, sizes):
    layer = layer_of(m, n, dtype, rate=rate, clip=clip)
    state = (0.0, 0.0, 0)
    for count in sizes:
        x, delta = rows_of(layer, count)
        update = layer.update_from([(x, delta)])
        expected, state = steps_by_hand(x, delta, layer.config, state)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5  # norms in float32
        torch.testing.assert_close(update.eta.double(), expected, rtol=tolerance, atol=0)
        assert update.eta.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        layer.learn(update)
        torch.testing.assert_close(
            layer.moments[STREAM], torch.tensor(state, dtype=torch.float64), rtol=tolerance, atol=0
        )
    assert not layer.moments[CALIBRATED].any()


@pytest.mark.parametrize("rate", SCALED)
def test_steps_do_not_depend_on_how_a_stream_is_cut(rate):
    whole = layer_of(5, 11, rate=rate, clip=1.3)
    x, delta = rows_of(whole, 29)
    (together,) = [whole.update_from([(x, delta)])]
    whole.learn(together)
    for cut in ((1,) * 29, (29,), (3, 20, 6), (28, 1)):
        layer, found = layer_of(5, 11, rate=rate, clip=1.3), []
        for a, d in zip(x.split(cut), delta.split(cut), strict=True):
            update = layer.update_from([(a, d)])
            layer.learn(update)
            found.append(update.eta)
        torch.testing.assert_close(torch.cat(found), together.eta, rtol=1e-12, atol=0)
        torch.testing.assert_close(layer.moments, whole.moments, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rate", "burst"), [("energy", None), ("rms", None), ("rms", 0.6), ("decrease", 0.6)])
def test_bound_kernels_ops_and_capturable_layers_take_the_same_steps(rate, burst, dtype, monkeypatch):
    bound = layer_of(9, 17, dtype, rate=rate, clip=1.5, burst=burst, window=6)
    ops, steps = copy.deepcopy(bound), copy.deepcopy(bound).capturable_(2)
    for _ in range(3):
        x, delta = rows_of(bound, 2)
        updates = [layer.update_from([(x, delta)]) for layer in (bound, ops, steps)]
        assert torch.equal(updates[0].eta, updates[1].eta)
        assert torch.equal(updates[0].eta, updates[2].eta)
        bound.learn(updates[0])
        with monkeypatch.context() as patch:
            patch.setattr("ttt.nn.linear.binding_of", lambda layer: None)
            ops.learn(updates[1])
        steps.learn(updates[2], torch.ones(1, dtype=torch.int64))
        before = {name: t.clone() for name, t in steps.state().items()}
        steps.learn(updates[2], torch.zeros(1, dtype=torch.int64))
        assert all(torch.equal(t, before[name]) for name, t in steps.state().items())
        assert torch.equal(bound.moments, ops.moments)
        assert torch.equal(bound.moments, steps.moments)
    steps.flush()  # as the others have
    assert torch.equal(bound.weight, ops.weight)
    assert torch.equal(bound.weight, steps.weight)
    assert not torch.equal(bound.weight, bound.anchor)


@pytest.mark.parametrize("rate", SCALED)
def test_rows_of_zeros_get_steps_of_0_and_do_not_disturb_others(rate):
    layer = layer_of(4, 6, rate=rate, clip=1.0)
    x, delta = rows_of(layer, 5)
    x[:2] = 0
    update = layer.update_from([(x, delta)])
    assert bool(update.finite)
    expected, _ = steps_by_hand(x, delta, layer.config)
    torch.testing.assert_close(update.eta, expected, rtol=1e-12, atol=0)
    assert update.eta[:2].tolist() == [0, 0]
    assert float(update.eta[2:].min()) > 0


@pytest.mark.parametrize("rate", SCALED)
@pytest.mark.parametrize("size", [float("nan"), float("inf"), 3e-21])
def test_inputs_and_steps_that_are_not_finite_change_no_bit(rate, size):
    """Inputs of 3e-21 are finite, but the step relative to them overflows."""
    layer = layer_of(3, 4, torch.float32, rate=rate)
    if size != 3e-21:
        layer.learn(layer.update_from([rows_of(layer, 2)]))
    before = {name: t.clone() for name, t in layer.state().items()}
    with pytest.raises(FloatingPointError, match="not finite"), ttt.learning(layer):
        (layer(torch.full((2, 4), size)) * 1e-20).sum().backward()
    after = layer.state()
    assert all(torch.equal(before[name], after[name]) for name in before)
    layer.capturable_(2)
    before = {name: t.clone() for name, t in layer.state().items()}
    with ttt.learning(layer) as outcome:
        (layer(torch.full((2, 4), size)) * 1e-20).sum().backward()
    assert outcome.learned.tolist() == [0]
    assert all(torch.equal(before[name], t) for name, t in layer.state().items())


@pytest.mark.parametrize("rate", SCALED)
def test_the_means_are_calibrated_and_kept_by_reset_rollback_fork_and_files(rate, tmp_path):
    model, learner = adapted(rate=rate, lr=0.03, window=5)
    calibrated = [ids_of(2, 16), ids_of(3, 9)]
    learner.calibrate(calibrated)
    layer = learner.layers[0]
    assert layer.moments[CALIBRATED, 2] == 2 * 16 + 3 * 9
    assert float(layer.moments[CALIBRATED, :2].min()) > 0
    assert not layer.moments[STREAM].any()
    start = state_of(model)
    learner.observe(ids_of(1, 24))
    assert layer.moments[STREAM, 2] == 23
    other = ttt.fork(model)
    assert_same(state_of(model), state_of(other))
    snapshot, middle = learner.snapshot(), state_of(model)
    ttt.Learner(other).observe(ids_of(1, 24))
    assert_same(middle, state_of(model))
    ttt.save(other, tmp_path / "other.safetensors")
    learner.observe(ids_of(2, 20))
    ttt.load(model, tmp_path / "other.safetensors")
    assert_same(state_of(other), state_of(model))
    learner.rollback(snapshot)
    assert_same(middle, state_of(model))
    learner.consolidate()
    learner.observe(ids_of(2, 20))
    learner.reset()
    assert_same({k: t for k, t in start.items() if ".win_" not in k}, {
        k: t for k, t in state_of(model).items() if ".win_" not in k
    })  # fmt: skip
    before = layer.moments.clone()
    learner.calibrate(calibrated[:1])  # anew, not on top
    assert layer.moments[CALIBRATED, 2] == 32
    assert not torch.equal(before, layer.moments)


def test_steps_after_calibration_use_its_means():
    """Against inputs collected by hooks, in float64."""
    _, learner = adapted(rate="energy", lr=0.5, layers=[3])
    (layer,) = learner.layers
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().double()))
    learner.calibrate([ids_of(2, 16)])
    handle.remove()
    exact = torch.cat([x.flatten(0, -2) for x in seen]).square().sum(1)
    assert float(layer.moments[CALIBRATED, 0]) == pytest.approx(float(exact.sum()), rel=1e-6)
    x, delta = rows_of(layer, 3)
    mean = (exact.sum() + x.double().square().sum(1).cumsum(0)) / (32 + torch.arange(1, 4))
    torch.testing.assert_close(layer.update_from([(x, delta)]).eta.double(), 0.5 / mean, rtol=1e-5, atol=0)


def test_calibration_with_mas_does_not_count_its_gradients():
    _, learner = adapted(rate="rms", importance="mas")
    learner.calibrate([ids_of(2, 16)])
    assert not any(layer.moments.any() for layer in learner.layers)
    seen = learner.observe(ids_of(1, 20))
    assert seen.rejected == 0
    assert all(layer.moments[STREAM, 2] == 19 for layer in learner.layers)


@pytest.mark.parametrize("rate", SCALED)
def test_masked_rows_are_not_counted(rate):
    _, learner = adapted(rate=rate)
    mask = torch.ones(1, 20, dtype=torch.bool)
    mask[0, 4:9] = False
    learner.observe(ids_of(1, 20), learn_mask=mask)
    assert all(layer.moments[STREAM, 2] == 19 - 5 for layer in learner.layers)


def test_rms_updates_do_not_depend_on_the_scale_of_gradients():
    """Gradients 1000 times as large change the weight by the same amount."""
    layer, scaled = layer_of(6, 8, rate="rms", replay_rows=0), layer_of(6, 8, rate="rms", replay_rows=0)
    x, delta = rows_of(layer, 7)
    layer.learn(layer.update_from([(x, delta)]))
    scaled.learn(scaled.update_from([(x, 1000 * delta)]))
    one, other = layer.effective_weight() - layer.anchor, scaled.effective_weight() - scaled.anchor
    torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)


def test_the_means_stay_in_float64_when_a_layer_is_converted():
    layer = layer_of(5, 6, torch.float32, rate="rms")
    layer.learn(layer.update_from([rows_of(layer, 3)]))
    before = layer.moments.clone()
    layer.to(torch.bfloat16)
    assert layer.moments.dtype == torch.float64
    assert torch.equal(layer.moments, before)
    assert "moments" in dict(layer.named_buffers())
    assert layer_of(5, 6).moments is None
    with pytest.raises(ValueError, match=r"rate must be one of .*got 'adam'"):
        plain_config(rate="adam")


@pytest.mark.parametrize("rate", ["rms", "decrease"])
@pytest.mark.parametrize("orthogonal", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "rows"), [(1, 1, 1), (7, 33, 4), (7, 33, 40), (40, 3, 9)])
def test_burst_shrinks_steps_of_gradients_that_agree(m, n, rows, dtype, orthogonal, rate):
    """Nearly equal and random rows, few (multiplied in pairs) and many (summed), against the definition."""
    layer = layer_of(m, n, dtype, rate=rate, clip=2.5, burst=0.9, orthogonal=min(orthogonal, n - 1))
    if layer.basis is not None:
        layer.basis.copy_(torch.linalg.qr(torch.randn(n, len(layer.basis)))[0].T)
    free = layer_of(m, n, dtype, rate=rate, clip=2.5)
    state = (0.0, 0.0, 0)
    for alike in (True, False):
        x, delta = rows_of(layer, rows)
        if alike:
            x, delta = x[:1] + 0.1 * x, delta[:1] + 0.1 * delta
        applied = project_rows(x, layer.basis)
        raw = (x, delta) if rate == "decrease" else None
        roots = roots_by_hand(applied, delta, layer.config, state, raw)
        steps, state = steps_by_hand(applied, delta, free.config, state, raw)
        update = layer.update_from([(x, delta)])
        expected = burst_by_hand(applied, delta, steps, layer.config, roots, raw)
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 1e-4)
        torch.testing.assert_close(update.eta.double(), expected, rtol=tolerance, atol=0)
        layer.learn(update)
        torch.testing.assert_close(layer.moments[STREAM], torch.tensor(state, dtype=torch.float64), rtol=1e-3, atol=0)
        if alike and rows > 2:
            assert float((update.eta.double() / steps).max()) < 0.95


def test_burst_leaves_steps_of_gradients_that_do_not_agree():
    layer, free = layer_of(31, 29, rate="rms", burst=1.5), layer_of(31, 29, rate="rms")
    x, delta = torch.randn(12, 29).double(), torch.randn(12, 31).double()
    assert torch.equal(layer.update_from([(x, delta)]).eta, free.update_from([(x, delta)]).eta)


def test_burst_bounds_large_inputs_with_small_gradients_without_overflow():
    layer = layer_of(4, 5, torch.float32, rate="rms", burst=0.5)
    x, delta = torch.full((6, 5), 1e18), torch.full((6, 4), 1e-18)
    update = layer.update_from([(x, delta)])
    assert bool(update.finite)
    total = (update.eta.double().unsqueeze(1) * delta.double()).T @ x.double()
    assert float(total.norm()) == pytest.approx(0.5 * layer.config.lr * 6**0.5, rel=1e-5)
    x[0] = 0  # a row of zeros has no direction
    assert bool(layer.update_from([(x, delta)]).finite)


def test_burst_is_ignored_unless_rate_is_rms_and_bad_values_are_refused():
    x, delta = torch.randn(12, 29).double(), torch.randn(12, 31).double()
    for rate in ("constant", "energy"):
        bound, free = (layer_of(31, 29, rate=rate, burst=b) for b in (0.01, None))
        assert torch.equal(bound.update_from([(x, delta)]).eta, free.update_from([(x, delta)]).eta)
    for value in (0.0, float("nan"), "1.2"):
        with pytest.raises(ValueError, match="burst must be a number in"):
            plain_config(burst=value, rate="rms")
