"""`ttt.version` changes with what a model computes, and only with that."""

import pytest
import torch
from tiny_models import adapted, ids_of, tiny

import ttt


def test_one_set_of_weights_has_another_version_after_every_change(tmp_path):
    model, learner = adapted(window=12)
    ids, seen = ids_of(2, 11), []

    def changed(call):
        seen.append(ttt.version(model))
        call()
        assert ttt.version(model) not in seen
        assert ttt.version(model) == ttt.version(model)

    changed(lambda: learner.observe(ids))
    snapshot = learner.snapshot()
    ttt.save(model, tmp_path / "x")
    changed(lambda: learner.observe(ids))
    changed(lambda: learner.rollback(snapshot))
    changed(learner.flush)
    changed(lambda: learner.observe(ids))
    changed(learner.reset)
    changed(lambda: ttt.load(model, tmp_path / "x"))
    changed(lambda: model.load_state_dict(tiny().state_dict()))
    before = ttt.version(model)
    learner.observe(ids, learn=False)
    learner.generate(ids[:, :5], max_new_tokens=3, learn_prompt=False)
    with torch.no_grad():
        model(ids)
    assert ttt.version(model) == before
    with pytest.raises(ValueError, match="user must be None for a model with one set of weights, got 'a'"):
        ttt.version(model, "a")
    with pytest.raises(ValueError, match="no learning layer"):
        ttt.version(tiny())


def test_a_users_version_is_that_of_what_the_user_learnt():
    model, learner = adapted(per_user=ttt.LowRank(slots=3, rank=2, window=16), ewc_lambda=0.0, replay_rows=0)
    pool, ids = learner.pool, ids_of(2, 11)
    empty = ttt.version(model)
    learner.observe(ids, users=["a", "b"])
    one, other = ttt.version(model, "a"), ttt.version(model, "b")
    assert len({empty, one, other}) == 3
    assert ttt.version(model) == empty
    learner.observe(ids[:1], users=["b"])
    assert ttt.version(model, "a") == one
    assert ttt.version(model, "b") != other
    state = pool.export("a")
    learner.observe(ids[:1], users=["a"])
    assert ttt.version(model, "a") != one
    pool.load("c", state)  # the same content in another slot
    assert ttt.version(model, "c") == one
    pool.load("a", state)
    assert ttt.version(model, "a") == one
    model.load_state_dict({key: t + 1 for key, t in model.state_dict().items()})
    assert ttt.version(model, "a") != one
    with pytest.raises(KeyError, match="user 'd' has no slot"):
        ttt.version(model, "d")
