"""`ttt.Guard` on a tiny random Llama, against checks by hand."""

import copy

import pytest
import torch
from tiny_models import VOCAB, adapted, assert_same, ids_of, state_of, tiny

import ttt


def by_hand(model, batches):
    """Mean nats per token, in float64 from the logits."""
    with torch.no_grad():
        logp = [model(input_ids=ids).logits[:, :-1].double().log_softmax(-1) for ids in batches]
    parts = [-p.gather(-1, ids[:, 1:, None]).flatten() for p, ids in zip(logp, batches, strict=True)]
    return float(torch.cat(parts).mean())


def known(model):
    """Text that the model knows: its own."""
    return [model.generate(torch.randint(1, VOCAB, (4, 1)), max_new_tokens=40, do_sample=True, pad_token_id=0)]


def guarded(batches=None, learner_options=None, **options):
    """(model, learner, guard): a guard without a gate, on two batches of different shapes."""
    model, _ = adapted(**{"lr": 0.02, "chunk": 8, "window": 5, **(learner_options or {})})
    batches = [ids_of(2, 20), ids_of(1, 13)] if batches is None else batches
    guard = ttt.Guard(batches, **{"every": 16, "surprise": 1e9, **options})
    learner = ttt.Learner(model, guard=guard)
    learner.calibrate([ids_of(2, 20)])
    return model, learner, guard


def test_unguarded_and_untroubled_learners_learn_alike_to_the_bit():
    model, _ = adapted()
    twin = copy.deepcopy(model)
    plain, watched = (
        ttt.Learner(model),
        ttt.Learner(twin, guard=ttt.Guard([ids_of(2, 20)], threshold=1e6, every=10, cap=1.0)),
    )
    batch, ids = [ids_of(2, 16)], ids_of(2, 50)
    nll = []
    for learner in (plain, watched):
        learner.calibrate(batch)
        nll.append(learner.observe(ids).nll)
    assert torch.equal(*nll)
    assert_same(state_of(model), state_of(twin))
    assert len(watched.guard.history) > 3


def test_a_check_within_bounds_changes_no_bit_and_measures_the_drift():
    model, learner, guard = guarded(threshold=1e6)
    reference = by_hand(model, guard.batches)
    assert guard.reference == pytest.approx(reference, rel=1e-6)
    learner.observe(ids_of(2, 30))
    before = state_of(model)
    guard.check()
    assert_same(before, state_of(model))
    assert guard.history[-1].drift == pytest.approx(by_hand(model, guard.batches) / reference - 1, abs=1e-5)
    assert not guard.history[-1].rolled_back


def test_checks_come_every_so_many_learnt_tokens():
    _, learner, guard = guarded(threshold=1e6, every=20)
    learner.observe(ids_of(1, 60), learn=False)
    assert guard.history == []
    learner.observe(ids_of(1, 17))  # 16 tokens, in chunks of 8
    assert guard.history == []
    learner.observe(ids_of(1, 60))  # 59 more
    assert [check.tokens for check in guard.history] == [24, 48, 72]
    mask = torch.ones(1, 17)
    mask[0, 9:] = 0
    learner.observe(ids_of(1, 17), learn_mask=mask)
    assert guard.tokens == 75 + 8


def test_strength_follows_the_drift():
    _, learner, guard = guarded(threshold=0.01, bound=1e6, every=8, strengthen=4.0, cap=30.0)
    assert guard.strength == 8.0
    drifts, reference = iter([0.01, 0.0125, 0.015, 1.0, 1.0, 0.0095, 0.005, -0.5]), guard.reference
    guard.loss = lambda: reference * (1 + next(drifts))
    for s in (8.0, 8 * 4**0.25, 8 * 4**0.75, 30.0, 30.0, 30 * 4**-0.05, 30 * 4**-0.1125, 30 * 4**-0.175):
        output = learner.observe(ids_of(1, 9))
        assert output.strength == guard.history[-1].strength == pytest.approx(s)
        assert output.rollbacks == 0
        for layer in learner.layers:
            options, config = layer.commit_options(), layer.config
            assert options["lam"] == pytest.approx(config.ewc_lambda * s)
            assert options["beta"] == 1.0  # of at most 2, where the projection is unstable
    guard.loss = lambda: reference
    for _ in range(40):
        learner.observe(ids_of(1, 9))
    assert guard.strength == 1.0
    assert learner.layers[0].commit_options()["lam"] == learner.config.ewc_lambda
    assert learner.layers[0].commit_options()["beta"] == learner.config.replay_beta


