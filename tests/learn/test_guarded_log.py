"""A guard and a log of episodes together: the log holds what the layers have learnt, and studies keep to the bound."""

import copy

import pytest
import torch
from guards_by_hand import loss_of, without_guard
from tiny_models import assert_same, ids_of, tiny

import ttt


def held_back(model):
    with torch.no_grad():
        return model.generate(ids_of(4, 2), max_new_tokens=22, do_sample=True, temperature=0.3, pad_token_id=0)


def users_learner(lr=0.3, **guard):
    model = tiny()
    known = held_back(model)
    config = ttt.TTTConfig(
        ["down_proj"], layers="last:2", chunk=4, lr=lr, per_user=ttt.LowRank(slots=3, rank=4, window=8)
    )
    guarded = ttt.Guard([known], **{"threshold": 0.002, "every": 16, **guard})
    return ttt.Learner(ttt.adapt_(model, config), guard=guarded, episodes=ttt.EpisodeLog(before=1)), known


def texts_of(log, user=None):
    return [episode.ids.tolist() for episode in log.of(user)]


def test_what_a_users_guard_takes_back_is_taken_out_of_the_log():
    learner, _ = users_learner()
    guards, log = learner.user_guards, learner.episodes
    kept, tripped = [], 0
    for turn in range(12):
        ids, other = ids_of(1, 17), ids_of(1, 17)
        if turn == 6:
            guards.bound = guards.threshold = 10.0  # this turn is good, whatever it did
        if turn == 7:
            guards.bound = guards.threshold = -1.0
        before = learner.pool.export("a") if turn else None
        output = learner.observe(torch.cat([ids, other]), users=["a", None])
        (check,) = [check for check in guards.history if check.user == "a"][-1:]
        assert output.rolled_back_users == ({"a": 1} if check.rolled_back else {})
        assert output.rollbacks == check.rolled_back
        if check.rolled_back:
            tripped += 1
            assert texts_of(log, "a") == kept
        elif check.drift <= guards.threshold:
            kept = [*texts_of(log, "a")]
            assert kept[-1] == ids[0].tolist()
        if turn > 6:
            assert check.rolled_back
            assert_same(without_guard(before), without_guard(learner.pool.export("a")))
    assert tripped >= 5
    assert kept
    assert len(kept) < 8
    assert not log.of("b")


def test_one_set_of_weights_goes_back_with_its_log():
    model = tiny()
    known = held_back(model)
    config = ttt.TTTConfig(["down_proj"], layers="last:2", chunk=4, lr=0.3)
    guard = ttt.Guard([known], threshold=10.0, every=16)
    learner = ttt.Learner(ttt.adapt_(model, config), guard=guard, episodes=ttt.EpisodeLog(before=1))
    first, second = ids_of(1, 17), ids_of(1, 17)
    assert learner.observe(first).rollbacks == 0
    assert texts_of(learner.episodes) == [first[0].tolist()]
    learner.study(passes=2)
    good = copy.deepcopy([layer.state() for layer in learner.layers])
    assert [episode.studied for episode in learner.episodes.of()] == [True]
    guard.bound = guard.threshold = -1.0
    assert learner.observe(second).rollbacks == 1
    assert texts_of(learner.episodes) == [first[0].tolist()]
    assert [episode.studied for episode in learner.episodes.of()] == [True]
    for before, layer in zip(good, learner.layers, strict=True):
        assert_same(before, layer.state())


@pytest.mark.parametrize("users", [True, False])
def test_a_study_beyond_the_bound_changes_nothing(users):
    """What the guard measures is what the written study would do: a bound a little above lets it through."""
    if users:
        learner, known = users_learner(lr=0.01, threshold=10.0, every=None)
        guard, user = learner.user_guards, "a"
        learner.observe(ids_of(1, 17), users=["a"])
    else:
        model = tiny()
        known = held_back(model)
        guard, user = ttt.Guard([known], threshold=10.0, every=None), None
        config = ttt.TTTConfig(["down_proj"], layers="last:2", chunk=4, lr=0.01)
        learner = ttt.Learner(ttt.adapt_(model, config), guard=guard, episodes=ttt.EpisodeLog(before=1))
        learner.observe(ids_of(1, 17))
    base = guard.reference

    def state():
        if users:
            return learner.pool.export("a")
        kept = {f"{i}.{k}": t.clone() for i, layer in enumerate(learner.layers) for k, t in layer.state().items()}
        return kept | learner.episodes.export(None)

    def drift():
        return loss_of(learner, known, user) / base - 1

    before, was = state(), drift()
    trial = copy.deepcopy(learner)
    trial.study(user, passes=6, lr=0.05, rehearse=0.0)
    after = loss_of(trial, known, user) / base - 1
    assert after > was + 1e-4
    guard.threshold = guard.bound = (was + after) / 2
    checks = len(guard.history)
    with pytest.raises(
        ttt.GuardTripped, match=r"held-back text would have a loss .* is allowed; nothing was changed"
    ) as e:
        learner.study(user, passes=6, lr=0.05, rehearse=0.0)
    assert e.value.drift == pytest.approx(after, abs=1e-4)
    assert_same(before, state())
    assert len(guard.history) == checks
    assert not learner.episodes.of(user)[0].studied
    guard.threshold = guard.bound = after + 1e-3
    assert learner.study(user, passes=6, lr=0.05, rehearse=0.0).episodes == 1
    assert drift() == pytest.approx(after, abs=1e-5)
    assert guard.history[-1].drift == pytest.approx(after, abs=1e-4)
    assert not guard.history[-1].rolled_back
    good = state()
    guard.threshold = guard.bound = -1.0  # whatever is learnt now goes back to what the study left
    if users:
        learner.observe(ids_of(1, 9), users=["a"])
        assert guard.check("a").rolled_back
        assert_same(without_guard(good), without_guard(state()))
    else:
        learner.observe(ids_of(1, 9))
        guard.check()
        assert guard.rollbacks == 1
        assert_same(good, state())


