"""Commits that replay rows of several sources: which rows they are, and the life of the Gaussian they come from."""

import copy

import exact
import pytest
import torch
from helpers import plain_config
from tiny_models import adapted, assert_same, ids_of, state_of
from tiny_tasks import layers_of, samples, trainer_of

import ttt
from ttt import ops
from ttt.nn import Linear, gaussian
from ttt.ops import reference
from ttt.ops.philox import normals, spread_tokens
from ttt.rules import LayerDistillation, LayerGenerativeReplay, LayerReplay, LwF, configure

D = torch.float64
ALL = {"replay_rows": 3, "distill_rows": 4, "generated_rows": 5, "generated_rank": 2, "replay_capacity": 10}


def layer_of(m, n, dtype=D, **options):
    config = plain_config(**{"lr": 0.03, "window": 6, "ewc_lambda": 0.4, **options})
    layer = Linear(n, m, dtype=dtype, config=config, name="layer")
    with torch.no_grad():
        layer.weight.add_(0.1 * torch.randn(m, n))
        if layer.importance is not None:
            layer.importance.copy_(torch.rand(m, n))
        if layer.memory is not None:
            layer.memory.normal_()
            layer.seen.fill_(25)
        if layer.past_mean is not None:
            layer.set_past_inputs(layer.past_inputs.with_rows(torch.randn(40, n) + 1))
    return layer


def teach(layer, x, delta):
    layer.learn(layer.update_from([(x.to(layer.weight.dtype), delta.to(layer.weight.dtype))]))


def rows_of(layer, x):
    """The rows that the commit of ``x`` replays, computed by hand from the state before it."""
    c, parts = layer.config, []
    if c.replay_rows:
        index = ops.reservoir_draw(
            layer.seen, layer.step, capacity=len(layer.memory), rows=c.replay_rows, seed=layer.seed
        )
        parts.append(layer.memory[index])
    if c.distill_rows:
        parts.append(x[spread_tokens(len(x), c.distill_rows, layer.step, layer.seed)])
    if c.generated_rows:
        n, k = layer.in_features, c.generated_rank
        count, rest = layer.past_moments
        noise = rest / count / (n - k)
        length = layer.past_factor.norm(dim=1, keepdim=True)
        spread = (length.square() / count - noise).sqrt()
        z = normals(c.generated_rows, k + n, layer.step, layer.seed).to(x.dtype)
        parts.append(layer.past_mean + z[:, :k] @ (spread * layer.past_factor / length) + noise.sqrt() * z[:, k:])
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize(
    "options",
    [ALL, {**ALL, "replay_rows": 0}, {**ALL, "generated_rows": 0},
     {**ALL, "replay_rows": 0, "distill_rows": 0, "ewc_lambda": 0.0}, {**ALL, "replay_rows": 0, "generated_rows": 0}],
)  # fmt: skip
def test_commits_replay_rows_of_every_source(dtype, options):
    """With windows of six tokens filled in parts or at once, a commit of more tokens, and a flush of fewer."""
    layer = layer_of(5, 9, dtype, **options)
    assert layer.mixes_replay_sources
    c, seen = layer.config, []
    for parts in ([2, 4], [6], [3, 5], [2]):
        x, delta = torch.randn(sum(parts), 9, dtype=D).to(dtype), torch.randn(sum(parts), 5, dtype=D).to(dtype)
        case = {"weight": layer.weight.detach().clone(), "anchor": layer.anchor, "importance": layer.importance, "x": x,
                "delta": delta, "eta": torch.full((len(x),), c.lr, dtype=D)}  # fmt: skip
        expected = exact.commit(case, rows=rows_of(layer, x), beta=c.replay_beta, eps=c.replay_eps, lam=c.ewc_lambda)
        for one, two in zip(x.split(parts), delta.split(parts), strict=True):
            teach(layer, one, two)
        layer.flush()
        close = {"rtol": 1e-10, "atol": 1e-11} if dtype == D else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(layer.weight.detach().double(), expected, **close)
        seen.append(x)
        if c.generated_rows:
            assert float(layer.present_moments[0]) == sum(map(len, seen))
            torch.testing.assert_close(layer.present_mean, torch.cat(seen).mean(0))
            assert float(layer.past_moments[0]) == 40


