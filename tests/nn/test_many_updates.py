"""The updates of many experts' layers, made together, against those that each layer makes by itself."""

import copy

import pytest
import torch
from helpers import plain_config
from tiny_models import assert_same

import ttt
from ttt.nn import Linear, many_updates
from ttt.nn.many_updates import updates_from

M, N, COUNTS = 5, 7, [3, 0, 1, 4, 9, 1, 16, 2]


def layers_of(count=8, dtype=torch.float64, m=M, n=N, config=None, **options):
    """Layers of experts that have learnt some rows each, with bases if there are any."""
    options = {"lr": 0.05, "window": 6, "rate": "decrease", "ewc_lambda": 0.0, "replay_rows": 0, **options}
    config = config or plain_config(**options)
    layers = [Linear(n, m, dtype=dtype, config=config, name=f"expert.{e}") for e in range(count)]
    for at, layer in enumerate(layers):
        layer.routed, layer.share = True, 0.25
        for basis in (layer.basis, layer.output_basis):
            if basis is not None:
                basis.copy_(0.8 * torch.linalg.qr(torch.randn(basis.shape[1], len(basis)).double()).Q.T)
        for rows in range(at % 3):
            layer.learn(layer.update_from([rows_of(layer, rows + 1)]))
    return layers


def rows_of(layer, count):
    """x and delta of ``count`` tokens, with different norms from row to row."""
    size = torch.randn(count, 1).exp()
    x, delta = torch.randn(count, layer.in_features) * size, torch.randn(count, layer.out_features) * size.flip(0)
    return x.to(layer.weight.dtype), delta.to(layer.weight.dtype)


def given_of(layers, counts=COUNTS):
    """What backward passes have left at each of ``layers``: in two parts where there are more than two rows."""
    given = []
    for layer, count in zip(layers, counts, strict=True):
        parts = [] if not count else [1, count - 1] if count > 2 else [count]
        given.append(([rows_of(layer, part) for part in parts], None, None))
    return given


def fields(update):
    found = {
        name: getattr(update, name)
        for name in ("x", "delta", "eta", "trace_delta", "finite", "moments", "weight", "agreement")
    }
    return {name: t for name, t in found.items() if t is not None}


def assert_as_alone(layers, given, rtol=1e-12):
    before = [copy.deepcopy(layer.state()) for layer in layers]
    wanted = [layer.update_from(*own) for layer, own in zip(layers, given, strict=True)]
    found = updates_from(layers, given)
    assert [update is None for update in found] == [update is None for update in wanted]
    for layer, one, other in zip(layers, found, wanted, strict=True):
        if one is None:
            continue
        mine, alone = fields(one), fields(other)
        assert mine.keys() == alone.keys()
        for name, t in alone.items():
            torch.testing.assert_close(mine[name], t, rtol=rtol, atol=rtol, equal_nan=True, msg=name)
        one.check_fits(layer.weight, layer.win_eta.dtype)
    for layer, state in zip(layers, before, strict=True):
        assert_same(state, layer.state())
    return found


@pytest.mark.parametrize("rate", ["constant", "energy", "rms", "decrease"])
@pytest.mark.parametrize("options", [{"feedback": 0.0}, {"feedback": 30.0, "burst": 1.1, "clip": 0.7}])
@pytest.mark.parametrize("kronecker", [0, 2])
def test_each_layer_gets_the_update_that_it_would_make_by_itself(rate, options, kronecker):
    layers = layers_of(rate=rate, kronecker=kronecker, **options)
    assert_as_alone(layers, given_of(layers))


def test_every_term_of_the_steps_acts_in_them():
    """With bounds that no token is below and updates that undo each other, all steps differ from plain ones."""
    layers = layers_of(burst=0.3, clip=0.1, feedback=30.0)
    given = given_of(layers)
    for layer, (pairs, _, _) in zip(layers, given, strict=True):
        if pairs:
            layer._largest_step = 1e-4
            layer.agreement.fill_(-0.5)
    found = assert_as_alone(layers, given)
    agreements = [update.agreement for update in found if update is not None]
    assert all(float(agreement) < -0.05 for agreement in agreements)
    for update in found:
        if update is not None:
            lengths = update.eta * update.x.norm(dim=1) * update.delta.norm(dim=1)
            assert float(lengths.max()) <= 1e-4 * (1 + 1e-12)


