"""Names to slots: who is evicted, what callbacks get, and what an error leaves behind."""

import warnings

import pytest
import torch
from helpers import plain_config

import ttt
from ttt.defences import LowRank


def model_of(slots=3, layers=2):
    model = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(layers)))
    config = plain_config(target_modules="all-linear", per_user=LowRank(slots=slots, rank=2, window=3), lr=0.1)
    ttt.adapt_(model, config)
    return model, ttt.pool_of(model)


def teach(pool, user, rows=2):
    for layer in pool.layers.values():
        x, delta, eta = torch.randn(rows, 6), torch.randn(rows, 6), torch.rand(rows)
        layer.learn(x, delta, eta, torch.full((rows,), pool.open(user), dtype=torch.int32))


def state_of(pool):
    tensors = {f"{n}.{k}": t.clone() for n, layer in pool.layers.items() for k, t in layer.named_buffers()}
    return tensors, pool.users


def assert_unchanged(pool, before):
    tensors, users = state_of(pool)
    assert users == before[1]
    assert [k for k, t in tensors.items() if not torch.equal(t, before[0][k])] == []


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


def test_the_user_not_named_for_the_longest_time_makes_room():
    _, pool = model_of()
    kept = {}
    pool.on_evict, pool.on_miss = kept.__setitem__, kept.get
    for user in "abc":
        teach(pool, user)
    pool.open("a")
    before = {user: pool.export(user) for user in "abc"}
    slot = pool.slot("b")
    assert pool.open("d") == slot
    assert pool.users == ("c", "a", "d")
    assert same(kept["b"], before["b"])
    assert all(t.shape[0] == 0 for k, t in pool.export("d").items() if k.endswith(".a"))  # begins with the base model
    assert pool.open("b") == pool.slot("b")  # comes back, in the place of "c"
    assert pool.users == ("a", "d", "b")
    assert same(pool.export("b"), before["b"])
    assert same(pool.export("a"), before["a"])


def test_the_first_loss_of_learnt_weights_is_warned_of():
    _, pool = model_of()
    for user in "abc":
        pool.open(user)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool.open("d")  # "a" learnt nothing
        teach(pool, "b")
        pool.evict("c")  # asked for
        pool.open("c")
        pool.open("d")
    assert pool.users == ("b", "c", "d")
    with pytest.warns(UserWarning, match="'b' is evicted, and what they learnt is lost"):
        pool.open("e")
    teach(pool, "c")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool.open("f")  # said once
    _, pool = model_of()
    pool.on_evict = lambda *kept: None
    for user in "abc":
        teach(pool, user)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool.open("d")


def test_state_is_plain_tensors_by_layer():
    _, pool = model_of()
    teach(pool, "ada", rows=2)
    state = pool.export("ada")
    names = {f"{layer}.{key}" for layer in "01" for key in ("a", "b", "eta_sum", "lost", "step")}
    assert set(state) == names
    assert state["0.a"].shape == (2, 6)
    state["0.a"].zero_()  # a copy
    assert float(pool.export("ada")["0.a"].abs().sum()) > 0
    assert pool.lost("ada") == {"0": 0.0, "1": 0.0}
    teach(pool, "ada", rows=3)
    assert all(v > 0 for v in pool.lost("ada").values())


def test_forgetting_zeroes_the_memory():
    _, pool = model_of()
    teach(pool, "a")
    teach(pool, "b")
    slot, other = pool.slot("a"), pool.export("b")
    called = []
    pool.on_evict = lambda *args: called.append(args)
    pool.forget("a")
    pool.forget("nobody")
    for layer in pool.layers.values():
        for name in ("a", "b", "rows", "eta_sum", "lost", "step"):
            assert float(getattr(layer, name)[slot].abs().sum()) == 0
    assert same(pool.export("b"), other)
    assert called == []
    assert pool.users == ("b",)
    pool.forget_all()
    assert pool.users == ()


