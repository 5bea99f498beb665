"""`ttt.fork` and `ttt.memory_usage`: what is shared, what is not, and that no bit leaks from one user to another."""

import copy

import pytest
import torch
from helpers import plain_config
from tiny_models import TARGETS, adapted, assert_same, ids_of, state_of, tiny

import ttt
from ttt.adapt.convert import learning_layers
from ttt.adapt.fork import memory_usage
from ttt.nn.gaussian import PRESENT
from ttt.nn.state import BASE

OWN = ("weight", "trace", "win_x", "win_delta", "win_eta", "recent", "recent_seen", "step", "tokens")


def taught(family="llama", **options):
    model, learner = adapted(family, window=5, **{"orthogonal": 2, **options})
    learner.calibrate([ids_of(2, 16)])
    learner.observe(ids_of(1, 23))
    return model, learner


def everything(model):
    """Every bit a user could notice: learning state, base, parameters, buffers."""
    found = state_of(model)
    found |= {f"{n}.base.{k}": t.clone() for n, layer in learning_layers(model) for k, t in layer.base.items()}
    return found | {f"p.{n}": p.detach().clone() for n, p in model.named_parameters()}


def held(layer):
    """The names in BASE that the layer's configuration needs."""
    return [name for name in BASE if getattr(layer, name) is not None]


def test_a_fork_is_the_same_to_the_bit_and_shares_what_learning_does_not_write():
    model, _ = taught(generated_rows=2)
    other = ttt.fork(model)
    assert_same(everything(model), everything(other))
    ids = ids_of(2, 12)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, other(ids).logits)
    for (_, a), (_, b) in zip(learning_layers(model), learning_layers(other), strict=True):
        assert a is not b
        for name in held(a):
            assert getattr(a, name).data_ptr() == getattr(b, name).data_ptr(), name
        for name in OWN + PRESENT:
            assert getattr(a, name).data_ptr() != getattr(b, name).data_ptr(), name
    learn = {f"{name}.weight" for name, _ in learning_layers(model)}
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert p is not q
        assert (p.data_ptr() == q.data_ptr()) == (name not in learn), name