def test_a_budget_shrinks_the_steps_of_each_layer_by_its_own_drift():
    config = ttt.TTTConfig(protect=[ttt.DriftBudget(nats=0.1)], window=6)
    layers = layers_of(config=config)
    for at, layer in enumerate(layers):
        layer.moments[0] = torch.tensor([3.0, 2.0, 4.0])
        layer.drift.fill_(at * float(layer._largest_drift()) / len(layers))
    given = given_of(layers)
    found = assert_as_alone(layers, given)
    layers[6].drift.zero_()
    assert float((updates_from(layers, given)[6].eta / found[6].eta).min()) > 1.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_differ_by_rounding(dtype):
    layers = layers_of(dtype=dtype, kronecker=2)
    assert_as_alone(layers, given_of(layers), rtol=1e-5 if dtype == torch.float32 else 2**-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kronecker", [0, 2])
@pytest.mark.parametrize("rate", ["constant", "rms", "decrease"])
def test_layers_that_are_no_experts_are_computed_together_on_the_cpu(monkeypatch, dtype, kronecker, rate):
    """Those of one shape: of the second shape there is one, and one layer gets so many rows that it goes alone."""
    options = {"dtype": dtype, "kronecker": kronecker, "rate": rate, "feedback": 30.0, "burst": 0.5, "clip": 1.0}
    layers = layers_of(4, m=33, n=40, **options)
    layers += layers_of(1, m=30, n=40, config=layers[0].config, dtype=dtype)
    for layer in layers:
        layer.routed = False
    given, together = given_of(layers, [17, 12, 18, 20, 5]), []
    made = many_updates._together
    monkeypatch.setattr(many_updates, "_together", lambda tasks, gains: together.append(tasks) or made(tasks, gains))
    found = assert_as_alone(layers, given, rtol=1e-5 if dtype == torch.float32 else 2**-7)
    # 12 rows are padded to 16, and 17 and more, of which up to 18 are fewer than those of a matrix, to 32.
    assert [[task.at for task in tasks] for tasks in together] == [[0, 2]]
    for layer, update in zip(layers, found, strict=True):
        assert (update.applied is None) == (not layer.damps)
        if update.applied is not None:
            for one, other in zip(update.applied, layer.applied(update.x, update.delta), strict=True):
                assert torch.equal(one, other)


def test_many_rows_are_summed_as_matrices():
    layers = layers_of(3, m=3, n=4, burst=0.5)
    assert_as_alone(layers, given_of(layers, [40, 33, 64]))


def test_masks_leave_out_rows_and_may_leave_out_all():
    layers = layers_of()
    given = [
        (pairs, None, torch.rand(sum(len(x) for x, _ in pairs)) < 0.5 if at else torch.zeros(3, dtype=torch.bool))
        for at, (pairs, _, _) in enumerate(given_of(layers))
    ]
    found = assert_as_alone(layers, given)
    assert len(found[0].x) == 0
    with pytest.raises(ValueError, match=r"expert\.0 saw 3 rows where the mask has 2 tokens"):
        updates_from(layers, [(given[0][0], None, torch.ones(2, dtype=torch.bool)), *given[1:]])


def test_a_token_that_is_not_finite_spoils_the_update_of_its_own_layer_only():
    layers = layers_of()
    given = given_of(layers)
    clean = updates_from(layers, given)
    given[3][0][1][1][0, 0] = torch.nan
    found = updates_from(layers, given)
    for at, (one, other) in enumerate(zip(found, clean, strict=True)):
        if one is not None:
            assert bool(one.finite) == (at != 3)
            assert at == 3 or all(torch.equal(t, fields(other)[name]) for name, t in fields(one).items())


def test_layers_without_a_bound_on_their_step_are_beside_those_with_one():
    layers = layers_of(4)
    for layer in layers[:2]:
        layer._largest_step = 0.0  # of a weight that was 0 before any learning
    layers[2]._largest_step = 1e-5
    assert_as_alone(layers, given_of(layers, [2, 2, 2, 2]))


def test_experts_are_beside_other_layers_and_other_experts():
    """Only layers of one kind are computed together."""
    layers = [*layers_of(3), *layers_of(3), *layers_of(2, m=4), *layers_of(2, dtype=torch.float32)]
    layers[1].routed = False
    layers[4].share = 0.5
    assert_as_alone(layers, given_of(layers, [2, 2, 1, 2, 2, 2, 2, 2, 2, 2]), rtol=1e-6)


def test_one_computation_serves_layers_whose_numbers_of_rows_are_similar(monkeypatch):
    layers = layers_of(73)
    calls = []

    def counted(x, *args, **options):
        calls.append(tuple(x.shape))
        return rates(x, *args, **options)

    rates = many_updates.rates
    monkeypatch.setattr(many_updates, "rates", counted)
    monkeypatch.setattr(Linear, "update_from", None)
    updates_from(layers, given_of(layers, [1, 2, 3, 4] + 66 * [8] + [9, 16, 17]))
    assert calls == [(64, 8, N), (6, 8, N), (2, 16, N), (1, 17, N)]


def test_what_the_trace_needs_is_kept_for_layers_that_have_gradients_of_their_own_for_it():
    layers = layers_of(2, ewc_lambda=0.1, importance="mas")
    given = given_of(layers, [2, 3])
    given = [(pairs, [(x, 2 * delta) for x, delta in pairs], None) for pairs, _, _ in given]
    for update in updates_from(layers, given):
        torch.testing.assert_close(update.trace_delta, 2 * update.delta, rtol=0, atol=0)