def test_users_of_a_batch_are_not_evicted_for_each_other():
    model, pool = model_of(slots=2)
    pool.open("old")
    with ttt.users(model, ["a", None, "b", "a"]) as slots:
        assert slots.tolist() == [pool.slot("a"), -1, pool.slot("b"), pool.slot("a")]
        with pytest.raises(RuntimeError, match="all 2 slots belong to users of the present batch"):
            pool.open("c")
        for what in (pool.evict, pool.forget):
            with pytest.raises(RuntimeError, match="user 'a' is in use"):
                what("a")
        with pytest.raises(KeyError, match="no user can be evicted"):
            pool.evict()
        with ttt.users(model, ["b"]) as inner:
            assert inner.tolist() == [pool.slot("b")]
        assert pool.routing.slots is slots
    assert pool.routing.slots is None
    assert pool.evict() == "a"
    with (
        pytest.raises(ValueError, match="names 3 users, but the model was adapted for 2"),
        ttt.users(model, ["c", "d", "e"]),
    ):
        pass
    for wrong in ([], "ab"):
        with pytest.raises(ValueError, match="users must be a list"), ttt.users(model, wrong):
            pass


def test_errors_change_nothing():
    _, pool = model_of(slots=2)
    for user in "ab":
        teach(pool, user)
    state = pool.export("a")
    before = state_of(pool)

    def failing(*args):
        raise OSError("disk full")

    pool.on_evict = failing
    with pytest.raises(OSError, match="disk full"):
        pool.open("c")
    assert_unchanged(pool, before)
    pool.on_evict, pool.on_miss = None, lambda user: {"0.a": torch.zeros(1, 6)}
    with pytest.raises(ValueError, match="needs the tensors"):
        pool.open("c")
    pool.on_miss = failing
    with pytest.raises(OSError, match="disk full"):
        pool.open("c")
    with pytest.raises(ValueError, match="got None"):
        pool.open(None)
    with pytest.raises(KeyError, match="user 'c' has no slot"):
        pool.export("c")
    with pytest.raises(ValueError, match=r"tensors of other layers: 9; users of this model learn in 0, 1$"):
        pool.load("a", {**state, "9.a": torch.zeros(1)})
    others = {f"{layer}.{key}": torch.zeros(1) for layer in (10, 7, 8, 9) for key in "ab"}
    with pytest.raises(ValueError, match=r"tensors of other layers: 7 to 10 \(4\); users"):
        pool.load("a", state | others)
    with pytest.raises(ValueError, match="tensors of other layers: 'rows'; users of this model"):
        pool.load("a", {**state, "rows": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"1\.b must be finite"):
        pool.load("c", {**state, "1.b": state["1.b"] * torch.inf})
    assert_unchanged(pool, before)


@pytest.mark.parametrize("call", ["open", "load", "evict"])
def test_eviction_inside_of_on_evict_is_refused(call):
    _, pool = model_of(slots=2)
    for user in "ab":
        teach(pool, user)
    state, before, calls = pool.export("a"), state_of(pool), []

    def on_evict(user, _):
        calls.append(user)
        pool.load("d", state) if call == "load" else getattr(pool, call)("b" if call == "evict" else "d")

    pool.on_evict = on_evict
    with pytest.raises(
        RuntimeError, match="on_evict, which was called with user 'a', must not evict a user or open one"
    ):
        pool.open("c")
    assert calls == ["a"]
    assert_unchanged(pool, before)
    pool.on_evict = lambda user, _: pool.open("b")  # has a slot
    pool.open("c")
    assert pool.users == ("b", "c")


def test_load_puts_a_state_into_any_slot_and_pool():
    _, pool = model_of()
    _, other = model_of()
    for user in "abc":
        teach(pool, user, rows=4)
    states = {user: pool.export(user) for user in "abc"}
    for user in "cab":
        other.load(user, states[user])
    teach(pool, "a")
    pool.load("a", states["a"])
    assert all(same(p.export(u), states[u]) for p in (pool, other) for u in "abc")
    pool.load("c", states["b"])
    assert same(pool.export("c"), states["b"])


def test_a_model_without_users_says_so():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match="has one set of weights for all"):
        ttt.pool_of(model)
    model, _ = model_of()
    with pytest.raises(ValueError, match="keep_learned must be False"):
        ttt.restore_(model, keep_learned=True)
    x = torch.randn(2, 6)
    y = model(x)
    ttt.restore_(model)
    assert all(type(layer) is torch.nn.Linear for layer in model)
    assert torch.equal(model(x), y)
    with pytest.raises(ValueError, match="has one set of weights for all"):
        ttt.pool_of(model)
