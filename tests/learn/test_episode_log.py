"""The log of what was learnt: what is kept of a text, with whom it travels and goes, and what is refused."""

import pytest
import torch
from studying import learner_of, told, words
from tiny_models import tiny

import ttt


def test_what_a_user_said_travels_with_their_state_and_goes_with_it():
    learner = learner_of(2)
    ids = words(1, 20)
    told(learner, ids, torch.ones_like(ids, dtype=torch.bool), "ada")
    state = learner.pool.export("ada")
    other = learner_of(2)
    other.pool.load("ada", state)
    assert [
        torch.equal(a.ids, b.ids) for a, b in zip(other.episodes.of("ada"), learner.episodes.of("ada"), strict=True)
    ]
    kept = {}
    other.pool.on_evict = kept.__setitem__
    for user in ("bob", "eve"):
        other.pool.open(user)
    assert not other.episodes.of("ada")
    assert torch.equal(kept["ada"]["episodes.ids"], state["episodes.ids"])
    learner.pool.forget("ada")
    assert not learner.episodes.of("ada")
    assert "ada" not in learner.episodes._held
    wrong = {**state, "episodes.lengths": state["episodes.lengths"] + 1}
    with pytest.raises(ValueError, match=r"episodes\.lengths must add up"):
        learner.pool.load("ada", wrong)
    assert not learner.episodes.of("ada")
    assert "ada" not in learner.pool.users


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ids", lambda t: -t), ("ids", lambda t: t.float()), ("ids", lambda t: t[None]), ("learn", lambda t: ~t),
        ("learn", lambda t: t[1:]), ("lengths", lambda t: t[:0]), ("lengths", lambda t: t * 0),
        ("learn", lambda t: t & False),
        ("studied", lambda t: t.long()), ("studied", lambda t: torch.cat([t, t])), ("ids", lambda t: t.numpy()),
    ],
)  # fmt: skip
def test_forged_episodes_are_refused_by_name(name, value):
    log = ttt.EpisodeLog()
    log.add("ada", words(1, 9)[0], torch.ones(9, dtype=torch.bool))
    state = log.export("ada")
    log.check_state(state)
    with pytest.raises((ValueError, TypeError), match="episodes"):
        log.check_state({**state, name: value(state[name])})
    with pytest.raises(ValueError, match="episodes needs the tensors"):
        log.check_state({key: t for key, t in state.items() if key != name})


def test_every_learnt_token_is_kept_once_with_the_tokens_before_it():
    log = ttt.EpisodeLog(tokens=10_000, length=12, before=3)
    for _ in range(20):
        length = int(torch.randint(2, 60, ()))
        ids = torch.arange(length) + 1000  # a token tells its place
        learn = torch.rand(length) < 0.7
        log.add("ada", ids, learn)
        found = log.of("ada")
        places = torch.cat([e.ids[e.learn] for e in found] or [ids[:0]]) - 1000
        assert places.tolist() == learn[1:].nonzero()[:, 0].add(1).tolist()
        for episode in found:
            assert len(episode.ids) <= 12
            assert torch.equal(episode.ids, torch.arange(int(episode.ids[0]), int(episode.ids[-1]) + 1))
            first = int(episode.learn.nonzero()[0])
            assert first == min(3, int(episode.ids[first]) - 1000)
            assert not bool(episode.learn[:first].any())
        log.forget("ada")


def test_the_oldest_episodes_are_dropped():
    log = ttt.EpisodeLog(tokens=30, length=10, before=1)
    for at in range(9):
        log.add("ada", torch.full((8,), at), torch.ones(8, dtype=torch.bool))
    assert [int(e.ids[0]) for e in log.of("ada")] == [6, 7, 8]
    log.add("bob", torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.bool))
    assert "bob" not in log._held


def test_observe_keeps_what_was_learnt_and_nothing_else():
    learner = learner_of(2, lr=0.05)
    ids, attend, learn = words(3, 20), torch.ones((3, 20)).long(), torch.zeros((3, 20)).long()
    attend[0, :4] = 0
    learn[0, 6:9] = learn[1, 5:] = learn[2, 5:] = 1
    learner.observe(ids, attention_mask=attend, learn_mask=learn, users=["ada", "bob", None])
    (ada,), (bob,) = learner.episodes.of("ada"), learner.episodes.of("bob")
    assert torch.equal(ada.ids[ada.learn], ids[0, 6:9])
    assert torch.equal(ada.ids, ids[0, 4:9])  # no padding
    assert torch.equal(bob.ids[bob.learn], ids[1, 5:])
    assert not learner.episodes.of(None)
    learner.observe(ids, learn=False, users=["ada", "bob", None])
    assert len(learner.episodes.of("ada")) == 1


@pytest.mark.parametrize("users", [None, 1])
def test_the_token_after_a_gap_was_not_learnt_and_is_not_studied(users):
    learner = learner_of(users, lr=0.05)
    ids = words(1, 12)
    attend = torch.ones((1, 12), dtype=torch.bool)
    attend[0, 5:7] = False
    seen = learner.observe(ids, attention_mask=attend, users=users and ["ada"])
    kept = learner.episodes.of(users and "ada")
    assert sum(int(episode.learn.sum()) for episode in kept) == int(seen.mask.sum()) == 8
    learnt = [int(t) for e in kept for t, is_learnt in zip(e.ids, e.learn, strict=True) if is_learnt]
    assert learnt == ids[0, 1:5].tolist() + ids[0, 8:].tolist()


def test_rejected_text_is_not_kept(monkeypatch):
    learner = learner_of(lr=0.05)
    with torch.no_grad():
        learner.model.get_input_embeddings().weight[3] = float("nan")
    ids = words(1, 20)
    ids[0, 10] = 3
    assert learner.observe(ids).rejected
    assert not learner.episodes.of()


def test_a_log_is_refused_where_it_could_not_be_kept():
    learner = learner_of()
    with pytest.raises(ValueError, match="learner must have no log of episodes"):
        ttt.GrowingLearner(learner)
    with pytest.raises(ValueError, match="learner must have no log of episodes"):
        ttt.GraphedLearner(learner, batch=1)
    users = learner_of(1)
    with pytest.raises(ValueError, match=r"episodes must be the log that the model's users have already"):
        ttt.Learner(users.model, episodes=ttt.EpisodeLog())
    assert ttt.Learner(users.model, episodes=users.episodes).pool.episodes is users.episodes
    told(users, words(1, 9), torch.ones((1, 9), dtype=torch.bool))
    plain = ttt.Learner(ttt.adapt_(tiny(), users.config))
    with pytest.raises(ValueError, match=r"ttt\.EpisodeLog\(\)"):
        plain.pool.load("ada", users.pool.export("ada"))
    for ids, learn in [(words(1, 4)[0], torch.ones(6).bool()), (torch.rand(4), torch.ones(4).bool())]:
        with pytest.raises(ValueError, match="ids and learn must be"):
            learner.episodes.add(None, ids, learn)


def test_a_snapshot_without_a_log_leaves_the_log_alone():
    learner = learner_of(lr=0.05)
    snapshot = ttt.Learner(learner.model).snapshot()
    learner.observe(words(1, 20))
    learner.rollback(snapshot)
    assert learner.episodes.of()
