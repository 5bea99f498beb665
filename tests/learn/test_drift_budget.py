"""A budget for the change of the weights: it holds however much is learnt, and below half of it nothing is changed."""

import pytest
import torch
from tiny_models import assert_same, ids_of, state_of, tiny

import ttt
from ttt.conversation import CONVERSATION
from ttt.learn.protection import consolidate
from ttt.nn.budget import bound_, low_rank_square

TURNS = 40


def learner_of(nats=0.0, slowest=0.25, *, users=False, window=16, calibrated=True):
    torch.manual_seed(0)
    protect = [ttt.KroneckerFisher(directions=8), ttt.DriftBudget(nats, slowest)]
    per_user = ttt.LowRank(slots=2, rank=8, window=window) if users else None
    config = ttt.TTTConfig(
        target_modules=["down_proj"], layers="last:0.5", protect=protect, per_user=per_user, window=window
    )
    learner = ttt.Learner(ttt.adapt_(tiny(), config))
    if calibrated:
        learner.calibrate([ids_of(2, 32) for _ in range(4)])
    return learner


def tell(learner, turns, seed=1):
    """Random turns, read with much emphasis; yields after each."""
    torch.manual_seed(seed)
    for _ in range(turns):
        ids = ids_of(1, 20)
        learner.observe(ids, passes=2, emphasis=20.0, users=None if learner.pool is None else ["ann"])
        yield


def fillings(learner, nats):
    """The estimated KL of what each layer has in its weights, in units of its part of the budget."""
    found = []
    layers = learner.layers if learner.pool is None else learner.pool.layers.values()
    for layer in layers:
        if learner.pool is None:
            square, sums = float((layer.weight - layer.anchor).double().square().sum()), layer.moments
            sums = sums[0] if sums[0, 2] else sums[1]
        else:
            slot = learner.pool.slot("ann")
            held = min(int(layer.rows[slot]), layer.low_rank.rank)
            square = float((layer.b[slot, :held].T.double() @ layer.a[slot, :held].double()).square().sum())
            sums = layer.calibrated if layer.calibrated[2] else layer.moments[slot]
        fisher = float(sums[1] / sums[2]) / layer.weight.numel()
        found.append(0.5 * fisher * square / (nats * layer.share))
    return found


@pytest.mark.parametrize("users", [False, True])
@pytest.mark.parametrize("nats", [6e-4, 0.01])
@pytest.mark.parametrize("slowest", [0.0, 0.25, 1.0])
def test_weights_stay_within_the_budget_over_many_turns(users, nats, slowest):
    learner, most = learner_of(nats, slowest, users=users), 0.0
    for _ in tell(learner, TURNS):
        most = max(most, *fillings(learner, nats))
    assert 0.1 < most < 1.001


@pytest.mark.parametrize("users", [False, True])
def test_without_a_budget_they_do_not(users):
    learner = learner_of(users=users)
    for _ in tell(learner, TURNS):
        pass
    assert min(fillings(learner, 0.01)) > 10.0


@pytest.mark.parametrize("users", [False, True])
def test_a_layer_that_was_never_calibrated_is_measured_by_what_it_learns(users):
    learner = learner_of(0.01, users=users, calibrated=False)
    for layer in learner.layers:
        assert bool(layer._largest_drift().isinf())
    with pytest.warns(UserWarning, match="calibrate"):
        for _ in tell(learner, TURNS):
            pass
    assert max(fillings(learner, 0.01)) < 1.1


@pytest.mark.parametrize("users", [False, True])
def test_below_half_of_the_budget_no_bit_changes(users):
    bounded, free = learner_of(1e9, users=users), learner_of(users=users)
    for _ in zip(tell(bounded, 10), range(10), strict=True):
        pass
    for _ in tell(free, 10):
        pass
    if users:
        ours, theirs = bounded.pool.export("ann"), free.pool.export("ann")
    else:
        ours, theirs = ({n: t for n, t in state_of(each.model).items() if not n.endswith(".drift")}
                        for each in (bounded, free))  # fmt: skip
    assert_same(ours, theirs)


def test_steps_shrink_from_half_of_the_budget_on():
    learner = learner_of(0.01)
    layer = learner.layers[0]
    x, delta = torch.randn(4, layer.in_features), torch.randn(4, layer.out_features)
    full, largest = layer.update_from([(x, delta)]).eta, layer._largest_drift()
    for filling, factor in [(0.0, 1.0), (0.5, 1.0), (0.75, 0.5), (0.95, 0.25), (3.0, 0.25)]:
        layer.drift.copy_(filling * largest)
        assert torch.allclose(layer.update_from([(x, delta)]).eta, full * factor)


