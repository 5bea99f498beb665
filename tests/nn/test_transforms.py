"""Adapted layers under torch.jit.trace, torch.func and forward-mode autograd: as plain layers of the same weights."""

import copy

import pytest
import torch
from torch import func, nn
from torch.autograd import forward_ad

import ttt


def learnt(**options):
    """(adapted model with rows in its windows, plain model with the same effective weights)."""
    plain = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    adapted = ttt.adapt_(
        copy.deepcopy(plain), ttt.TTTConfig(target_modules="all-linear", protect=[], window=8, lr=0.1, **options)
    )
    for rows in (9, 3):
        with ttt.learning(adapted):
            adapted(torch.randn(rows, 8)).square().sum().backward()
    assert all(layer.pending == 3 for _, layer in ttt.learning_layers(adapted))
    for name, layer in ttt.learning_layers(adapted):
        plain.get_submodule(name).weight.data = layer.effective_weight()
    return adapted.eval(), plain.requires_grad_(False).eval()


def taught():
    """As `learnt`, of a model with two users; the second model is a function of the rows of both."""
    plain = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).requires_grad_(False)
    low_rank = ttt.LowRank(slots=3, rank=2, window=4)
    adapted = ttt.adapt_(
        copy.deepcopy(plain), ttt.TTTConfig(target_modules="all-linear", protect=[], lr=0.1, per_user=low_rank)
    )
    pool = ttt.pool_of(adapted)
    parts = {}
    for user in ("ada", "bob"):
        slot = pool.open(user)
        parts[user] = copy.deepcopy(plain)
        for name, layer in pool.layers.items():
            state = layer.slot_state(slot)
            state |= {"a": 0.3 * torch.randn(3, layer.in_features), "b": 0.3 * torch.randn(3, layer.out_features)}
            layer.load_slot(slot, state)
            parts[user].get_submodule(name).weight.data = layer.effective_weight(slot)
    return adapted, lambda x: torch.stack([parts["ada"](x[0]), plain(x[1]), parts["bob"](x[2])])


def by_dual_numbers(model, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, v))).tangent


TRANSFORMS = {
    "jvp": lambda model, x, v: func.jvp(model, (x,), (v,))[1],
    "dual numbers": by_dual_numbers,
    "linearize": lambda model, x, v: func.linearize(model, x)[1](v),
    "jacfwd": lambda model, x, v: func.jacfwd(model)(x),
    "jacrev": lambda model, x, v: func.jacrev(model)(x),
    "hessian": lambda model, x, v: func.hessian(lambda x: model(x).square().sum())(x),
    "grad": lambda model, x, v: func.grad(lambda x: model(x).square().sum())(x),
    "vmap": lambda model, x, v: func.vmap(model)(torch.stack([x, v])),
}


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_a_model_that_learnt(transform, graph):
    adapted, plain = learnt()
    x, v = torch.randn(3, 8), torch.randn(3, 8)
    with torch.set_grad_enabled(graph):
        found, exact = (TRANSFORMS[transform](model, x, v) for model in (adapted, plain))
    assert float(exact.abs().max()) > 0.01
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_users(transform):
    adapted, plain = taught()
    x, v = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    with ttt.users(adapted, ["ada", None, "bob"]):
        found = TRANSFORMS[transform](adapted, x, v)
    torch.testing.assert_close(found, TRANSFORMS[transform](plain, x, v), rtol=1e-4, atol=1e-5)


def test_layers_do_not_learn_from_what_transforms_compute():
    adapted, _ = learnt()
    before = [layer.effective_weight() for _, layer in ttt.learning_layers(adapted)]
    x, v = torch.randn(3, 8), torch.randn(3, 8)
    for transform in ("jvp", "dual numbers", "grad"):
        with (
            pytest.raises(RuntimeError, match=r"0 cannot learn from what a transform of torch.func or forward-mode"),
            ttt.learning(adapted),
        ):
            TRANSFORMS[transform](adapted, x, v)
    after = [layer.effective_weight() for _, layer in ttt.learning_layers(adapted)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_quantized_layers_refuse_forward_mode_by_name():
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)).requires_grad_(False)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda module, name: name == "2")
    ttt.adapt_(model, ttt.TTTConfig(target_modules=["2"], protect=[], per_user=ttt.LowRank(slots=2)))
    for transform in ("jvp", "dual numbers"):
        with pytest.raises(RuntimeError, match="2 is quantized, and passes no tangents of forward-mode"):
            TRANSFORMS[transform](model, torch.randn(3, 32), torch.randn(3, 32))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_traced_models_compute_what_the_model_did_when_it_was_traced(rows, graph):
    adapted, plain = learnt()
    with torch.set_grad_enabled(graph):
        traced = torch.jit.trace(adapted, torch.randn(rows, 8))
    x = torch.randn(rows, 8)
    torch.testing.assert_close(traced(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_models_of_users():
    adapted, plain = taught()
    with ttt.users(adapted, ["ada", None, "bob"]), torch.no_grad():
        traced = torch.jit.trace(adapted, torch.randn(3, 5, 8), check_trace=False)
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(traced(x), plain(x), rtol=1e-4, atol=1e-5)
