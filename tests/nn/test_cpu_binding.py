"""Bindings, which call the C++ kernels directly: the same bits as the ops, and not used where the ops are needed."""

import copy

import pytest
import torch
from helpers import plain_config
from torch.utils.flop_counter import FlopCounterMode

from ttt import TTTConfig
from ttt.defences import LowRank
from ttt.nn import Linear, LowRankLinear, Update
from ttt.nn import cpu_binding as binding
from ttt.ops import backends, cpu

DTYPES = [torch.float32, torch.bfloat16]


def layer_and_twin(m, n, dtype, **options):
    config = plain_config(lr=0.01, ewc_lambda=0.1, replay_rows=2, replay_capacity=5, **options)
    layer = Linear(n, m, dtype=dtype, config=config, name="layer")
    layer.importance.copy_(torch.rand(m, n) * 3 if layer.importance.dtype != torch.uint8 else layer.importance)
    layer.memory.copy_(torch.randn(5, n))
    layer.seen.fill_(9)
    for basis in (layer.basis, layer.output_basis):
        if basis is not None:
            basis.copy_(torch.linalg.qr(torch.randn(basis.shape[1], len(basis))).Q.T)
    return layer, copy.deepcopy(layer)


def update(layer, rows):
    m, n, dtype = layer.out_features, layer.in_features, layer.weight.dtype
    traced = torch.randn(rows, m).to(dtype) if layer.win_trace is not None else None
    moments = None if layer.moments is None else torch.rand(3, dtype=torch.float64)
    follows = layer.win_weight is not None
    weight, agreement = (torch.rand(rows), torch.rand(1, dtype=torch.float64)) if follows else (None, None)
    x, delta, true = torch.randn(rows, n).to(dtype), torch.randn(rows, m).to(dtype), torch.tensor(True)
    return Update(x, delta, torch.rand(rows), traced, true, moments, weight, agreement)


def same(layer, twin):
    state, other = layer.state(), twin.state()
    return all(torch.equal(state[name].nan_to_num(7.0), other[name].nan_to_num(7.0)) for name in state)


@pytest.mark.parametrize(
    "options",
    [{}, {"importance": "mas"}, {"state_dtype": "8bit"}, {"importance": "si"}, {"orthogonal": 3}, {"momentum": 0.5},
     {"rate": "decrease", "feedback": 30.0, "kronecker": 3}],
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_and_state_are_those_of_the_ops(dtype, options, monkeypatch):
    layer, twin = layer_and_twin(17, 37, dtype, window=4, **options)
    for rows in (1, 1, 1, 1, 3, 1, 2, 9, 1, 4, 1):
        u, x = update(layer, rows), torch.randn(rows, 37).to(dtype)
        with torch.no_grad():
            y = layer(x)
            layer.learn(u)
            assert layer._binding.kernels is not None
            with monkeypatch.context() as patch:
                patch.setattr("ttt.nn.linear.binding_of", lambda layer: None)
                assert torch.equal(twin(x), y)
                twin.learn(u)
        assert same(layer, twin)
    assert int(layer.step) == int(twin.step) > 0
    assert int(layer.recent_seen) == 25


def test_learning_through_a_binding_increments_tensor_versions():
    layer, _ = layer_and_twin(5, 6, torch.float32, window=2)
    with torch.no_grad():
        for expected in (
            {"win_x", "win_delta", "win_eta", "recent", "recent_seen"},
            {"weight", "trace", "step", "tokens"},
        ):
            before = {name: t._version for name, t in layer.state().items()}
            layer.learn(update(layer, 1))
            moved = {name for name, t in layer.state().items() if name != "pending" and t._version > before[name]}
            assert expected <= moved


def test_inputs_that_an_op_refuses_are_refused_by_a_bound_layer():
    layer, twin = layer_and_twin(5, 6, torch.float32, window=4)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"x must have shape"):
            layer(torch.randn(2, 7))
        with pytest.raises(TypeError, match=r"x must be torch\.float32"):
            layer(torch.randn(2, 6).double())
        assert layer(torch.randn(6, 2).T).shape == (2, 5)
        assert layer(torch.randn(6)).shape == (5,)
    assert same(layer, twin)


def test_moved_and_copied_layers_are_bound_anew():
    layer, _ = layer_and_twin(5, 6, torch.float32, window=4)
    x = torch.randn(1, 6)
    with torch.no_grad():
        layer(x)
        clone = copy.deepcopy(layer)
        assert clone._binding is None
        clone.learn(update(clone, 4))
        assert torch.equal(layer.weight, layer.anchor)
        assert not torch.equal(clone.weight, clone.anchor)
        layer.weight.data = layer.weight.data * 2
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
        layer.weight = torch.nn.Parameter(layer.weight * 3, requires_grad=False)
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
        layer.to(torch.float64)
        y = layer(x.double())
    torch.testing.assert_close(y, torch.nn.functional.linear(x.double(), layer.weight, layer.bias))