CALLS = {
    "observe": lambda model, learner, start, path: learner.observe(ids_of(2, 30)),
    "generate": lambda model, learner, start, path: learner.generate(
        ids_of(1, 9), max_new_tokens=9, learn_output=True, learn_every=4
    ),
    "consolidate": lambda model, learner, start, path: learner.consolidate(),
    "calibrate": lambda model, learner, start, path: (learner.reset(), learner.calibrate([ids_of(3, 20)])),
    "reset": lambda model, learner, start, path: learner.reset(),
    "reset after consolidating": lambda model, learner, start, path: (
        learner.consolidate(), learner.observe(ids_of(1, 20)), learner.reset()
    ),
    "rollback": lambda model, learner, start, path: (
        learner.consolidate(), learner.observe(ids_of(1, 20)), learner.rollback(start)
    ),
    "load": lambda model, learner, start, path: ttt.load(model, path),
    "flush": lambda model, learner, start, path: learner.flush(),
    "restore": lambda model, learner, start, path: ttt.restore_(model),
    "restore, keeping": lambda model, learner, start, path: ttt.restore_(model, keep_learned=True),
    "restore, keeping, after consolidating": lambda model, learner, start, path: (
        learner.consolidate(), ttt.restore_(model, keep_learned=True)
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("which", [0, 1])
def test_what_one_does_changes_no_bit_of_the_other_and_equals_a_model_alone(call, which, family, tmp_path):
    model, learner = taught(family)
    path = tmp_path / "earlier.safetensors"
    learner.consolidate()  # so that the file and the snapshot hold another anchor, importance and memory
    ttt.save(model, path)
    start = learner.snapshot()
    learner.reset()
    learner.observe(ids_of(1, 23))
    alone = copy.deepcopy(model)
    pair = [model, ttt.fork(model)]
    mine, other = pair[which], pair[1 - which]
    before = everything(other)
    ids = ids_of(2, 12)
    with torch.no_grad():
        said = other(ids).logits
    rng = torch.get_rng_state()
    CALLS[call](mine, ttt.Learner(mine), start, path)
    assert_same(before, everything(other))
    with torch.no_grad():
        assert torch.equal(other(ids).logits, said)
    torch.set_rng_state(rng)
    CALLS[call](alone, ttt.Learner(alone), start, path)
    assert_same(everything(alone), everything(mine))
    ttt.restore_(other)  # its way back is its own, too
    pristine = ttt.restore_(adapted(family)[0])
    assert [type(m) for m in other.modules()] == [type(m) for m in pristine.modules()]


def test_restoring_a_fork_gives_the_base_weights_and_flags():
    base = tiny()
    base.lm_head.weight.requires_grad_(False)
    pristine = copy.deepcopy(base)
    model = ttt.adapt_(base, ttt.TTTConfig(target_modules=TARGETS["llama"], chunk=8))
    other = ttt.fork(model)
    ttt.Learner(other).observe(ids_of(1, 30))
    ttt.restore_(other)
    for (name, p), q in zip(other.named_parameters(), pristine.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert p.requires_grad == q.requires_grad, name
    assert not any(p.requires_grad for p in model.parameters())  # the flags are each model's own


def test_a_fork_can_be_saved_loaded_and_forked_again(tmp_path):
    model, _ = taught(generated_rows=2)
    other = ttt.fork(model)
    ttt.Learner(other).observe(ids_of(2, 20))
    ttt.save(other, tmp_path / "other.safetensors")
    third = ttt.load(ttt.fork(model), tmp_path / "other.safetensors")
    assert_same(state_of(other), state_of(third))
    for (_, a), (_, b) in zip(learning_layers(model), learning_layers(third), strict=True):
        for name in held(a):  # the file holds what they had already: no copy is made
            assert getattr(a, name).data_ptr() == getattr(b, name).data_ptr(), name
    before = everything(model), everything(other)
    ttt.Learner(third).consolidate()
    fourth = ttt.fork(third)
    ttt.Learner(fourth).observe(ids_of(2, 20))
    ttt.Learner(fourth).consolidate()
    assert_same(before[0], everything(model))
    assert_same(before[1], everything(other))


def test_ties_between_parameters_survive():
    model = tiny("gpt2")  # its output head is the embedding
    other = ttt.fork(ttt.adapt_(model, ttt.TTTConfig(target_modules=TARGETS["gpt2"])))
    assert other.lm_head.weight is other.transformer.wte.weight
    assert other.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()


def test_running_statistics_are_each_models_own():
    model = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3))
    ttt.adapt_(model, ttt.TTTConfig(target_modules=["2"]))
    other = ttt.fork(model)
    before = model[1].running_mean.clone()
    with ttt.learning(other):
        other.train()(torch.randn(7, 5)).square().sum().backward()
    assert torch.equal(model[1].running_mean, before)
    assert not torch.equal(other[1].running_mean, before)


def test_fork_and_memory_need_learning_layers():
    for call in (ttt.fork, memory_usage):
        with pytest.raises(ValueError, match="has no learning layer"):
            call(tiny())
    with pytest.raises(ValueError, match="at least one model"):
        memory_usage()


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_memory_counts_bytes_and_shared_ones_once(state_dtype):
    model, learner = adapted(state_dtype=state_dtype, window=5)
    layers = [layer for _, layer in learning_layers(model)]
    (m, n), k = layers[0].weight.shape, len(layers)
    alone = memory_usage(model)
    width = 4 if state_dtype == "float32" else 2
    assert alone.parameters == k * m * n
    assert {kind: alone.bytes[kind] for kind in ("weight", "anchor", "importance", "trace", "base", "original")} == {
        "weight": 4 * k * m * n, "anchor": 4 * k * m * n, "importance": width * k * m * n, "trace": width * k * m * n,
        "base": 0, "original": 0,
    }  # fmt: skip
    assert alone.bytes["memory"] == k * 4 * n * (32 + 32)
    assert alone.per_parameter["total"] == pytest.approx(sum(alone.bytes.values()) / (k * m * n))
    users = [model, ttt.fork(model), ttt.fork(model)]
    three = memory_usage(*users)
    assert three.parameters == 3 * alone.parameters
    for kind in ("weight", "trace", "window"):
        assert three.bytes[kind] == pytest.approx(3 * alone.bytes[kind], abs=3 * 16 * k)  # but for shared counters
    for kind in ("anchor", "importance"):
        assert three.bytes[kind] == alone.bytes[kind]
    learner.observe(ids_of(1, 20))
    learner.consolidate()
    after = memory_usage(*users)
    assert after.bytes["anchor"] == 2 * alone.bytes["anchor"]
    assert after.bytes["base"] == 0  # it is what the forks hold


def test_memory_of_conv1d_counts_the_kept_original():
    model, _ = adapted("gpt2")
    assert memory_usage(model).bytes["original"] == memory_usage(model).bytes["weight"]


def users_model(**options):
    config = ttt.TTTConfig(target_modules=TARGETS["llama"], per_user=ttt.LowRank(slots=2, rank=2, window=4), **options)
    return ttt.adapt_(tiny(), config)


def test_what_is_for_one_set_of_weights_says_what_to_call_for_users(tmp_path):
    model = users_model()
    for call in (ttt.fork, lambda m: ttt.learning(m).__enter__(), lambda m: ttt.capturable_(m, 8)):
        with pytest.raises(ValueError, match=r"was adapted for users.*observe\(ids, users=.*pool_of\(model\)\.export"):
            call(model)
    with pytest.raises(ValueError, match=r"cannot be saved: pool_of\(model\)\.export\(user\)"):
        ttt.save(model, tmp_path / "x")
    with pytest.raises(ValueError, match=r"export_peft\(pool_of\(model\)\.export\(user\), \.\.\.\)"):
        ttt.export_peft(model, tmp_path / "peft")
    assert list(tmp_path.iterdir()) == []
    for layer in ttt.pool_of(model).layers.values():
        assert layer.sink is None


def test_memory_counts_users_slots_and_what_they_share():
    model = users_model(protect=[ttt.EWC(0.003), ttt.LayerReplay(rows=2)], replay_capacity=32)
    layers = list(ttt.pool_of(model).layers.values())
    (m, n), k = layers[0].weight.shape, len(layers)
    found = memory_usage(model)
    assert found.parameters == k * m * n
    assert found.bytes["weight"] == 4 * k * m * n
    assert found.bytes["importance"] == 4 * k * (m + n)
    assert found.bytes["memory"] >= k * 4 * 32 * n
    rows, counters = 2 * 6 * (m + n) * 4, 2 * (4 + 4 + 4 + 8 + 3 * 8)  # rows, eta_sum, lost, step, moments
    assert found.bytes["users"] == k * (rows + counters)
    assert memory_usage(model, ttt.adapt_(tiny(), plain_config(target_modules=["down_proj"]))).bytes["anchor"] > 0
