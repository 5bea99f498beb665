"""Users' steps in units of their own gradients, and updates outside what calibration read: against loops by hand."""

import pytest
import torch
from helpers import plain_config
from rates_by_hand import burst_by_hand, roots_by_hand, steps_by_hand
from test_low_rank_layer import layer_of
from test_user_learning import adapted, assert_same, exports
from tiny_models import TARGETS, ids_of, tiny

import ttt
from ttt.defences import LowRank
from ttt.nn.directions import principal_directions
from ttt.nn.rates import CALIBRATED, STREAM, places

SCALED = ["energy", "rms", "decrease"]
BOUNDED = [("energy", None), ("rms", None), ("rms", 0.6), ("decrease", None), ("decrease", 0.6)]
NOBODY = -1


def scaled(n=9, m=7, dtype=torch.float64, calibrated=True, **options):
    """A layer with moments and, if asked for, a basis, as if calibrated."""
    layer = layer_of(n, m, dtype, replay_capacity=8, **options)
    layer._largest_step = torch.inf  # tests/nn/test_kronecker.py has it
    if calibrated:
        layer.calibrated.copy_(torch.tensor([3.5, 0.7, 4.0]))
    if layer.basis is not None:
        k = len(layer.basis)
        layer.basis.copy_(torch.linalg.qr(torch.randn(n, k, dtype=torch.float64)).Q.T)
    return layer


def rows_of(layer, count):
    size, kind = torch.randn(count, 1).exp(), layer.weight.dtype
    x, delta = torch.randn(count, layer.in_features) * size, torch.randn(count, layer.out_features) * size.flip(0)
    return x.to(kind), delta.to(kind)


def read(layer, x, delta, users):
    """One chunk, learnt; the inputs that were applied and the steps."""
    applied, changed, steps = layer.steps(x, delta, users)
    layer.learn(applied, changed, steps.eta, users)
    layer.count(steps.grown, torch.ones(layer.low_rank.slots, dtype=torch.bool))
    return applied, steps


@pytest.mark.parametrize(("rate", "burst"), BOUNDED)
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "m", "k"), [(1, 1, 0), (33, 7, 0), (9, 40, 3)])
def test_steps_are_those_of_each_user_by_hand(rate, burst, clip, calibrated, dtype, n, m, k):
    """Tokens interleaved, users who come late, come twice or not at all; in float64, token by token."""
    options = {"rate": rate, "clip": clip, "burst": burst, "orthogonal": k}
    layer = scaled(n, m, dtype, calibrated, **options, low_rank=LowRank(slots=4, rank=2, window=4))
    start = tuple(layer.calibrated.tolist())
    state, tolerance = dict.fromkeys(range(4), start), 1e-12 if dtype == torch.float64 else 1e-5
    for count in (11, 1, 0, 6):
        (x, delta), users = rows_of(layer, count), torch.randint(-1, 3, (count,), dtype=torch.int32)
        applied, steps = read(layer, x, delta, users)
        assert steps.eta.dtype == layer.eta_sum.dtype
        assert bool(steps.finite[users >= 0].all())
        for user in range(3):
            own = users == user
            raw, before = (x[own], delta[own]), state[user]
            rows = applied[own], delta[own]
            raw = raw if rate == "decrease" else None
            expected, state[user] = steps_by_hand(*rows, layer.config, before, raw)
            if burst is not None and own.any():
                roots = roots_by_hand(*rows, layer.config, before, raw)
                expected = burst_by_hand(*rows, expected, layer.config, roots, raw)
            torch.testing.assert_close(steps.eta[own].double(), expected, rtol=tolerance, atol=0)
            total = layer.calibrated + layer.moments[user]
            torch.testing.assert_close(total, torch.tensor(state[user], dtype=torch.float64), rtol=tolerance, atol=0)
    assert tuple(layer.calibrated.tolist()) == start
    assert not layer.moments[3].any()


def test_places_count_a_users_tokens():
    users = torch.randint(-1, 5, (40,), dtype=torch.int32)
    assert places(users).tolist() == [users[:t].tolist().count(int(u)) for t, u in enumerate(users)]