def test_dispatch_modes_see_the_op_of_a_bound_layer():
    layer, _ = layer_and_twin(5, 6, torch.float32, window=4)
    seen = []

    class Listener(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Listener():
        layer(torch.randn(1, 6))
    assert "ttt.window_linear.default" in seen
    with torch.no_grad(), FlopCounterMode(display=False):
        layer(torch.randn(1, 6))


def test_without_the_extension_layers_learn_through_the_ops(monkeypatch):
    layer, twin = layer_and_twin(5, 6, torch.float32, window=2)
    monkeypatch.setattr(cpu, "_C", None)
    monkeypatch.setitem(cpu.unavailable, "cpu", "for this test")
    with torch.no_grad():
        assert binding.binding_of(layer) is None
        layer.learn(update(layer, 1))
        assert layer.pending == 1
    assert not same(layer, twin)


def users_and_twin(m, n, dtype, **options):
    low_rank = LowRank(slots=3, rank=2, window=4)
    config = TTTConfig().with_flat(per_user=low_rank, lr=0.1, rate="constant", orthogonal=0, **options)
    layer = LowRankLinear(n, m, dtype=dtype, config=config, name="layer")
    for name in ("importance_m", "importance_n", "memory"):
        if getattr(layer, name) is not None:
            getattr(layer, name).uniform_()
    if layer.seen is not None:
        layer.seen.fill_(3)
    return layer, copy.deepcopy(layer)


def same_slots(layer, twin):
    return all(torch.equal(t, u) for t, u in zip(layer.buffers(), twin.buffers(), strict=True))


@pytest.mark.parametrize("options", [{}, {"ewc_lambda": 0.5, "replay_rows": 2}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_users_outputs_and_state_are_those_of_the_ops(dtype, options, monkeypatch):
    """Also if one user has more tokens than a slot has room for, and if nobody learns."""
    options = {"ewc_lambda": 0.0, "replay_rows": 0, "replay_capacity": 5, **options}
    layer, twin = users_and_twin(17, 37, dtype, **options)
    backends.calls.clear()
    for tokens in (1, 5, 3, 2, 9, 4, 31, 0, 6):
        x, delta = torch.randn(tokens, 37).to(dtype), torch.randn(tokens, 17).to(dtype)
        eta, users = torch.rand(tokens), torch.randint(-1, 3, (tokens,), dtype=torch.int32)
        users[tokens // 2 :] = 1 if tokens > 8 else -1
        for one in (layer, twin):
            one.routing.set(users)
        with torch.no_grad():
            y = layer(x)
            layer.learn(x, delta, eta, users)
            assert layer._binding.kernels is not None
            before = {op for op, _, _ in backends.calls}
            with monkeypatch.context() as patch:
                patch.setattr("ttt.nn.low_rank.binding_of", lambda layer: None)
                assert torch.equal(twin(x), y)
                twin.learn(x, delta, eta, users)
        assert same_slots(layer, twin)
    assert before == {"low_rank_linear", "low_rank_append", "low_rank_compress"}
    assert int(layer.step[1]) >= 4  # of 21 tokens at least, which a slot of 6 rows takes by fours


def test_many_users_what_an_op_would_refuse_is_refused():
    layer, twin = users_and_twin(5, 6, torch.float32, ewc_lambda=0.0, replay_rows=0)
    users = torch.tensor([0, 3], dtype=torch.int32)
    layer.routing.set(users)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"users must be in \[-1, 3\)"):
            layer(torch.randn(2, 6))
        with pytest.raises(TypeError, match=r"delta must be torch\.float32"):
            layer.learn(torch.randn(2, 6), torch.randn(2, 5).double(), torch.rand(2), users.clamp_max(2))
        assert same_slots(layer, twin)
        x, delta, eta = torch.randn(7, 6), torch.randn(7, 5), torch.rand(7)
        delta[1] = torch.inf
        versions = layer.rows._version
        with pytest.raises(RuntimeError, match="slot 2 holds rows that are not finite"):
            layer.learn(x, delta, eta, torch.full((7,), 2, dtype=torch.int32))
        assert layer.rows._version > versions
        layer.routing.set(None)
        clone = copy.deepcopy(layer)
        assert clone._binding is None
    layer.to(torch.float64)
    layer.routing.set(users.clamp_max(1))
    assert layer(torch.randn(2, 6, dtype=torch.float64)).shape == (2, 5)


def test_steps_without_weights_of_the_feedback_are_those_of_the_ops(monkeypatch):
    layer, twin = layer_and_twin(17, 37, torch.float32, window=4, rate="decrease", feedback=30.0)
    for rows in (2, 1, 5, 1, 3, 4, 2):
        u = update(layer, rows)
        u.weight = u.agreement = None
        with torch.no_grad():
            layer.learn(u)
            with monkeypatch.context() as patch:
                patch.setattr("ttt.nn.linear.binding_of", lambda layer: None)
                twin.learn(u)
        assert same(layer, twin)
    assert not layer.win_weight.any()
    assert int(layer.step) > 0
