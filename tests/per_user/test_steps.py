"""Learning and study in steps, between which the model serves others: the same bits, and refusals."""

import copy

import pytest
import torch
from tiny_models import TARGETS, VOCAB, assert_same, tiny

import ttt


def words(rows, length):
    return torch.randint(1, VOCAB, (rows, length))


@pytest.fixture
def pair():
    """Two learners with the same weights and two slots each."""
    config = ttt.TTTConfig(
        TARGETS["llama"], layers="last:0.5", lr=0.05, protect=[ttt.KroneckerFisher(directions=3)], chunk=8,
        per_user=ttt.LowRank(slots=2, rank=40, window=8),
    )  # fmt: skip
    model = tiny("llama")
    known = words(2, 24)
    learners = []
    for _ in range(2):
        learner = ttt.Learner(ttt.adapt_(copy.deepcopy(model), config), episodes=ttt.EpisodeLog())
        learner.calibrate([known])
        learners.append(learner)
    return learners


def finish(steps, between=lambda: None):
    count = 0
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value, count
        count += 1
        between()


def serve(learner):
    """What a server does between two steps."""
    with torch.no_grad(), ttt.users(learner.model, ["bob", None]):
        learner.model(input_ids=words(2, 5))
    learner.observe(words(1, 9), users=["bob"])


def test_a_text_learnt_in_steps_gives_the_bits_of_observe(pair):
    whole, stepped = pair
    ids, mask = words(1, 43), torch.rand(1, 43) < 0.6
    wanted = whole.observe(ids, learn_mask=mask, users=["ada"])
    found, count = finish(stepped.observe_in_steps(ids, learn_mask=mask, users=["ada"]), lambda: serve(stepped))
    assert count == 6  # chunks of 8 of 42 tokens
    assert torch.equal(wanted.nll, found.nll)
    assert found.learned == wanted.learned
    assert_same(whole.pool.export("ada"), stepped.pool.export("ada"))
    assert [e.ids.tolist() for e in whole.episodes.of("ada")] == [e.ids.tolist() for e in stepped.episodes.of("ada")]


def test_a_study_in_steps_gives_the_bits_of_study_and_is_in_effect_at_its_end_only(pair):
    whole, stepped = pair
    ids, probe = words(1, 30), words(1, 7)
    for learner in pair:
        learner.observe(ids, users=["ada"])

    def logits(learner):
        with torch.no_grad(), ttt.users(learner.model, ["ada"]):
            return learner.model(input_ids=probe).logits

    before, during = logits(stepped), []

    def between():
        serve(stepped)
        during.append(logits(stepped))

    wanted = whole.study("ada", passes=3, until=0.0)
    found, count = finish(stepped.study_in_steps("ada", passes=3, until=0.0), between)
    # 47 tokens of the own texts; a pass is one step here, and one of rehearsal; what was written is read once more.
    assert count == 47 + 3 * 2 + 1
    assert found == wanted
    assert_same(whole.pool.export("ada"), stepped.pool.export("ada"))
    assert all(torch.equal(before, each) for each in during)
    assert not torch.equal(before, logits(stepped))
    assert torch.equal(logits(whole), logits(stepped))


def test_what_is_learnt_between_two_steps_of_a_study_is_not_lost(pair):
    learner = pair[0]
    learner.observe(words(1, 30), users=["ada"])
    steps = learner.study_in_steps("ada")
    next(steps)
    learner.observe(words(1, 5), users=["ada"])
    before = learner.pool.export("ada")
    with pytest.raises(RuntimeError, match="between two steps of a study"):
        finish(steps)
    assert_same(before, learner.pool.export("ada"))
    assert not any(layer._forward_hooks for layer in learner.access.layers)


def test_a_user_who_was_moved_between_two_steps_is_refused(pair):
    learner = pair[0]
    steps = learner.observe_in_steps(words(1, 30), users=["ada"])
    next(steps)
    learner.pool.forget("ada")
    for user in ("bob", "ada"):  # bob takes the slot that ada had
        learner.pool.open(user)
    before = [learner.pool.export(user) for user in ("ada", "bob")]
    with pytest.raises(RuntimeError, match="another slot"):
        finish(steps)
    assert_same(before[0], learner.pool.export("ada"))
    assert_same(before[1], learner.pool.export("bob"))


def test_wrong_arguments_are_refused_before_the_first_step(pair):
    learner = pair[0]
    with pytest.raises(ValueError, match="users"):
        learner.observe_in_steps(words(1, 5), users=["ada", "bob"])
    with pytest.raises(ValueError, match=r"vocabulary|input_ids"):
        learner.observe_in_steps(words(1, 5) + VOCAB, users=["ada"])
    with pytest.raises(ValueError, match="user must be given"):
        learner.study_in_steps()
    with pytest.raises(ValueError, match="passes"):
        learner.study_in_steps("ada", passes=0)
    single = ttt.Learner(ttt.adapt_(tiny(), ttt.TTTConfig(TARGETS["llama"])))
    with pytest.raises(ValueError, match="one set"):
        single.observe_in_steps(words(1, 5), users=["ada"])
    assert learner.pool.users == ()