@pytest.mark.parametrize(("rate", "burst"), BOUNDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_of_a_users_steps_depends_on_others(rate, burst, dtype):
    """What others send, how often they are named, and whether it is finite, differs; one user's tokens do not."""
    first = torch.randint(-1, 3, (4, 30), dtype=torch.int32)
    mine, found = first == 1, []
    base = scaled(17, 11, dtype, rate=rate, clip=1.1, burst=burst, orthogonal=4)
    texts = [rows_of(base, 30) for _ in range(4)]
    for side in range(3):
        layer = scaled(17, 11, dtype, rate=rate, clip=1.1, burst=burst, orthogonal=4)
        layer.basis.copy_(base.basis)
        bits = []
        for (x, delta), own, users in zip(texts, mine, first, strict=True):
            if side:
                others = torch.where(own.unsqueeze(1), x, torch.randn_like(x) * 10**side), torch.randn_like(delta)
                x, delta = others[0], torch.where(own.unsqueeze(1), delta, others[1])
                names = torch.tensor([0, 2, NOBODY] if side == 1 else [0], dtype=torch.int32)
                users = torch.where(own, users, names[torch.randint(len(names), (30,))])
            if side == 2:
                spoilt = torch.tensor([torch.nan, torch.inf], dtype=dtype)[torch.randint(2, (30, 1))]
                x = torch.where(own.unsqueeze(1), x, spoilt)
            applied, _, steps = layer.steps(x, delta, users)
            kept = torch.ones(3, dtype=torch.bool)
            if side == 2:
                assert not steps.finite[~own].any()
                kept[0] = False
            layer.count(steps.grown, kept)
            bits += [steps.eta[own], applied[own], steps.finite[own], layer.moments[1].clone()]
        found.append(bits)
        assert side < 2 or not layer.moments[0].any()
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [
    {"rate": "rms", "clip": 2.0}, {"rate": "rms", "burst": 0.5}, {"rate": "energy", "lr": 0.5},
    {"rate": "rms", "orthogonal": 6, "clip": 3.0}, {"rate": "decrease", "kronecker": 6, "lr": 0.3, "burst": 1.2},
    {"rate": "constant", "orthogonal": 6, "clip": 1.0},
])  # fmt: skip
def test_each_user_learns_as_in_a_model_of_their_own(family, options):
    """Against `ttt.Learner` on a model for each user, calibrated alike, before anything is compressed."""
    ids, known = ids_of(3, 30), [ids_of(2, 40)]
    plain = {"lr": 0.02, "chunk": 8, "ewc_lambda": 0.0, "replay_rows": 0, "replay_capacity": 64, "head_mass": 0.0,
             **options}  # fmt: skip
    model, learner = adapted(family, **plain | {"window": 60})
    base = tiny(family)
    base.load_state_dict(model.state_dict())
    learner.calibrate(known)
    for _ in range(2):
        seen = learner.observe(ids, users=["a", None, "b"])
    assert (seen.learned, seen.rejected) == (8, 0)
    for row, user in ((0, "a"), (2, "b")):
        alone = tiny(family)
        alone.load_state_dict(base.state_dict())
        config = plain_config(target_modules=TARGETS[family], layers="last:0.5", window=8, **plain)
        other = ttt.Learner(ttt.adapt_(alone, config))
        other.calibrate(known)
        for _ in range(2):
            want = other.observe(ids[row : row + 1])
        torch.testing.assert_close(seen.nll[row : row + 1], want.nll, rtol=1e-3, atol=1e-3)
        for name, layer in learner.pool.layers.items():
            reference, slot = alone.get_submodule(name), learner.pool.slot(user)
            if layer.moments is not None:
                torch.testing.assert_close(layer.calibrated, reference.moments[CALIBRATED], rtol=1e-6, atol=0)
                torch.testing.assert_close(layer.moments[slot], reference.moments[STREAM], rtol=1e-2, atol=0)
                assert layer.moments[slot, 2] == reference.moments[STREAM, 2] == 2 * 29
            if layer.basis is not None:
                assert torch.equal(layer.basis, reference.basis)
                assert bool(layer.basis.any(1).all())
            change = layer.effective_weight(slot) - layer.weight
            expected = reference.effective_weight() - reference.anchor
            assert float((change - expected).norm()) < 1e-2 * float(expected.norm())