def test_past_the_bound_protection_is_stronger_after_the_rollback():
    _, learner, guard = guarded(threshold=0.01, every=8, strengthen=4.0)
    drifts, reference = iter([0.0149, 0.0151, 0.0151]), guard.reference
    guard.loss = lambda: reference * (1 + next(drifts))
    outputs = [learner.observe(ids_of(1, 9)) for _ in range(3)]
    assert [s.rollbacks for s in outputs] == [0, 1, 1]
    assert [s.strength for s in outputs] == pytest.approx([8 * 4**0.49, 16 * 4**0.49, 32 * 4**0.49])
    assert [check.rolled_back for check in guard.history] == [False, True, True]


def test_without_protection_the_strength_acts_on_the_step():
    _, learner, guard = guarded(learner_options={"ewc_lambda": 0.0, "replay_rows": 0}, threshold=1e6, strengthen=4.0)
    layer = learner.layers[0]
    update = layer.update_from([(torch.randn(8, layer.in_features), torch.randn(8, layer.out_features))])
    before = update.eta.clone()
    guard.pace([(layer, update)], torch.ones(1, 8))
    torch.testing.assert_close(update.eta, before / 8)


def test_strength_reaches_the_kernel():
    """A layer at strength s commits as one that was configured s times as strong."""
    model, learner = adapted(ewc_lambda=0.5, replay_beta=0.1)
    learner.calibrate([ids_of(2, 16)])
    other = ttt.adapt_(tiny(), learner.config.with_flat(ewc_lambda=2.0, replay_beta=0.4))
    ttt.restore_(other)
    other.load_state_dict(model.state_dict())
    ttt.adapt_(other, learner.config.with_flat(ewc_lambda=2.0, replay_beta=0.4))
    strong = ttt.Learner(other)
    strong.rollback(learner.snapshot())
    first, second = ids_of(1, 33), ids_of(1, 33)
    learner.observe(first)
    strong.rollback(learner.snapshot())
    for layer in learner.layers:
        layer.strength = 4.0
    learner.observe(second)
    strong.observe(second)
    assert_same(state_of(model), state_of(other))


def test_rollback_restores_the_last_good_state_to_the_bit():
    model, learner, guard = guarded(threshold=1e6, every=10_000)
    learner.observe(ids_of(2, 22))
    guard.check()
    good = state_of(model)
    learner.observe(ids_of(2, 41))
    assert not torch.equal(state_of(model)["model.layers.3.mlp.down_proj.weight"],
                           good["model.layers.3.mlp.down_proj.weight"])  # fmt: skip
    guard.threshold = guard.bound = -1.0  # whatever it is, it is too much
    guard.check()
    assert_same(good, state_of(model))
    assert guard.history[-1].rolled_back
    assert guard.rollbacks == 1


def test_a_loss_that_is_not_finite_goes_back():
    model, learner, guard = guarded(threshold=1e6)
    good = state_of(model)
    with torch.no_grad():
        learner.layers[0].weight.fill_(float("nan"))
    guard.check()
    assert_same(good, state_of(model))


def test_what_is_held_back_stays_within_the_bound():
    """With a rate that ruins the unguarded model, every state that a check leaves behind is within the bound."""
    drifts = {}
    for on in (False, True):
        torch.manual_seed(5)
        model, _ = adapted(lr=0.3, clip=5.0, chunk=8)
        held_back = known(model)
        guard = ttt.Guard(held_back, threshold=0.01, every=8)
        learner = ttt.Learner(model, guard=guard)
        if not on:
            learner.guard = None
        for _ in range(12):
            learner.observe(ids_of(1, 33))
            drifts.setdefault(on, []).append(by_hand(model, held_back) / guard.reference - 1)
    assert max(drifts[False]) > 3 * guard.bound
    assert max(drifts[True]) <= guard.bound + 1e-6
    assert guard.rollbacks > 0


def test_gate_slows_down_surprise_far_above_the_level():
    _, learner, guard = guarded(threshold=1e6, surprise=2.0)
    level = guard.reference
    nll = torch.full((1, 8), 4 * level)
    x = torch.randn(8, learner.layers[0].in_features)
    delta = torch.randn(8, learner.layers[0].out_features)
    update = learner.layers[0].update_from([(x, delta)])
    before = update.eta.clone()
    guard.pace([(learner.layers[0], update)], nll)
    torch.testing.assert_close(update.eta, before * 0.5**4)
    nll = torch.full((1, 8), level)
    update = learner.layers[0].update_from([(x, delta)])
    guard.pace([(learner.layers[0], update)], nll)
    assert torch.equal(update.eta, before)