@pytest.mark.parametrize("dtype", [D, torch.float32])
def test_the_memory_alone_is_drawn_from_by_the_kernel(dtype):
    """The layer hands its whole memory over, and the commit replays the rows that its own counter draws."""
    layer = layer_of(5, 9, dtype, replay_rows=3)
    assert not layer.mixes_replay_sources
    assert not any(name in layer.state() and layer.state()[name] is not None for name in gaussian.PAST)
    c = layer.config
    for step in range(3):
        x, delta = torch.randn(6, 9, dtype=D).to(dtype), torch.randn(6, 5, dtype=D).to(dtype)
        given = layer.commit_arguments(x, delta, torch.full((6,), c.lr), None)
        assert given.memory is layer.memory
        assert given.seen is layer.seen
        assert int(layer.step) == step
        case = {"weight": layer.weight.detach().clone(), "anchor": layer.anchor, "importance": layer.importance, "x": x,
                "delta": delta, "eta": torch.full((6,), c.lr, dtype=D)}  # fmt: skip
        index = reference.reservoir_draw(layer.seen, layer.step, len(layer.memory), c.replay_rows, layer.seed)
        expected, others = (
            exact.commit(case, rows=rows, beta=c.replay_beta, eps=c.replay_eps, lam=c.ewc_lambda)
            for rows in (layer.memory[index], layer.memory[(index + 1) % len(layer.memory)])
        )
        teach(layer, x, delta)
        close = {"rtol": 1e-10, "atol": 1e-11} if dtype == D else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(layer.weight.detach().double(), expected, **close)
        assert float((expected - others).abs().max()) > 1e-3


def test_empty_sources_have_no_effect_on_a_commit():
    options = {**ALL, "distill_rows": 0, "ewc_lambda": 0.0}
    layer = layer_of(5, 9, **options)
    for name in ("seen", *gaussian.PAST):
        getattr(layer, name).zero_()
    layer.memory.fill_(torch.nan)
    plain = layer_of(5, 9, ewc_lambda=0.0, replay_rows=0)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
    for _ in range(2):
        x, delta = torch.randn(6, 9, dtype=D), torch.randn(6, 5, dtype=D)
        teach(layer, x, delta)
        teach(plain, x, delta)
        torch.testing.assert_close(layer.weight, plain.weight)


def test_distillation_of_all_tokens_keeps_their_outputs():
    layer = layer_of(
        5, 30, distill_rows=6, replay_rows=0, replay_beta=1.0, replay_eps=1e-9, ewc_lambda=0.0, window=6, lr=1.0
    )
    x = torch.randn(6, 30, dtype=D)
    teach(layer, x, torch.randn(6, 5, dtype=D))
    torch.testing.assert_close(x @ layer.weight.T, x @ layer.anchor.T, rtol=1e-5, atol=1e-5)
    assert float((layer.weight - layer.anchor).abs().max()) > 0.01


@pytest.mark.parametrize("options", [ALL, {**ALL, "replay_rows": 0, "distill_rows": 0}])
def test_consolidate_rollback_and_reset_keep_the_gaussians_of_past_and_present_inputs(options):
    model, learner = adapted(**{**options, "replay_capacity": 32}, window=5)
    learner.calibrate([ids_of(2, 16), ids_of(1, 9)])
    layers = [layer for _, layer in ttt.learning_layers(model)]
    calibrated = state_of(model)
    assert all(float(layer.past_moments[0]) == 41 and float(layer.present_moments[0]) == 0 for layer in layers)
    learner.observe(ids_of(1, 23))
    assert_same({k: t for k, t in calibrated.items() if "past" in k},
                {k: t for k, t in state_of(model).items() if "past" in k})  # fmt: skip
    present = [layer.present_inputs for layer in layers]
    assert all(float(held.moments[0]) > 0 for held in present)
    snapshot, ids = learner.snapshot(), ids_of(2, 20)
    learner.consolidate()
    for layer in layers:
        assert float(layer.past_moments[0]) == 41 + 22
        assert not any(getattr(layer, name).any() for name in gaussian.PRESENT)
    one = learner.observe(ids).nll
    ended = state_of(model)
    learner.rollback(snapshot)
    learner.consolidate()
    assert torch.equal(learner.observe(ids).nll, one)
    assert_same(ended, state_of(model))
    learner.reset()
    assert_same(calibrated, state_of(model))


