"""Adapted models that are converted to another dtype: as if they had been adapted afterwards, and nothing is lost."""

import copy

import pytest
import torch
from tiny_models import TARGETS, assert_same, ids_of, state_of, tiny

import ttt
from ttt.adapt.convert import learning_layers
from ttt.nn import Linear, LowRankLinear
from ttt.ops import log8

WAYS = {
    "to bfloat16": (torch.bfloat16, lambda m: m.to(torch.bfloat16)),
    "bfloat16": (torch.bfloat16, lambda m: m.bfloat16()),
    "half": (torch.float16, lambda m: m.half()),
    "double": (torch.float64, lambda m: m.double()),
    "type": (torch.bfloat16, lambda m: m.type(torch.bfloat16)),  # casts whole numbers, too
}
ALL = {"rate": "rms", "lr": 0.02, "clip": 3.0, "ewc_lambda": 0.01, "replay_rows": 2, "orthogonal": 5}
OPTIONS = {
    "all": ALL,
    "mas": {**ALL, "importance": "mas", "rate": "energy", "lr": 0.1},
    "8bit": {**ALL, "state_dtype": "8bit"},
    "float32 state": {**ALL, "state_dtype": "float32"},
    "soft": {"rate": "decrease", "kronecker": 5},
    "momentum, generated": {**ALL, "momentum": 0.5, "generated_rows": 2, "generated_rank": 3, "decay": 0.1},
}


def config_of(family, **options):
    plain = {"target_modules": TARGETS[family], "layers": "last:0.5", "chunk": 8, "window": 5, "replay_capacity": 32}
    return ttt.TTTConfig().with_flat(**{**plain, **options})


def all_settings(users):
    return ttt.TTTConfig().with_flat(**ALL, per_user=users)


