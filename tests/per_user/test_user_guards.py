"""A guard for each user: it acts on that user alone, keeps within the bound, and goes where the user's state goes."""

import pytest
import torch
from test_user_learning import adapted, assert_same, exports
from tiny_models import ids_of, tiny

import ttt
from ttt.per_user.guards import UserGuards

PROTECTED = {"ewc_lambda": 1e-4, "replay_rows": 4, "replay_beta": 0.1}


def known_by(model):
    """(4, 30) tokens: what the model itself writes."""
    with torch.no_grad():
        return model.generate(ids_of(4, 2), max_new_tokens=28, do_sample=True, temperature=0.3, pad_token_id=0)


def guarded(base=None, held_back=None, protected=True, slots=4, lr=0.3, **options):
    model, learner = adapted(slots=slots, lr=lr, window=8, **(PROTECTED if protected else {}))
    if base is not None:
        model.load_state_dict(base)
    held_back = known_by(model) if held_back is None else held_back
    if protected:
        learner.calibrate([held_back])
    options = {"threshold": 0.002, "every": 16, **options}
    return model, learner, UserGuards(model, [held_back], **options)


def held_back_of(guards):
    return guards.batches[0]


def loss_of(model, ids, user):
    """By hand: with the weights of ``user``, or the base model's."""
    with torch.no_grad(), ttt.users(model, [user] * len(ids)):
        logits = model(ids).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


@pytest.mark.parametrize("protected", [True, False])
def test_every_check_leaves_a_user_within_the_bound(protected):
    model, learner, guards = guarded(protected=protected)
    held_back = held_back_of(guards)
    reference = loss_of(model, held_back, None)
    assert guards.reference == pytest.approx(reference, rel=1e-5)
    learnt = 0
    for _ in range(12):
        learner.observe(ids_of(1, 17), users=["a"])
        learnt += 16
        drift = loss_of(model, held_back, "a") / reference - 1
        check = guards.history[-1]
        assert (check.user, check.tokens) == ("a", learnt)
        assert drift <= 0.003 * (1 + 1e-4)
        assert check.rolled_back == (check.drift > 0.003)
        if not check.rolled_back:
            assert check.drift == pytest.approx(drift, abs=1e-6)
        assert guards.strength("a") == check.strength
    assert len(guards.history) == 12
    assert any(check.rolled_back for check in guards.history)
    assert any(not check.rolled_back for check in guards.history)
    strengths = [4.0**1.5] + [check.strength for check in guards.history]
    for check, before, after in zip(guards.history, strengths, strengths[1:], strict=False):
        exponent = 0.5 if check.rolled_back else max(-1 / 16, min(0.5, check.drift / 0.002 - 1))
        assert after == pytest.approx(min(256.0, max(1.0, before * 4.0**exponent)), rel=1e-9)


@pytest.mark.parametrize("protected", [True, False])
def test_a_users_guard_acts_on_that_user_alone(protected):
    """Another user is rolled back in one of the two runs only: of the first user not a bit differs."""
    ids, first, found = ids_of(6, 40), tiny(), []
    held_back, base = known_by(first), first.state_dict()
    for harmful in (False, True):
        _, learner, guards = guarded(base, held_back, protected)
        other = torch.full_like(ids[:1], 5)
        nll = []
        for row in range(0, 6, 2):
            text = ids[row + 1 : row + 2] if harmful else other
            nll.append(learner.observe(torch.cat([ids[row : row + 1], text]), users=["a", "b"]).nll[0])
        mine = [(c.tokens, c.drift, c.strength, c.rolled_back) for c in guards.history if c.user == "a"]
        assert len(mine) == 6
        found.append(exports(learner.pool, "a") | {"nll": torch.stack(nll), "checks": torch.tensor(mine).double()})
        found[-1]["theirs"] = learner.pool.export("b")["model.layers.2.mlp.down_proj.a"]
    assert not torch.equal(found[0].pop("theirs"), found[1].pop("theirs"))
    assert_same(*found)