def test_what_users_learn_does_not_show_on_spanned_inputs():
    layer = scaled(33, 20, torch.float32, rate="rms", lr=0.05, orthogonal=7)
    inside, outside = torch.randn(5, 7) @ layer.basis, torch.randn(5, 33)
    for _ in range(9):  # full slots are compressed meanwhile
        read(layer, torch.randn(6, 33), torch.randn(6, 20), torch.tensor([0, 1, 1, 0, -1, 1], dtype=torch.int32))
    assert layer.step.tolist() != [0, 0, 0]
    for user in (0, 1):
        change = (layer.effective_weight(user) - layer.weight).double()
        moved = [float((x.double() @ change.T).norm() / x.norm()) for x in (inside, outside)]
        assert moved[0] < 1e-5 * moved[1]
        assert moved[1] > 0.01


def test_norms_are_those_of_the_inputs_that_are_applied():
    layer = scaled(9, 4, rate="constant", lr=0.1, clip=1.0, orthogonal=3, calibrated=False)
    (x, delta), users = rows_of(layer, 3), torch.tensor([0, 1, 0], dtype=torch.int32)
    x[1] = 30 * layer.basis[0]  # nothing of it is applied: a clip by its own norm would say otherwise
    u = layer.basis
    applied, _, steps = layer.steps(x, delta, users)
    torch.testing.assert_close(applied, x - x @ u.T @ u, rtol=1e-12, atol=1e-12)
    for t in range(3):
        norm = float(torch.outer(delta[t], x[t] - u.T @ (u @ x[t])).norm())
        assert float(steps.eta[t]) == pytest.approx(0.1 * min(1.0, 1.0 / norm), rel=1e-9)
    assert steps.grown is None
    assert layer.moments is None


def test_without_calibration_each_users_stream_is_the_measure():
    """The first token's step has norm ``lr`` whatever the units of the loss; nothing is taken out of the inputs."""
    layer = scaled(9, 7, rate="rms", lr=0.05, orthogonal=3, calibrated=False)
    layer.basis.zero_()
    (x, delta), users = rows_of(layer, 2), torch.tensor([2, 0], dtype=torch.int32)
    applied, _ = read(layer, x, 1e6 * delta, users)
    assert torch.equal(applied, x)
    for user in (2, 0):
        assert float((layer.effective_weight(user) - layer.weight).norm()) == pytest.approx(0.05, rel=1e-9)


def test_calibration_renews_the_basis_and_the_gradients_of_mas_are_no_measure():
    _, learner = adapted(rate="rms", orthogonal=4, ewc_lambda=0.1, replay_rows=2, importance="mas")
    learner.calibrate([ids_of(2, 20)])
    for layer in learner.pool.layers.values():
        assert not layer.calibrated.any()
        own = principal_directions(layer.memory[: int(layer.seen)], 4).to(layer.basis.dtype)
        assert torch.equal(layer.basis, own)
    seen = learner.observe(ids_of(2, 20), users=["a", "b"])
    assert seen.rejected == 0
    slot = learner.pool.slot("a")
    assert all(layer.moments[slot, 2] == 19 for layer in learner.pool.layers.values())