def kinds(model):
    return {key: (t.dtype, t.shape) for key, t in state_of(model).items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_learning_is_as_adapted_after_the_conversion(way, options, family):
    dtype, convert = WAYS[way]
    base, config = tiny(family), config_of(family, **OPTIONS[options])
    first = ttt.adapt_(convert(copy.deepcopy(base)), config)
    second = convert(ttt.adapt_(copy.deepcopy(base), config))
    assert kinds(first) == kinds(second)
    learners = [ttt.Learner(model) for model in (first, second)]
    known, ids = [ids_of(2, 20)], ids_of(2, 30)
    for learner in learners:
        learner.calibrate(known)
        start = state_of(learner.model)
        seen = learner.observe(ids)
        assert seen.rejected == 0
        learner.consolidate()
        learner.observe(ids)
        changed = state_of(learner.model)
        for name, layer in learning_layers(learner.model):
            assert layer.weight.dtype == dtype
            assert not torch.equal(changed[f"{name}.weight"], start[f"{name}.weight"])
    assert_same(state_of(first), state_of(second))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_what_was_learnt_is_rounded_once_and_sums_and_counters_not_at_all(way, options):
    dtype, convert = WAYS[way]
    config = config_of("llama", **OPTIONS[options])
    pristine = tiny()
    model = ttt.adapt_(copy.deepcopy(pristine), config)
    learner = ttt.Learner(model)
    learner.calibrate([ids_of(2, 20)])
    learner.observe(ids_of(1, 30))
    learner.consolidate()
    learner.observe(ids_of(1, 13))
    before, bases = state_of(model), {n: dict(layer.base) for n, layer in learning_layers(model)}
    convert(model)
    assert kinds(model) == kinds(ttt.adapt_(convert(copy.deepcopy(pristine)), config))
    for key, now in state_of(model).items():
        was, n = before[key], model.get_submodule(key.rpartition(".")[0]).in_features
        values = log8.decode(was, n) if log8.is_packed(was) and now.dtype != torch.uint8 else was
        assert torch.equal(now, values.to(now.dtype)), key
    for name, layer in learning_layers(model):
        assert layer.win_eta.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert bool(layer.win_eta.any())
        assert layer.base.keys() == bases[name].keys()
        assert {k: t.dtype for k, t in layer.base.items()} == {k: getattr(layer, k).dtype for k in layer.base}
        assert torch.equal(layer.base["anchor"], bases[name]["anchor"].to(dtype))
    snapshot = learner.snapshot()
    seen = learner.observe(ids_of(1, 30))
    assert seen.rejected == 0
    learner.rollback(snapshot)
    learner.reset()
    for name, layer in learning_layers(model):
        assert torch.equal(layer.weight, pristine.get_submodule(name).weight.to(dtype))


def test_converted_to_what_it_is_nothing_changes():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        model = ttt.adapt_(tiny().to(dtype), config_of("llama", **ALL))
        learner = ttt.Learner(model)
        learner.calibrate([ids_of(2, 20)])
        learner.observe(ids_of(1, 24))
        before = state_of(model)
        addresses = [t.data_ptr() for _, layer in learning_layers(model) for t in layer.state().values()]
        model.to(dtype)
        assert_same(before, state_of(model))
        kept = [t.data_ptr() for _, layer in learning_layers(model) for t in layer.state().values()]
        assert all(a == b for a, b, t in zip(addresses, kept, before.values(), strict=True) if t.dtype == dtype)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("users", [None, ttt.LowRank(slots=2, rank=2, window=4)])
def test_restoring_gives_what_converting_alone_would(family, users, tmp_path):
    base = tiny(family)
    model = ttt.adapt_(copy.deepcopy(base), config_of(family, **ALL, users=users))
    named = {} if users is None else {"users": ["a"]}
    learner = ttt.Learner(model)
    learner.observe(ids_of(1, 20), **named)
    model.bfloat16()
    learner.observe(ids_of(1, 20), **named)
    if users is None:
        ttt.save(model, tmp_path / "converted.safetensors")
        other = ttt.load(copy.deepcopy(base).bfloat16(), tmp_path / "converted.safetensors")
        assert_same(state_of(model), state_of(other))
    ttt.restore_(model)
    want = copy.deepcopy(base).bfloat16()
    for (name, p), q in zip(model.named_parameters(), want.parameters(), strict=True):
        assert p.dtype == q.dtype
        assert torch.equal(p, q), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("way", WAYS)
def test_users_learn_as_adapted_after_the_conversion(way, family):
    dtype, convert = WAYS[way]
    base, config = tiny(family), config_of(family, **ALL, per_user=ttt.LowRank(slots=2, rank=2, window=4))
    models = ttt.adapt_(convert(copy.deepcopy(base)), config), convert(ttt.adapt_(copy.deepcopy(base), config))
    known, ids, found = [ids_of(2, 20)], ids_of(2, 30), []
    for model in models:
        learner = ttt.Learner(model)
        learner.calibrate(known)
        assert learner.observe(ids, users=["a", "b"]).rejected == 0
        shared = {f"{n}.{k}": t for n, layer in learner.pool.layers.items() for k, t in layer.named_buffers()}
        found.append(shared | learner.pool.export("a"))
        learner.pool.load("b", learner.pool.export("b"))
    assert {k: t.dtype for k, t in found[0].items()} == {k: t.dtype for k, t in found[1].items()}
    assert_same(*found)
    assert {layer.a.dtype for layer in ttt.pool_of(models[1]).layers.values()} == {dtype}


@pytest.mark.parametrize("way", WAYS)
def test_what_users_learnt_is_rounded_once(way):
    dtype, convert = WAYS[way]
    layer = LowRankLinear(9, 7, config=all_settings(ttt.LowRank(slots=2, rank=2, window=4)), name="layer")
    for _ in range(3):
        x, delta, users = torch.randn(3, 9), torch.randn(3, 7), torch.tensor([0, 1, 1], dtype=torch.int32)
        *applied, steps = layer.steps(x, delta, users)
        layer.learn(*applied, steps.eta, users)
        layer.count(steps.grown, torch.ones(2, dtype=torch.bool))
    before = {name: t.clone() for name, t in layer.named_buffers()}
    convert(layer)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer.moments.dtype == torch.float64
    assert layer.eta_sum.dtype == layer.lost.dtype == layer.importance_m.dtype == wide
    assert (layer.rows.dtype, layer.step.dtype) == (torch.int32, torch.int64)
    assert all(torch.equal(t, before[name].to(t.dtype)) for name, t in layer.named_buffers())
    assert layer.a.dtype == dtype
    layer.check_slot_state(layer.slot_state(1))


@pytest.mark.parametrize("kind", [Linear, LowRankLinear])
def test_dtypes_that_cannot_be_adapted_are_refused_and_change_nothing(kind):
    users = ttt.LowRank(slots=2, rank=2, window=4) if kind is LowRankLinear else None
    layer = kind(9, 7, config=all_settings(users), name="layer")
    before = {name: t.clone() for name, t in (*layer.named_parameters(), *layer.named_buffers())}
    for convert in (lambda m: m.to(torch.complex64), lambda m: m.type(torch.int32)):
        with pytest.raises(TypeError, match=r"layer must be one of .*torch.float64'\], got torch\.(complex64|int32)"):
            convert(layer)
    after = dict((*layer.named_parameters(), *layer.named_buffers()))
    assert {k: t.dtype for k, t in before.items()} == {k: t.dtype for k, t in after.items()}
    assert_same(before, after)


def test_a_fork_is_not_converted_with_the_model():
    model = ttt.adapt_(tiny(), config_of("llama", **ALL))
    learner = ttt.Learner(model)
    learner.calibrate([ids_of(2, 20)])
    other = ttt.fork(model)
    learner.consolidate()
    before = state_of(other)
    model.bfloat16()
    assert_same(before, state_of(other))
    assert ttt.Learner(other).observe(ids_of(1, 20)).rejected == 0
    assert learner.observe(ids_of(1, 20)).rejected == 0
    learner.reset()


def test_layers_go_to_the_meta_device_and_into_shared_memory():
    for users in (None, ttt.LowRank(slots=2, rank=2, window=4)):
        layer = (Linear if users is None else LowRankLinear)(9, 7, config=all_settings(users))
        want = {name: (t.dtype, t.shape) for name, t in layer.named_buffers()}
        layer.share_memory()
        assert all(t.is_shared() for t in layer.buffers())
        layer.to("meta")
        assert {name: (t.dtype, t.shape) for name, t in layer.named_buffers()} == want
        assert all(t.is_meta for t in layer.buffers())