def test_a_rollback_brings_back_the_last_good_state_to_the_bit():
    model, learner, guards = guarded(every=10**6)
    held_back = held_back_of(guards)
    learner.observe(ids_of(2, 17), users=["a", "b"])
    assert guards.history == []
    guards.bound = guards.threshold = 10.0  # whatever was learnt is good
    guards.check("a")
    good, other = learner.pool.export("a"), learner.pool.export("b")
    learner.observe(ids_of(1, 17), users=["a"])
    guards.bound = guards.threshold = 1e-9
    before = guards.strength("a")
    drift = guards.drift("a")
    assert drift == pytest.approx(loss_of(model, held_back, "a") / guards.reference - 1, abs=1e-6)
    assert drift > 1e-9
    check = guards.check("a")
    assert check.rolled_back
    assert check.strength == pytest.approx(2 * before)
    after = learner.pool.export("a")
    progress = after.pop("ttt.guard.progress")
    assert progress[2:].tolist() == [32, 0]
    good.pop("ttt.guard.progress")
    assert_same(good, after)
    assert_same(other, learner.pool.export("b"))


def test_checks_change_no_bit_and_not_the_order_of_eviction():
    _, learner, guards = guarded(every=10**6, threshold=10.0)
    learner.observe(ids_of(2, 17), users=["a", "b"])
    before, order = exports(learner.pool, "a", "b"), learner.pool.users
    strength = guards.strength("a")
    guards.check("a")
    after = exports(learner.pool, "a", "b")
    for state in (before, after):
        state.pop("a.ttt.guard.progress")
    assert_same(before, after)
    assert learner.pool.users == order
    assert guards.strength("a") == pytest.approx(strength * 4.0 ** (-1 / 16))


def test_protection_of_each_slot_has_its_own_strength():
    """Against compressing the slots one by one, each with the options of its strength."""
    _, learner, guards = guarded(every=10**6)
    learner.observe(ids_of(3, 12), users=["a", "b", "c"])
    layer = learner.pool.layers["model.layers.3.mlp.down_proj"]
    for user, strength in (("a", 1.0), ("b", 7.0), ("c", 200.0)):
        guards._set(guards._users[user], strength)
    options = layer.compress_options(7.0)
    assert options["lam"] == pytest.approx(7e-4)
    assert options["beta"] == pytest.approx(0.7)
    assert layer.compress_options(200.0)["beta"] == 1.0
    assert layer.compress_options(1.0) == layer.compress_options()
    state = [getattr(layer, name) for name in ("a", "b", "rows", "eta_sum", "lost", "step")]
    want = [t.clone() for t in state]
    for user, strength in (("a", 1.0), ("b", 7.0), ("c", 200.0)):
        slot = torch.tensor([learner.pool.slot(user)])
        ttt.ops.low_rank_compress(*want, slot, **layer.compress_options(strength))
    layer.compress(torch.tensor([True, True, True, False]))
    assert all(torch.equal(t, u) for t, u in zip(state, want, strict=True))
    assert layer.step.tolist()[:3] == [2, 2, 2]


def test_surprising_chunks_are_learnt_slowly_and_only_by_their_user():
    _, _, guards = guarded(every=10**6, surprise=1.5)
    for user in "ab":
        guards.pool.open(user)
    slots, level = torch.tensor([1, 0, -1], dtype=torch.int32), guards.reference
    nll = torch.tensor([[4.0, 2.0], [1.0, 1.0], [9.0, 9.0]]) * level
    targets, bad = torch.tensor([[True, True], [True, False], [True, True]]), torch.zeros(4, dtype=torch.bool)
    factors = guards.pace(slots, nll, targets, bad)
    assert factors.tolist() == pytest.approx([1.0, (1.5 / 3) ** 4, 1.0, 1.0])
    share = 2 / 65536
    assert guards._users["b"].level == pytest.approx(level * (1 + share * 0.5), rel=1e-9)
    assert [guards._users[user].tokens for user in "ab"] == [1, 2]
    assert guards.pace(slots, nll * torch.nan, targets, ~bad).tolist() == [1.0] * 4
    assert [guards._users[user].since for user in "ab"] == [1, 2]


