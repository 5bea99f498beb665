"""States from outside: whatever is wrong with one, it is refused and nothing changes, or the user goes on normally."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_pool import assert_unchanged, state_of

import ttt
from ttt.defences import LowRank

IN, OUT, RANK, WINDOW = 5, 4, 2, 3


def pool_of(rate="rms", dtype=torch.float32):
    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT), torch.nn.Linear(OUT, IN)).to(dtype)
    config = ttt.TTTConfig(
        target_modules="all-linear", per_user=LowRank(slots=2, rank=RANK, window=WINDOW), rate=rate, lr=0.1,
        ewc_lambda=0.1, replay_rows=2, replay_capacity=8, orthogonal=0, burst=None,
    )  # fmt: skip
    pool = ttt.pool_of(ttt.adapt_(model, config))
    for layer in pool.layers.values():
        for name in ("importance_m", "importance_n", "memory"):
            getattr(layer, name).uniform_()
        layer.seen.fill_(5)
    return model, pool


def teach(pool, user, rows):
    for layer in pool.layers.values():
        x, delta = torch.randn(rows, layer.in_features), torch.randn(rows, layer.out_features)
        x, delta = x.to(layer.weight.dtype), delta.to(layer.weight.dtype)
        users = torch.full((rows,), pool.open(user), dtype=torch.int32)
        x, delta, steps = layer.steps(x, delta, users)
        layer.learn(x, delta, steps.eta, users)
        layer.count(steps.grown, torch.arange(pool.slots) == pool.slot(user))


def with_entry(value):
    """Writes ``value`` somewhere into a tensor."""

    def change(t, at):
        t = t.clone()
        if t.numel():
            t.view(-1)[at % t.numel()] = value
        return t

    return change


MUTATIONS = {
    "nan": with_entry(float("nan")), "inf": with_entry(float("inf")), "minus inf": with_entry(float("-inf")),
    "negative": with_entry(-1.5), "small": with_entry(1e-30), "large": with_entry(1e4), "half": with_entry(0.5),
    "a large whole number": with_entry(2**61), "zeros": lambda t, at: torch.zeros_like(t),
    "another sign": lambda t, at: -t, "reversed": lambda t, at: t.flip(0),
    "one row less": lambda t, at: t[:-1], "one row more": lambda t, at: torch.cat([t, t[:1]]),
    "many rows": lambda t, at: t.new_zeros((RANK + WINDOW + 1, *t.shape[1:])),
    "one column less": lambda t, at: t[..., :-1], "flat": lambda t, at: t.flatten(), "a number": lambda t, at: t.sum(),
    "double": lambda t, at: t.double(), "half precision": lambda t, at: t.half(), "int64": lambda t, at: t.long(),
    "int32": lambda t, at: t.int(), "bool": lambda t, at: t.bool(), "complex": lambda t, at: t.to(torch.complex64),
    "sparse": lambda t, at: t.to_sparse(), "without data": lambda t, at: t.to("meta"),
    "a list": lambda t, at: t.tolist(), "none": lambda t, at: None, "a float": lambda t, at: 1.0,
    "not contiguous": lambda t, at: torch.stack([t, t], -1)[..., 0],
    "requires grad": lambda t, at: t.clone().requires_grad_(t.is_floating_point()),
}  # fmt: skip
NOT_KEYS = [None, 3, "a", "0", ".a", "0.", "2.a", "0.rows", "0.moments.a", "0.a.b"]


def changed(change, t, at):
    """``change(t, at)``, in float64 where integers cannot hold NaN and the like; ``t`` if it has no rows to change."""
    try:
        return change(t, at)
    except IndexError:  # an earlier change has made it a number
        return t
    except (RuntimeError, OverflowError):
        return change(t.double(), at)


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(0, 2 * WINDOW + RANK),
    changes=st.lists(st.tuples(st.integers(0, 30), st.sampled_from(sorted(MUTATIONS)), st.integers(0, 50)), max_size=2),
    drop=st.one_of(st.none(), st.integers(0, 30)),
    extra=st.one_of(st.none(), st.sampled_from(NOT_KEYS)),
    rate=st.sampled_from(["rms", "constant"]),
    seed=st.integers(0, 2**31),
)
def test_a_changed_state_is_refused_or_works(rows, changes, drop, extra, rate, seed):
    torch.manual_seed(seed)
    model, pool = pool_of(rate)
    teach(pool, "other", 4)
    if rows:
        teach(pool, "ada", rows)
    else:
        pool.open("ada")
    state = pool.export("ada")
    names = sorted(state)
    for at, kind, where in changes:
        name = names[at % len(names)]
        if isinstance(state[name], torch.Tensor) and not state[name].is_sparse and not state[name].is_meta:
            state[name] = changed(MUTATIONS[kind], state[name], where)
    if drop is not None:
        state.pop(names[drop % len(names)])
    if extra is not None:
        state[extra] = torch.zeros(1)
    before, other = state_of(pool), pool.export("other")
    given_state = dict(state)
    try:
        pool.load("ada", state)
    except (ValueError, TypeError):
        assert_unchanged(pool, before)
        return
    assert all(state[k] is t for k, t in given_state.items())
    loaded = pool.export("ada")
    assert all(torch.equal(loaded[k], t) for k, t in state.items())
    assert all(torch.equal(pool.export("other")[k], t) for k, t in other.items())
    for _ in range(4):  # to a compression and past it
        x = torch.randn(2, IN)
        with ttt.users(model, ["ada", "other"]), torch.no_grad():
            assert torch.isfinite(model(x)).all()
        teach(pool, "ada", 2)
    again = pool.export("ada")
    pool.load("ada", again)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("0.eta_sum", torch.tensor([-0.1]), r"0\.eta_sum must be in \[0, inf\), got -0.1"),
    ("0.lost", torch.tensor([-2.0]), r"0\.lost must be in \[0, inf\), got -2.0"),
    ("1.step", torch.tensor([-1]), r"1\.step must be in \[0, 4611686018427387904\), got -1"),
    ("1.step", torch.tensor([2**62]), r"1\.step must be in \[0, 4611686018427387904\)"),
    ("1.step", torch.tensor([0]), r"1\.lost must be 0 before the first compression"),
    ("0.moments", torch.tensor([[1.0, 1.0, 1.5]], dtype=torch.float64), r"0\.moments must end in a number of tokens"),
    ("0.moments", torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64), r"0\.moments must end in a number of tokens"),
    ("0.a", [1.0], r"0\.a must be a dense tensor with data, got list"),
    ("0.b", torch.zeros(2, OUT).to_sparse(), r"0\.b must be a dense tensor with data, got a torch\.sparse_coo tensor"),
])  # fmt: skip
def test_what_is_wrong_with_a_state_is_named(name, value, message):
    _, pool = pool_of()
    teach(pool, "ada", 9)
    state, before = pool.export("ada"), state_of(pool)
    with pytest.raises((ValueError, TypeError), match=message):
        pool.load("ada", state | {name: value})
    with pytest.raises(TypeError, match="must be a dict of tensors by name, got list"):
        pool.load("ada", [1])
    pool.on_miss = lambda user: state | {name: value}
    with pytest.raises((ValueError, TypeError), match=message):
        pool.open("bob")
    assert_unchanged(pool, before)


def test_a_slot_without_rows_has_no_steps():
    _, pool = pool_of()
    pool.open("ada")
    state = pool.export("ada")
    with pytest.raises(ValueError, match=r"0\.eta_sum must be 0 for a slot without rows, got 0.5"):
        pool.load("ada", state | {"0.eta_sum": torch.tensor([0.5])})
