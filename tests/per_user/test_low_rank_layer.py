"""`ttt.nn.LowRankLinear` against dense weights of each user and autograd."""

import copy

import pytest
import torch
from helpers import plain_config
from user_rates import check_rates_are_a_users_own, check_steps

import ttt
from ttt.defences import LowRank
from ttt.nn import LowRankLinear
from ttt.nn.base import Sink


def layer_of(n=9, m=7, dtype=torch.float64, **options):
    low_rank = options.pop("low_rank", LowRank(slots=3, rank=2, window=4))
    options = {"ewc_lambda": 0.0, "replay_rows": 0, **options}
    return LowRankLinear(n, m, dtype=dtype, config=plain_config(per_user=low_rank, **options), name="layer")


def taught(layer, rows=3):
    for user in range(layer.low_rank.slots):
        x, delta = torch.randn(rows, layer.in_features), torch.randn(rows, layer.out_features)
        users = torch.full((rows,), user, dtype=torch.int32)
        kind = layer.weight.dtype
        layer.learn(x.to(kind), delta.to(kind), torch.rand(rows, dtype=layer.eta_sum.dtype), users)
    return layer


def test_rows_of_no_user_are_the_base_layers_to_the_bit():
    for dtype in (torch.float32, torch.bfloat16):
        layer = taught(layer_of(33, 65, dtype))
        plain = torch.nn.Linear(33, 65, dtype=dtype)
        plain.weight, plain.bias = layer.weight, layer.bias
        x = torch.randn(4, 5, 33).to(dtype)
        assert torch.equal(layer(x), plain(x))
        layer.routing.set(torch.tensor([0, -1, 2, -1], dtype=torch.int32))
        y = layer(x)
        assert torch.equal(y[1::2], plain(x)[1::2])
        assert not torch.equal(y[0], plain(x)[0])


def test_the_gradient_is_that_of_each_users_dense_weight():
    layer = taught(layer_of())
    layer.routing.set(torch.tensor([1, -1, 0, 1], dtype=torch.int32))
    x = torch.randn(4, 3, 9, dtype=torch.float64, requires_grad=True)
    weights = torch.stack([layer.weight if u < 0 else layer.effective_weight(u) for u in (1, -1, 0, 1)])
    y = layer(x)
    expected = torch.einsum("bmn,bln->blm", weights, x) + layer.bias
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    got, want = (torch.autograd.grad(t.square().sum(), x, retain_graph=True)[0] for t in (y, expected))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(layer, (x,))


def test_learning_is_a_step_on_the_users_own_weight_until_compression():
    """Against autograd's weight gradient of the dense layer; the others and the base do not move."""
    layer = layer_of(low_rank=LowRank(slots=3, rank=2, window=20))
    before = layer.weight.clone()
    layer.routing.set(torch.tensor([2, 0], dtype=torch.int32))
    x = torch.randn(2, 5, 9, dtype=torch.float64)
    layer.sink = Sink()
    layer(x).square().sum().backward()
    ((seen, delta),) = layer.sink
    layer.learn(seen, delta, torch.full((10,), 0.01, dtype=torch.float64), layer.routing.tokens(x))
    for row, slot in ((0, 2), (1, 0)):
        dense = before.clone().requires_grad_()
        torch.nn.functional.linear(x[row], dense, layer.bias).square().sum().backward()
        torch.testing.assert_close(layer.effective_weight(slot), (dense - 0.01 * dense.grad).detach())
    assert torch.equal(layer.effective_weight(1), before)
    assert torch.equal(layer.weight, before)
    assert layer.rows.tolist() == [5, 0, 5]


@pytest.mark.parametrize("counts", [(4, 4, 1), (3, 3, 3, 3), (13, 2), (25,), (1,) * 9])
def test_full_slots_are_compressed_and_tokens_stay_in_order(counts):
    """Against one user's rows gone through one by one, with numpy-free dense truncation by torch's SVD."""
    low_rank = LowRank(slots=2, rank=2, window=4)
    layer, held, dense = layer_of(low_rank=low_rank), 0, torch.zeros(7, 9, dtype=torch.float64)

    def truncated(d):
        u, s, vt = torch.linalg.svd(d, full_matrices=False)
        return (u[:, :2] * s[:2]) @ vt[:2]

    for count in counts:
        x, delta = (torch.randn(count, k, dtype=torch.float64) for k in (9, 7))
        eta = torch.rand(count, dtype=torch.float64)
        users = torch.ones(count, dtype=torch.int32)
        layer.learn(torch.cat([x, x]), torch.cat([delta, delta]), torch.cat([eta, eta]), torch.cat([users, -users]))
        for i in range(0, count, 4):  # pieces of at most a window
            piece = slice(i, min(i + 4, count))
            size = piece.stop - piece.start
            if held + size > 6:
                dense, held = truncated(dense), 2
            dense, held = dense - (delta[piece].T * eta[piece]) @ x[piece], held + size
            if held == 6:
                dense, held = truncated(dense), 2
    torch.testing.assert_close(layer.effective_weight(1) - layer.weight, dense, rtol=1e-9, atol=1e-10)
    assert layer.rows.tolist() == [0, held]