def test_strength_and_level_go_with_the_users_state():
    kept = {}
    _, learner, guards = guarded(slots=1)
    learner.pool.on_evict, learner.pool.on_miss = kept.__setitem__, kept.get
    for _ in range(5):
        learner.observe(ids_of(1, 17), users=["a"])
    learner.observe(ids_of(1, 9), users=["a"])
    assert len(guards.history) == 5
    before = guards.strength("a")
    learner.observe(ids_of(1, 9), users=["b"])  # evicts "a", after a check
    assert guards.history == []  # "b" has not been checked, and "a" has no slot
    strength = float(kept["a"]["ttt.guard.progress"][0])
    assert strength != before
    assert kept["a"]["ttt.guard.progress"][2:].tolist() == [88, 0]
    assert guards.strength("b") == 8.0
    assert set(guards._users) == {"b"}
    learner.pool.open("a")
    assert guards.strength("a") == strength
    assert all(layer.strengths == {0: strength} for layer in learner.pool.layers.values())
    assert_same(kept["a"], learner.pool.export("a"))
    learner.pool.forget("a")
    assert all(layer.strengths == {} for layer in learner.pool.layers.values())
    with pytest.raises(KeyError, match="user 'a' has no slot"):
        guards.strength("a")


def test_a_state_past_the_bound_is_no_good_state():
    """It is taken, but the next check rolls back to the base model."""
    _, learner, guards = guarded(every=10**6)
    for _ in range(6):
        learner.observe(ids_of(1, 17), users=["a"])
    state = learner.pool.export("a")
    assert guards.drift("a") > guards.bound
    for changed in (state, {k: t for k, t in state.items() if k != "ttt.guard.progress"}):
        learner.pool.load("b", changed)
        assert guards.check("b").rolled_back
        assert all(t.numel() == 0 for k, t in learner.pool.export("b").items() if k.endswith((".a", ".b")))
        assert guards.drift("b") == 0.0


@pytest.mark.parametrize(("progress", "message"), [
    (torch.zeros(4), r"progress must be torch.float64 of shape \(4,\), got torch.float32 \(4,\)"),
    ([1.0], "got list"),
    (torch.tensor([0.5, 1, 0, 0], dtype=torch.float64), "strength >= 1, level > 0"),
    (torch.tensor([1, 0, 0, 0], dtype=torch.float64), "strength >= 1, level > 0"),
    (torch.tensor([1, 1, 0.5, 0], dtype=torch.float64), "two counts"),
    (torch.tensor([1, 1, 1, 2], dtype=torch.float64), "two counts"),
    (torch.tensor([1, torch.nan, 1, 1], dtype=torch.float64), "level > 0"),
    (torch.tensor([torch.inf, 1, 1, 1], dtype=torch.float64), "strength >= 1"),
])  # fmt: skip
def test_progress_that_cannot_be_is_refused_and_nothing_changes(progress, message):
    _, learner, guards = guarded()
    learner.observe(ids_of(1, 12), users=["a"])
    state, before = learner.pool.export("a"), exports(learner.pool, "a")
    with pytest.raises((ValueError, TypeError), match=message):
        learner.pool.load("a", state | {"ttt.guard.progress": progress})
    with pytest.raises(ValueError, match=r"needs the tensor 'progress', got \['other'\]"):
        learner.pool.load("a", {k.replace("progress", "other"): t for k, t in state.items()})
    assert_same(before, exports(learner.pool, "a"))
    guards.close()
    assert learner.pool.companion is None
    assert "ttt.guard.progress" not in learner.pool.export("a")


def test_guards_are_refused_where_they_cannot_be_right():
    model, learner, _ = guarded()
    with pytest.raises(ValueError, match="model has guards for its users already"):
        UserGuards(model, [ids_of(2, 9)])
    model, learner = adapted()
    for batches, message in (
        ([], "at least one batch"), ([ids_of(2, 1)], "at least 2 tokens"), ([ids_of(2, 9).int()], "int64"),
        (5, "batches must be a list"), ([ids_of(2, 9) + 1000], "each of batches must be in"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=message):
            UserGuards(model, batches)
    learner.observe(ids_of(1, 9), users=["a"])
    with pytest.raises(ValueError, match=r"before users learn: \['a'\] have slots already"):
        UserGuards(model, [ids_of(2, 9)])
    with pytest.raises(ValueError, match="has one set of weights for all"):
        UserGuards(tiny(), [ids_of(2, 9)])
    with pytest.raises(ValueError, match="threshold must be a number"):
        UserGuards(model, [ids_of(2, 9)], threshold=0.0)
