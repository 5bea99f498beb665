"""A copy made inside of `ttt.learning` is a model of its own, which does not learn there."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import ttt


def network():
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    return ttt.adapt_(model, ttt.TTTConfig(target_modules="all-linear", protect=[], window=64))


def through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, ttt.fork, lambda model: pickle.loads(pickle.dumps(model)), through_file]
)
def test_a_copy_made_while_a_model_learns_keeps_no_rows(copied):
    model = network()
    with ttt.learning(model):
        model(torch.randn(2, 8)).square().sum().backward()
        other = copied(model)
        x = torch.randn(3, 8)
        assert not other(x).requires_grad
        other(x.requires_grad_()).square().sum().backward()
        assert x.grad is not None
        assert [layer.sink for _, layer in ttt.learning_layers(other)] == [None, None]
        model(torch.randn(3, 8)).square().sum().backward()
    assert [layer.pending for _, layer in ttt.learning_layers(model)] == [5, 5]
    assert [layer.pending for _, layer in ttt.learning_layers(other)] == [0, 0]
    with ttt.learning(other):
        other(torch.randn(7, 8)).square().sum().backward()
    assert [layer.pending for _, layer in ttt.learning_layers(other)] == [7, 7]
    assert [layer.pending for _, layer in ttt.learning_layers(model)] == [5, 5]