@pytest.mark.parametrize("rate", SCALED)
def test_masked_rows_and_rejected_chunks_are_not_counted(rate):
    _, learner = adapted(rate=rate, window=64, lr=0.5 if rate == "energy" else 0.01)
    ids, teach = ids_of(2, 24), torch.ones(2, 24, dtype=torch.bool)
    teach[1, 10:] = False
    learner.observe(ids, learn_mask=teach, users=["a", "b"])
    layer = learner.pool.layers["model.layers.3.mlp.down_proj"]
    assert [float(layer.moments[learner.pool.slot(user), 2]) for user in "ab"] == [23, 9]
    state = learner.pool.export("a")
    spoilt = {k: t * 1e25 if k.endswith((".a", ".b")) else t for k, t in state.items()}
    learner.pool.load("a", spoilt)
    other = learner.pool.export("b")
    seen = learner.observe(ids, users=["a", "b"])
    assert seen.rejected_users == {"a": 3}
    assert_same(learner.pool.export("a"), spoilt)
    assert float(learner.pool.export("b")[f"{layer.name}.moments"][0, 2]) == 9 + 23
    assert not torch.equal(other[f"{layer.name}.a"], learner.pool.export("b")[f"{layer.name}.a"])


def test_moments_are_part_of_a_users_state(tmp_path):
    """Evicted, stored and loaded elsewhere, a user goes on as if nothing had been."""
    ids, base, found = ids_of(1, 60), tiny().state_dict(), []
    for stored in (False, True):
        model, learner = adapted(rate="rms", clip=2.0, orthogonal=4, window=64)
        model.load_state_dict(base)
        learner.calibrate([torch.arange(1, 61).view(2, 30)])
        learner.observe(ids[:, :30], users=["ada"])
        if stored:
            state = learner.pool.export("ada")
            assert state["model.layers.2.mlp.down_proj.moments"].shape == (1, 3)
            store = ttt.Store(tmp_path / "users")
            with store.lease("ada") as lease:
                store.put(lease, state)
            slot = learner.pool.slot("ada")
            learner.pool.forget("ada")
            assert not any(layer.moments[slot].any() for layer in learner.pool.layers.values())
            learner.observe(ids[:, 20:50], users=["another"])
            learner.pool.load("ada", store.get("ada").tensors)
            assert_same(state, learner.pool.export("ada"))
        nll = learner.observe(ids[:, 30:], users=["ada"]).nll
        found.append(exports(learner.pool, "ada") | {"nll": nll})
    assert_same(*found)


def test_states_from_before_there_were_moments_are_taken():
    layer = scaled(dtype=torch.float32, rate="rms")
    read(layer, *rows_of(layer, 5), torch.full((5,), 1, dtype=torch.int32))
    state = layer.slot_state(1)
    assert bool(state["moments"].all())
    del state["moments"]
    layer.check_slot_state(state)
    layer.load_slot(1, state)
    assert not layer.moments[1].any()
    assert torch.equal(layer.slot_state(1)["a"], state["a"])
    layer.check_slot_state(state | {"moments": torch.ones(1, 3, dtype=torch.float64)})


@pytest.mark.parametrize(("rate", "moments", "message"), [
    ("constant", torch.zeros(1, 3, dtype=torch.float64), r"needs the tensors .*\(rate is 'constant'\), got .*moments"),
    ("rms", torch.zeros(1, 3), "layer.moments must be torch.float64"),
    ("rms", torch.zeros(3, dtype=torch.float64), r"layer.moments must have shape \(1, 3\), got \(3,\)"),
    ("rms", torch.full((1, 3), torch.nan, dtype=torch.float64), "layer.moments must be finite"),
    ("rms", torch.tensor([[1.0, -1.0, 2.0]], dtype=torch.float64), "layer.moments must be sums of squares"),
])  # fmt: skip
def test_moments_that_do_not_fit_are_refused(rate, moments, message):
    layer = layer_of(dtype=torch.float32, rate=rate, clip=None, orthogonal=0)
    state = layer.slot_state(1) | {"moments": moments}
    with pytest.raises((ValueError, TypeError), match=message):
        layer.check_slot_state(state)


@pytest.mark.parametrize(
    ("name", "value"), [("momentum", 0.5), ("decay", 0.1), ("distill_rows", 2), ("generated_rows", 2)]
)
def test_what_users_do_without_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be 0(\.0)? with users, got {value}"):
        ttt.TTTConfig().with_flat(per_user=LowRank(), **{name: value})