def test_the_budget_of_a_user_does_not_depend_on_others():
    alone, together = learner_of(0.01, users=True), learner_of(0.01, users=True)
    torch.manual_seed(2)
    for _ in range(15):
        ids = ids_of(2, 20)
        alone.observe(ids[:1].expand(2, -1), passes=2, emphasis=20.0, users=["ann", None])
        together.observe(ids, passes=2, emphasis=20.0, users=["ann", "bob"])
    assert_same(alone.pool.export("ann"), together.pool.export("ann"))


@pytest.mark.parametrize("capturable", [False, True])
def test_capturable_layers_keep_to_it(capturable):
    learner = learner_of(0.01, window=8)
    layer = learner.layers[0].capturable_(4 if capturable else None)
    torch.manual_seed(3)
    for _ in range(40):
        update = layer.update_from([(torch.randn(4, layer.in_features), torch.randn(4, layer.out_features))])
        update.eta.mul_(50.0)
        layer.learn(update)
        square = float((layer.weight - layer.anchor).double().square().sum())
        assert square <= float(layer._largest_drift()) * 1.0001
        assert square == pytest.approx(float(layer.drift), rel=1e-3)


def lowered(values, total):
    """min(values, c) whose squares sum to ``total``, by bisection."""
    low, high = 0.0, float(values.max())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float(values.clamp_max(middle).square().sum()) < total else (low, middle)
    return values.clamp_max(low)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("rank", "n", "m"), [(1, 3, 5), (4, 7, 4), (6, 9, 11), (12, 30, 17)])
@pytest.mark.parametrize("part", [1e-3, 0.3, 0.9, 1.1])
def test_of_a_users_change_the_largest_singular_values_are_lowered(dtype, rank, n, m, part):
    values = torch.rand(rank, dtype=torch.float64).sort(descending=True).values
    values[: rank // 2] = values[0]  # some are equal
    left, right = (torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64))[0].T for size in (n, m))
    a, b = ((values.sqrt().unsqueeze(1) * side).to(dtype) for side in (left, right))
    before, total = {"a": a.clone(), "b": b.clone()}, part * float(values.square().sum())
    bound_(a, b, torch.tensor(total, dtype=torch.float64))
    if part > 1:
        return assert_same(before, {"a": a, "b": b})
    found, wanted = (b.T @ a).double(), right.T @ (lowered(values, total).unsqueeze(1) * left)
    allowed = 2 * rank * torch.finfo(dtype).eps * float(values.max())
    assert torch.allclose(found, wanted, rtol=0, atol=max(allowed, 1e-9))


@pytest.mark.parametrize("part", [0.01, 0.5, 0.99])
def test_rows_that_are_not_orthogonal_are_brought_into_the_budget_too(part):
    for rows in (2, 5):
        a, b = torch.randn(rows, 6).abs(), torch.randn(rows, 4).abs()
        largest = part * (b.T.double() @ a.double()).square().sum()
        bound_(a, b, largest)
        square = float((b.T.double() @ a.double()).square().sum())
        assert 0 < square <= float(largest) * 1.0001


def test_low_rank_square_is_that_of_the_product():
    a, b = torch.randn(5, 7), torch.randn(5, 3)
    assert float(low_rank_square(a, b)) == pytest.approx(float((b.T @ a).square().sum()), rel=1e-5)


def test_a_model_goes_on_from_a_saved_state(tmp_path):
    learner, other = learner_of(0.01), learner_of(0.01)
    for _ in tell(learner, 10):
        pass
    assert all(float(layer.drift) > 0 for layer in learner.layers)
    ttt.save(learner.model, tmp_path / "state.safetensors")
    ttt.load(other.model, tmp_path / "state.safetensors")
    for each in (learner, other):
        for _ in tell(each, 5, seed=4):
            pass
    assert_same(state_of(learner.model), state_of(other.model))


def test_consolidation_and_reset_begin_a_new_budget():
    learner = learner_of(0.01)
    for _ in tell(learner, 10):
        pass
    consolidate(learner.layers)
    assert all(float(layer.drift) == 0 for layer in learner.layers)
    for _ in tell(learner, 10):
        pass
    learner.reset()
    assert all(float(layer.drift) == 0 for layer in learner.layers)


def test_wrong_values_are_refused_by_name():
    for wrong in (-1.0, float("inf"), float("nan"), "much"):
        with pytest.raises(ValueError, match=r"DriftBudget\.nats must be a number"):
            ttt.DriftBudget(wrong)
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"DriftBudget\.slowest must be a number"):
            ttt.DriftBudget(slowest=wrong)
    with pytest.raises(ValueError, match="rate must be 'decrease' with a DriftBudget, got 'rms'"):
        ttt.TTTConfig(protect=[ttt.DriftBudget()], rate="rms")


def test_conversations_have_a_budget():
    assert ttt.DriftBudget() in CONVERSATION.protect
    assert ttt.TTTConfig.from_dict(CONVERSATION.to_dict()) == CONVERSATION
