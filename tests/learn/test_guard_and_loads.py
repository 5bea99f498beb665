"""A guard whose model was given another state, and layers whose guard is gone."""

import copy

import pytest
import torch
from tiny_models import adapted, assert_same, ids_of, state_of, tiny

import ttt
from ttt.nn.state import BASE


def weights(model):
    return [layer.effective_weight() for _, layer in ttt.learning_layers(model)]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def guarded(**options):
    """(model, learner, guard), which has kept what was learnt before the test puts in another state."""
    model, _ = adapted(lr=0.02, window=5)
    guard = ttt.Guard([ids_of(2, 20)], **{"threshold": 1e6, "every": None, "surprise": 1e9, **options})
    learner = ttt.Learner(model, guard=guard, episodes=ttt.EpisodeLog(256, 64))
    learner.calibrate([ids_of(2, 20)])
    learner.observe(ids_of(1, 30))
    guard.check()
    return model, learner, guard


def trip(guard):
    guard.threshold = guard.bound = -1.0
    guard.check()
    assert guard.history[-1].rolled_back


def test_a_guard_goes_back_to_a_loaded_state_and_not_past_it(tmp_path):
    model, learner, guard = guarded()
    before, reference = weights(model), guard.reference
    learner.observe(ids_of(2, 40))
    ttt.save(model, tmp_path / "state")
    loaded, log = weights(model), learner.episodes.of()
    learner.observe(ids_of(2, 40))
    ttt.load(model, tmp_path / "state")
    assert len(learner.episodes.of()) > len(log)  # the log is not the file's
    full = len(learner.episodes.of())
    guard.check()
    learner.observe(ids_of(1, 20))
    trip(guard)
    assert same(weights(model), loaded)
    assert not same(loaded, before)
    assert guard.reference == reference
    assert len(learner.episodes.of()) == full


@pytest.mark.parametrize("use", ["observe", "generate", "study"])
def test_the_next_call_of_a_learner_takes_the_loaded_state_before_it_learns(tmp_path, use):
    model, learner, guard = guarded()
    learner.observe(ids_of(2, 40))
    ttt.save(model, tmp_path / "state")
    loaded = weights(model)
    learner.reset()
    learner.episodes.add(None, ids_of(1, 9)[0], torch.ones(9, dtype=torch.bool))
    ttt.load(model, tmp_path / "state")
    guard.threshold = -1.0  # no state that is learnt from here on is a good one
    {
        "observe": lambda: learner.observe(ids_of(1, 20)),
        "generate": lambda: learner.generate(ids_of(1, 10), max_new_tokens=2),
        "study": lambda: learner.study(passes=1, rehearse=0.0),
    }[use]()
    assert not same(weights(model), loaded)
    trip(guard)
    assert same(weights(model), loaded)


def test_a_loaded_state_above_the_bound_gives_way_to_that_of_its_anchor(tmp_path):
    model, learner, guard = guarded()
    learner.consolidate()
    anchor = [layer.anchor.clone() for _, layer in ttt.learning_layers(model)]
    learner.observe(ids_of(2, 40))
    ttt.save(model, tmp_path / "state")
    learner.reset()
    ttt.load(model, tmp_path / "state")
    guard.bound = guard.threshold = -1.0
    guard.check()
    assert same(weights(model), anchor)


def test_after_other_base_weights_the_reference_is_theirs():
    model, learner, guard = guarded()
    other = {key: t + 0.05 * torch.randn_like(t) for key, t in model.state_dict().items()}
    model.load_state_dict(other)
    plain = tiny()
    plain.load_state_dict(other)
    frozen = ttt.Guard(guard.batches)
    ttt.Learner(ttt.adapt_(plain, learner.config), guard=frozen)
    new = weights(model)
    guard.check()
    assert guard.reference == frozen.reference
    assert guard.history[-1].drift == pytest.approx(0, abs=1e-6)
    learner.observe(ids_of(1, 30))
    trip(guard)
    assert same(weights(model), new)


def test_another_learners_reset_and_rollback_are_not_undone():
    model, learner, guard = guarded()
    other = ttt.Learner(model)
    held = other.snapshot()
    base = [layer.base_weight.clone() for _, layer in ttt.learning_layers(model)]
    learner.observe(ids_of(1, 30))
    guard.check()
    other.rollback(held)
    back = weights(model)
    learner.observe(ids_of(1, 30))
    trip(guard)
    assert same(weights(model), back)
    guard.threshold = guard.bound = 1e6
    other.reset()
    learner.observe(ids_of(1, 30))
    trip(guard)
    assert same(weights(model), base)


def test_users_guards_measure_with_the_base_weights_that_were_loaded():
    low_rank = ttt.LowRank(slots=2, rank=4, window=8)
    model = ttt.adapt_(tiny(), ttt.TTTConfig(target_modules=["down_proj"], per_user=low_rank))
    learner = ttt.Learner(model, guard=ttt.Guard([ids_of(2, 20)], every=None))
    learner.observe(ids_of(1, 9), users=["ada"])
    guards = learner.user_guards
    model.load_state_dict({key: t + 0.05 * torch.randn_like(t) for key, t in model.state_dict().items()})
    assert guards.drift(None) == pytest.approx(0, abs=1e-6)
    before = guards.reference
    model.load_state_dict({key: t + 0.05 * torch.randn_like(t) for key, t in model.state_dict().items()})
    guards.check("ada")
    assert guards.reference != before


def test_a_learner_without_a_guard_computes_with_strength_1():
    model, _ = adapted(lr=0.02, window=5, ewc_lambda=0.1)
    twin = copy.deepcopy(model)
    known, text = ids_of(2, 20), ids_of(2, 40)
    ttt.Learner(twin).calibrate([known])
    plain = ttt.Learner(twin)
    watched = ttt.Learner(model, guard=ttt.Guard([known]))
    watched.calibrate([known])
    assert {layer.strength for layer in watched.layers} == {8.0}
    unwatched = ttt.Learner(model)
    assert {layer.strength for layer in unwatched.layers} == {1.0}
    for learner in (plain, unwatched):
        assert learner.observe(text).strength == 1.0
    assert_same({k: t for k, t in state_of(model).items() if k.rpartition(".")[2] not in BASE},
                {k: t for k, t in state_of(twin).items() if k.rpartition(".")[2] not in BASE})  # fmt: skip
    watched.observe(ids_of(1, 9))
    assert {layer.strength for layer in watched.layers} == {watched.guard.strength}
    unwatched.flush()
    assert {layer.strength for layer in unwatched.layers} == {1.0}
