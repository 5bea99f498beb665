"""What the tests of rules for streams share: a float64 model that learns, and its brute-force step."""

import torch
from helpers import plain_config
from tiny_models import tiny

import ttt
from ttt.adapt.convert import learning_layers

PLAIN = {"ewc_lambda": 0.0, "replay_rows": 0, "lr": 0.01}


def double(rules=(), **options):
    """(a float64 model, its learner)."""
    model = tiny().double()
    options = {"target_modules": ["down_proj"], "layers": "last:0.5", "chunk": 8, **PLAIN, **options}
    ttt.adapt_(model, plain_config(**options))
    return model, ttt.Learner(model, rules=rules)


def plain_copy(model):
    """The float64 model under ``model``'s present weights, with nothing of ours in it."""
    plain = tiny().double()
    plain.load_state_dict(model.state_dict())
    for name, layer in learning_layers(model):
        with torch.no_grad():
            plain.get_submodule(name).weight.copy_(layer.effective_weight())
    return plain


def changes_of(model, before):
    """By layer: the weights' change since the copy ``before``."""
    weights = {name: before.get_submodule(name).weight for name, _ in learning_layers(model)}
    return {name: layer.effective_weight() - weights[name] for name, layer in learning_layers(model)}


def steps_of(plain, loss, names, lr=0.01):
    """By layer: autograd's step on ``loss``."""
    weights = [plain.get_submodule(name).weight for name in names]
    grads = torch.autograd.grad(loss, weights)
    return {name: -lr * g for name, g in zip(names, grads, strict=True)}


def cross_entropy(model, ids):
    logits = model(ids[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def assert_changes(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        assert float(expected[name].abs().max()) > 1e-4
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-9)


def divergence(student, teacher, temperature):
    """T^2 KL, term by term."""
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    return temperature**2 * (p * (p / q).log()).sum()