def test_noise_teaches_less_than_without_the_gate():
    moved = {}
    for surprise in (1.001, 1e9):
        torch.manual_seed(3)
        _, learner, guard = guarded(threshold=1e6, surprise=surprise)
        guard._level = guard.reference / 3
        learner.observe(ids_of(1, 33))
        moved[surprise] = sum(float((la.effective_weight() - la.anchor).norm()) for la in learner.layers)
    assert 0 < moved[1.001] < 0.1 * moved[1e9]


def test_consolidate_checks_first_and_leaves_the_reference():
    model, learner, guard = guarded(threshold=1e6, every=10_000)
    learner.observe(ids_of(2, 30))
    reference, checks = guard.reference, len(guard.history)
    learner.consolidate()
    assert guard.reference == reference
    assert len(guard.history) == checks + 1
    good = state_of(model)
    learner.observe(ids_of(2, 30))
    guard.threshold = guard.bound = -1.0
    before = learner.layers[0].anchor.clone()
    learner.consolidate()  # goes back, then consolidates what there was
    assert torch.equal(before, learner.layers[0].anchor)
    assert torch.equal(good["model.layers.2.mlp.down_proj.weight"], learner.layers[0].weight)


def test_reset_and_rollback_by_the_user_move_the_good_state():
    model, learner, guard = guarded(threshold=1e6, every=10_000)
    start = state_of(model)
    learner.observe(ids_of(2, 30))
    learner.reset()
    assert_same(start, state_of(model))
    snapshot = learner.snapshot()
    learner.observe(ids_of(2, 30))
    learner.rollback(snapshot)
    learner.observe(ids_of(2, 9))
    guard.threshold = guard.bound = -1.0
    guard.check()
    assert_same(start, state_of(model))


def test_attached_to_a_model_that_has_drifted_the_good_state_is_the_anchor():
    model, learner = adapted(lr=0.3, clip=5.0)
    batches = known(model)
    frozen = by_hand(model, batches)
    for _ in range(4):
        learner.observe(ids_of(2, 46))
    before = state_of(model)
    guard = ttt.Guard(batches)
    assert by_hand(model, batches) / frozen - 1 > guard.bound
    watched = ttt.Learner(model, guard=guard)
    assert_same(before, state_of(model))
    assert guard.reference == pytest.approx(frozen, rel=1e-6)
    guard.check()
    assert guard.history[-1].rolled_back
    for layer in watched.layers:
        assert torch.equal(layer.effective_weight(), layer.anchor)


def test_generate_is_guarded_too():
    _, learner, guard = guarded(threshold=1e-9, bound=1e6, every=4)
    guard.reference /= 2
    learner.generate(ids_of(1, 9), max_new_tokens=8, learn_output=True, learn_every=4)
    assert guard.tokens == 8 + 8
    assert len(guard.history) == 1 + 2


def test_a_fork_learns_at_the_configured_strength():
    model, learner, guard = guarded()
    other = ttt.Learner(ttt.fork(model))
    assert {layer.strength for layer in learner.layers} == {guard.strength} == {8.0}
    assert {layer.strength for layer in other.layers} == {1.0}


def test_wrong_arguments_are_refused_and_change_nothing():
    model, _ = adapted()
    before = state_of(model)
    for options in ({"threshold": 0.0}, {"bound": 0.001}, {"every": 0}, {"strengthen": 1.0}, {"cap": 0.5},
                    {"surprise": 1.0}):  # fmt: skip
        (name,) = options
        with pytest.raises(ValueError, match=name):
            ttt.Guard([ids_of(1, 9)], **options)
    for batches, match in (([], "at least one batch"), ([ids_of(1, 1)], "2 to 64"), ([ids_of(1, 65)], "2 to 64"),
                           ([torch.full((1, 9), VOCAB)], "each of batches must be in")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            ttt.Learner(model, guard=ttt.Guard(batches))
    guard = ttt.Guard([ids_of(1, 9)])
    learner = ttt.Learner(model, guard=guard)
    with pytest.raises(ValueError, match="another learner"):
        ttt.Learner(model, guard=guard)
    with pytest.raises(ValueError, match="guard"):
        ttt.GraphedLearner(learner, graph=False)
    assert_same(before, state_of(model))