@pytest.mark.parametrize("users", [True, False])
def test_a_history_has_the_newest_checks_only(users, monkeypatch):
    monkeypatch.setattr("ttt.per_user.guards.MOST_CHECKS" if users else "ttt.learn.guard.MOST_CHECKS", 3)
    if users:
        learner, _ = users_learner(threshold=10.0, every=None)
        guard = learner.user_guards
    else:
        model = tiny()
        guard = ttt.Guard([held_back(model)], threshold=10.0, every=None)
        learner = ttt.Learner(ttt.adapt_(model, ttt.TTTConfig(["down_proj"], layers="last:2", chunk=4)), guard=guard)
    for _ in range(5):
        learner.observe(ids_of(1, 9), users=["a"] if users else None)
        guard.check(*(["a"] if users else []))
    counts = [check.tokens for check in guard.history]
    assert counts == [24, 32, 40]


@pytest.mark.parametrize("learns_after", [False, True])
@pytest.mark.parametrize("users", [True, False])
def test_a_rollback_does_not_bring_back_what_the_log_forgot(users, learns_after):
    if users:
        learner, _ = users_learner(threshold=10.0, every=None)
        guard, user = learner.user_guards, "a"
    else:
        model = tiny()
        guard, user = ttt.Guard([held_back(model)], threshold=10.0, every=None), None
        config = ttt.TTTConfig(["down_proj"], layers="last:2", chunk=4, lr=0.05)
        learner = ttt.Learner(ttt.adapt_(model, config), guard=guard, episodes=ttt.EpisodeLog(before=1))

    def learn():
        ids = ids_of(1, 17)
        learner.observe(ids, users=["a"] if users else None)
        return ids[0].tolist()

    def weights():
        if users:
            return {name: t for name, t in learner.pool.copy_learnt("a").items() if not name.startswith("episodes.")}
        return {
            f"{at}.{name}": t.clone() for at, layer in enumerate(learner.layers) for name, t in layer.state().items()
        }

    def check():
        return guard.check("a") if users else guard.check()

    learn()
    check()
    good = weights()
    learner.episodes.forget(user)
    if learns_after:
        learn()
    threshold, guard.threshold, guard.bound = guard.threshold, -1.0, -1.0
    check()
    assert guard.history[-1].rolled_back
    assert learner.episodes.of(user) == []
    assert_same(good, weights())
    guard.threshold = guard.bound = threshold
    kept = [learn()]
    check()
    twin = copy.deepcopy(learner)
    guard.threshold = guard.bound = -1.0
    learn()
    check()
    assert texts_of(learner.episodes, user) == kept  # what was learnt since then comes back as ever
    mine = twin.user_guards if users else twin.guard
    mine.threshold = mine.bound = -1.0
    twin.observe(ids_of(1, 17), users=["a"] if users else None)
    mine.check(*([user] if users else []))
    assert texts_of(twin.episodes, user) == kept


def test_a_guarded_users_state_can_be_loaded_without_a_guard_and_back():
    learner, _ = users_learner(threshold=10.0)
    learner.observe(ids_of(1, 17), users=["a"])
    state = learner.pool.export("a")
    assert "ttt.guard.progress" in state
    model = tiny()
    config = ttt.TTTConfig(["down_proj"], layers="last:2", chunk=4, per_user=ttt.LowRank(slots=3, rank=4, window=8))
    plain = ttt.Learner(ttt.adapt_(model, config), episodes=ttt.EpisodeLog(before=1))
    plain.pool.load("a", state)
    assert_same(without_guard(state), plain.pool.export("a"))
    learner.pool.load("b", plain.pool.export("a"))
    assert_same(without_guard(state), without_guard(learner.pool.export("b")))
    with pytest.raises(ValueError, match="tensors of other layers: ttt; users"):
        plain.pool.load("a", state | {"ttt.other": torch.zeros(1)})
    with pytest.raises(ValueError, match="every must be"):
        ttt.Guard([ids_of(1, 9)], every=0)


def test_a_log_that_is_refused_leaves_no_guard_behind():
    learner, known = users_learner()
    model = learner.model
    learner.user_guards.close()
    with pytest.raises(ValueError, match="episodes must be the log that the model's users have already"):
        ttt.Learner(model, guard=ttt.Guard([known]), episodes=ttt.EpisodeLog())
    assert learner.pool.companion is None
    again = ttt.Learner(model, guard=ttt.Guard([known]), episodes=learner.episodes)
    assert learner.pool.companion is again.user_guards
