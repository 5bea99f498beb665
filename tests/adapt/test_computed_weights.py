"""Weights that torch.nn.utils computes before each forward pass: no layer learns in them, and no learning layer gets
them. Each is refused by name, and leaves everything as it was."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import ttt


def quietly(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # weight_norm and spectral_norm have successors
        return function(*args)


BY_HOOKS = {
    "weight_norm": lambda layer: quietly(nn.utils.weight_norm, layer),
    "spectral_norm": lambda layer: quietly(nn.utils.spectral_norm, layer),
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "prune the bias": lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
}
ALL = BY_HOOKS | {
    "weight_norm of today": parametrizations.weight_norm,
    "spectral_norm of today": parametrizations.spectral_norm,
}


def network():
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def picture(model):
    """All that a refusal must leave as it was."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return (
        [(name, id(t), t.requires_grad, t.clone().tolist()) for name, t in named],
        [(id(m), type(m), list(m._forward_pre_hooks), list(m.__dict__)) for m in model.modules()],
    )


@pytest.mark.parametrize("config", [{}, {"per_user": ttt.LowRank(slots=2)}])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("change", BY_HOOKS)
def test_a_layer_with_a_computed_weight_is_refused_by_name(change, frozen, config):
    model = network().requires_grad_(not frozen)
    BY_HOOKS[change](model[0])
    x = torch.randn(3, 8)
    exact, before = model.eval()(x), picture(model)
    with pytest.raises(ValueError, match=r"0\.(weight|bias) is computed from other parameters .* cannot be adapted"):
        ttt.adapt_(model, ttt.TTTConfig(target_modules=["0", "2"], protect=[], **config))
    assert picture(model) == before
    assert torch.equal(model(x), exact)
    with pytest.warns(UserWarning, match=r"leaves out 0 \(0\.(weight|bias) is computed"):
        ttt.adapt_(model, ttt.TTTConfig(target_modules="all-linear", protect=[], **config))
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), exact)


@pytest.mark.parametrize("config", [{}, {"per_user": ttt.LowRank(slots=2)}])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("change", ALL)
def test_a_learning_layer_does_not_become_one_with_a_computed_weight(change, copied, config):
    model = ttt.adapt_(network(), ttt.TTTConfig(target_modules=["0"], protect=[], **config)).eval()
    if copied:
        model = pickle.loads(pickle.dumps(copy.deepcopy(model).double().float()))
    x = torch.randn(3, 8)
    exact, before, keys = model(x), picture(model), list(model.state_dict())
    with pytest.raises(RuntimeError, match=r"0\.(weight|bias) cannot be removed or computed from other parameters"):
        ALL[change](model[0])
    assert picture(model) == before
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), exact)
    if not config:
        with ttt.learning(model):
            model(x).square().sum().backward()
        assert not torch.equal(model(x), exact)
    ttt.restore_(model)
    ALL[change](model[0])
    model(x)
