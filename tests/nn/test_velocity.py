"""Momentum and decay: the definition, the same bits on every path, and the velocity as part of the state."""

import copy

import pytest
import torch
from helpers import plain_config
from tiny_models import adapted, assert_same, ids_of, state_of
from tiny_tasks import layers_of, samples, trainer_of

import ttt
from ttt.nn import Linear
from ttt.ops.backends import calls
from ttt.rules import Momentum

D = torch.float64


def layer_of(m, n, dtype=torch.float32, **options):
    config = plain_config(**{"lr": 0.03, "window": 4, "replay_rows": 0, "ewc_lambda": 0.0, **options})
    layer = Linear(n, m, dtype=dtype, config=config, name="layer")
    with torch.no_grad():
        layer.weight.add_(0.1 * torch.randn(m, n).to(dtype))
    return layer


def updates_of(layer, rows, count):
    shapes = (rows, layer.in_features), (rows, layer.out_features)
    pairs = [[torch.randn(shape).to(layer.weight.dtype) for shape in shapes] for _ in range(count)]
    return [layer.update_from([tuple(pair)]) for pair in pairs]


def test_a_window_of_one_follows_the_rule_of_titans_token_by_token():
    layer = layer_of(5, 7, D, window=1, momentum=0.8, decay=0.5)
    anchor, moved, velocity = layer.anchor, layer.weight - layer.anchor, torch.zeros(5, 7, dtype=D)
    for update in updates_of(layer, 1, 9):
        velocity = 0.8 * velocity + 0.03 * torch.outer(update.delta[0], update.x[0])
        moved = (moved - velocity) / (1 + 0.03 * 0.5)
        layer.learn(update)
        torch.testing.assert_close(layer.weight - anchor, moved, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(layer.momentum, velocity, rtol=1e-11, atol=1e-13)


def test_one_token_moves_the_weight_by_its_gradient_over_one_minus_mu_in_the_end():
    """Tokens with steps of 0 follow, so that the velocity decays to 0; for any window."""
    for window in (1, 4, 8):
        layer = layer_of(3, 5, D, window=window, momentum=0.75)
        start, update = layer.weight.detach().clone(), updates_of(layer, 1, 1)[0]
        layer.learn(update)
        still = copy.copy(update)
        still.eta = torch.zeros_like(update.eta)
        for _ in range(160):
            layer.learn(still)
        expected = 4 * 0.03 * torch.outer(update.delta[0], update.x[0])
        torch.testing.assert_close(start - layer.weight, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"ewc_lambda": 0.3, "replay_rows": 2, "replay_capacity": 8}, {"momentum": 0.0}]
)
def test_bound_kernels_ops_and_capturable_steps_agree(dtype, options):
    layer = layer_of(9, 33, dtype, **{"momentum": 0.6, "decay": 0.5, **options})
    if layer.memory is not None:
        with torch.no_grad():
            layer.memory.normal_()
            layer.seen.fill_(5000)
            layer.importance.copy_(torch.rand(9, 33))
    assert (layer.momentum is None) == (layer.config.momentum == 0)
    by_op, stepped = copy.deepcopy(layer), copy.deepcopy(layer).capturable_(2)
    start = layer.weight.detach().clone()
    for update in updates_of(layer, 2, 8):
        calls.clear()
        layer.learn(update)
        assert not any(backend == "reference" for op, backend, _ in calls if op == "commit")
        by_op._learn(update, 2)
        stepped.learn(update)
    stepped.flush()
    for other in (by_op, stepped):
        for name in ("weight", "momentum", "trace", "step"):
            ours, theirs = getattr(layer, name), getattr(other, name)
            assert ours is theirs is None or torch.equal(ours, theirs), name
    assert not torch.equal(layer.weight, start)


def test_momentum_has_the_dtype_of_the_state_but_never_8_bits():
    options = {"momentum": 0.5, "ewc_lambda": 0.1}
    assert layer_of(3, 5, torch.bfloat16, **options).momentum.dtype == torch.bfloat16
    assert layer_of(3, 5, torch.float32, **options).momentum.dtype == torch.float32
    assert layer_of(3, 5, torch.float32, **options, state_dtype="bfloat16").momentum.dtype == torch.bfloat16
    assert layer_of(3, 5, torch.float32, **options, state_dtype="8bit").momentum.dtype == torch.float32
    assert layer_of(3, 5, torch.bfloat16, **options, state_dtype="8bit").momentum.dtype == torch.bfloat16
    assert layer_of(3, 5, D, **options).momentum.dtype == D
    assert layer_of(3, 5).momentum is None


def test_snapshots_files_forks_and_reset_keep_the_velocity(tmp_path):
    model, learner = adapted(momentum=0.5, decay=0.1, lr=0.003, window=5)
    pristine = ttt.restore_(copy.deepcopy(model))
    learner.calibrate([ids_of(2, 16)])
    calibrated = state_of(model)
    learner.observe(ids_of(1, 23))
    assert all(layer.momentum.any() for _, layer in ttt.learning_layers(model))
    snapshot, ids = learner.snapshot(), ids_of(1, 30)
    ttt.save(model, tmp_path / "a.safetensors")
    other, loaded = ttt.fork(model), ttt.load(pristine, tmp_path / "a.safetensors")
    nll = learner.observe(ids).nll
    ended = state_of(model)
    learner.rollback(snapshot)
    assert torch.equal(learner.observe(ids).nll, nll)
    for each in (other, loaded):
        assert torch.equal(ttt.Learner(each).observe(ids).nll, nll)
        assert_same(ended, state_of(each))
    learner.reset()
    assert_same(calibrated, state_of(model))


def test_the_momentum_rule_configures_layers_and_bad_options_are_refused():
    trainer, start = trainer_of([Momentum(0.5, decay=0.2)])
    layer = layers_of(trainer)[0]
    assert (layer.config.momentum, layer.config.decay) == (0.5, 0.2)
    trainer.learn_task(samples(20))
    assert layer.momentum.any()
    assert not torch.equal(layer.weight, start[0])
    for bad, name in (({"mu": 1.0}, "mu"), ({"mu": -0.5}, "mu"), ({"decay": -1.0}, "decay")):
        with pytest.raises(ValueError, match=f"{name} must be a number in"):
            Momentum(**bad)
    for name, value in (("momentum", 1.0), ("momentum", -0.1), ("decay", -1.0), ("decay", float("inf"))):
        with pytest.raises(ValueError, match=f"{name} must be a number in .*got {value}"):
            plain_config(**{name: value})