def test_a_slots_state_comes_back_to_the_bit():
    layer = taught(layer_of(dtype=torch.float32), rows=9)
    state, a = layer.slot_state(1), layer.a.clone()
    assert state["a"].shape == (int(layer.rows[1]), 9)
    address = layer.a.data_ptr()
    layer.clear_slot(1)
    assert all(
        float(getattr(layer, name)[1].abs().sum()) == 0 for name in ("a", "b", "rows", "eta_sum", "lost", "step")
    )
    layer.check_slot_state(state)
    layer.load_slot(0, state)
    assert all(torch.equal(t, state[name]) for name, t in layer.slot_state(0).items())
    assert torch.equal(layer.a[2], a[2])
    assert layer.a.data_ptr() == address


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("lost"), "needs the tensors"),
        (lambda s: s.update(a=s["a"][:, :-1]), r"layer.a must have shape \(3, 9\), got \(3, 8\)"),
        (lambda s: s.update(a=torch.zeros(9, 9), b=torch.zeros(9, 7)), "at most 6 rows, got 9"),
        (lambda s: s.update(b=s["b"].double()), "layer.b must be torch.float32"),
        (lambda s: s.update(b=s["b"] / 0), "layer.b must be finite"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, message):
    layer = taught(layer_of(dtype=torch.float32))
    state = layer.slot_state(1)
    change(state)
    with pytest.raises((ValueError, TypeError), match=message):
        layer.check_slot_state(state)


def test_state_is_no_part_of_state_dict_and_copies_are_apart():
    layer = taught(layer_of())
    assert set(layer.state_dict()) == {"weight", "bias"}
    other = copy.deepcopy(layer)
    other.clear_slot(0)
    assert int(layer.rows[0]) == 3


def test_a_batch_of_another_size_is_refused():
    layer = layer_of(dtype=torch.float32)
    layer.routing.set(torch.tensor([0, -1], dtype=torch.int32))
    for shape in ((3, 9), (4, 2, 9), (9,)):
        with pytest.raises(ValueError, match=r"layer must get inputs of shape \(2, \.\.\., n\).*a user for each row"):
            layer(torch.randn(shape))


def test_options_out_of_range_are_refused():
    for options, message in (
        ({"slots": 0}, "slots"),
        ({"rank": 1.5}, "rank"),
    ):
        with pytest.raises(ValueError, match=message):
            LowRank(**options)
    with pytest.raises(ValueError, match=r"per_user must be a ttt\.LowRank or None, got 3"):
        plain_config(per_user=3)
    with pytest.raises(ValueError, match="importance must be 'fisher' or 'mas' with users"):
        ttt.TTTConfig(per_user=LowRank(), protect=[ttt.SI(0.1)])
    config = ttt.TTTConfig(per_user=LowRank(rank=3))
    assert ttt.TTTConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"ewc_lambda": 0.5, "replay_rows": 2}])
@pytest.mark.parametrize("tokens", [5, 14])
def test_slots_that_are_chosen_on_the_device_are_those_that_the_host_chooses(dtype, options, tokens):
    check_steps("cpu", dtype, lambda step: step, tokens, **options)


@pytest.mark.parametrize("rate", ["energy", "rms"])
def test_rates_are_a_users_own(rate):
    check_rates_are_a_users_own("cpu", torch.float32, rate)


def test_steps_of_large_finite_rows_and_of_a_users_row_beside_one_that_is_not_finite():
    layer = layer_of(9, 7, torch.float16, kronecker=2)
    with torch.no_grad():
        layer.basis.copy_(torch.linalg.qr(torch.randn(9, 2))[0].T / 2)
        layer.output_basis.copy_(torch.linalg.qr(torch.randn(7, 2))[0].T / 2)
    x, delta = torch.randn(4, 9).half(), torch.randn(4, 7).half()
    x[1] = 3e4  # finite, and the sum of the row is not
    assert torch.isfinite(x).all()
    assert not torch.isfinite(x.sum(1)).all()
    users = torch.tensor([0, 1, 1, 2], dtype=torch.int32)
    applied = layer.applied(x, delta)
    found = layer.steps(x, delta, users)
    assert all(torch.equal(mine, wanted) for mine, wanted in zip(found, applied, strict=False))
    assert found[2].finite[[0, 2, 3]].all()
    x[1] = torch.nan
    other = layer.steps(x, delta, users)
    assert other[2].finite.tolist() == [True, False, True, True]
    for mine, wanted in zip((*found[:2], found[2].eta), (*other[:2], other[2].eta), strict=True):
        assert torch.equal(mine[[0, 3]], wanted[[0, 3]])