def test_calibration_fits_the_past_gaussian_to_the_layers_inputs():
    model, learner = adapted(generated_rows=2, generated_rank=64, replay_rows=0, ewc_lambda=0.0)
    name, layer = ttt.learning_layers(model)[0]
    found = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: found.append(args[0].flatten(0, 1)))
    learner.calibrate([ids_of(2, 30), ids_of(3, 11)])
    hook.remove()
    x = torch.cat(found).double()
    torch.testing.assert_close(layer.past_mean.double(), x.mean(0), rtol=1e-4, atol=1e-5)
    centred = x - x.mean(0)
    factor = layer.past_factor.double()
    torch.testing.assert_close(factor.T @ factor, centred.T @ centred, rtol=1e-3, atol=1e-3)


def test_files_and_forks_hold_the_gaussians(tmp_path):
    model, learner = adapted(**{**ALL, "replay_capacity": 32}, window=5)
    pristine = ttt.restore_(copy.deepcopy(model))
    learner.calibrate([ids_of(2, 16)])
    other = ttt.fork(model)
    before = state_of(model)
    ttt.Learner(other).observe(ids_of(1, 23))
    ttt.Learner(other).consolidate()
    ttt.Learner(other).observe(ids_of(1, 23))
    assert_same(before, state_of(model))
    ttt.save(other, tmp_path / "a.safetensors")
    loaded = ttt.load(pristine, tmp_path / "a.safetensors")
    assert_same(state_of(other), state_of(loaded))
    ids = ids_of(2, 20)
    assert torch.equal(ttt.Learner(other).observe(ids).nll, ttt.Learner(loaded).observe(ids).nll)
    ttt.Learner(loaded).reset()
    assert_same(before, state_of(loaded))


@pytest.mark.parametrize("gate", [None, 1, 0])
def test_capturable_layers_replay_the_same_rows_as_ordinary_ones(gate):
    options = {"replay_rows": 3, "distill_rows": 4, "window": 6}
    ordinary = layer_of(5, 9, torch.float32, **options)
    ours = copy.deepcopy(ordinary).capturable_(2)
    start = copy.deepcopy(ours.state())
    for _ in range(8):
        update = ours.update_from([(torch.randn(2, 9), torch.randn(2, 5))])
        ours.learn(update, None if gate is None else torch.tensor([gate]))
        ordinary.learn(update)
    ours.flush()
    ordinary.flush()
    if gate == 0:
        assert_same(start, ours.state())
    else:
        assert torch.equal(ours.weight, ordinary.weight)
        assert torch.equal(ours.trace, ordinary.trace)


def test_layers_that_generate_rows_cannot_be_made_capturable():
    layer = layer_of(5, 9, torch.float32, **ALL)
    before = {k: t.clone() for k, t in layer.state().items()}
    with pytest.raises(ValueError, match="generated_rows = 5 cannot be captured"):
        layer.capturable_(2)
    assert_same(before, layer.state())
    layer.capturable_(None)


def test_too_many_replay_rows_and_wrong_row_options_are_refused():
    with pytest.raises(ValueError, match="must be at most 64, got 40 \\+ 20 \\+ 5"):
        plain_config(replay_rows=40, distill_rows=20, generated_rows=5)
    for name, value in (("distill_rows", -1), ("generated_rows", 65), ("generated_rank", 0), ("distill_rows", True)):
        with pytest.raises(ValueError, match=f"{name} must be a whole number .*got {value}"):
            plain_config(**{name: value, "replay_rows": 0})


def test_rules_configure_the_rows_and_their_bad_options_are_refused():
    rules = [
        LayerReplay(3, strength=0.2),
        LayerDistillation(4, strength=0.2),
        LayerGenerativeReplay(5, strength=0.2, rank=2),
        LwF(0.1),
    ]
    trainer, _ = trainer_of(rules)
    config = layers_of(trainer)[0].config
    assert (config.replay_rows, config.distill_rows, config.generated_rows, config.generated_rank) == (3, 4, 5, 2)
    for task in range(2):
        trainer.learn_task(samples(30), epochs=1, generator=torch.Generator().manual_seed(1))
        assert all(float(layer.past_moments[0]) == 30 * (task + 1) for layer in layers_of(trainer))
    with pytest.raises(ValueError, match=r"LayerGenerativeReplay need replay_beta = 0\.1 and 0\.3"):
        configure(plain_config(), [LayerDistillation(strength=0.1), LayerGenerativeReplay(strength=0.3)])
    for rule in (LayerDistillation, LayerGenerativeReplay):
        for bad in ({"rows": 65}, {"strength": -1.0}):
            with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
                rule(**bad)
    plain = configure(plain_config(distill_rows=3, generated_rows=2), [])
    assert plain.commit_rows == 0
