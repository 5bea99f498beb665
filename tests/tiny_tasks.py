"""Small models and tasks for the tests of learning rules, in float64 so that loops by hand can be compared closely."""

import torch
from helpers import plain_config

import ttt
from ttt.rules import Batch, Trainer, configure

INPUTS, HIDDEN, OUTPUTS = 5, 7, 4


def plain_mlp():
    return torch.nn.Sequential(
        torch.nn.Linear(INPUTS, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, OUTPUTS)
    ).double()  # fmt: skip


def trainer_of(rules, lr=0.02, model=None, **options):
    """(trainer, weights of the two layers as they were)."""
    model = plain_mlp() if model is None else model
    start = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    config = configure(plain_config(target_modules="all-linear", lr=lr, window=1, **options), rules)
    return Trainer(ttt.adapt_(model, config), rules), start


def layers_of(trainer):
    return [layer for _, layer in ttt.learning_layers(trainer.model)]


def samples(count=12, outputs=(0, 1, 2, 3), heads=None):
    """Random inputs, labels among ``outputs``; with ``heads`` only these outputs are open."""
    y = torch.tensor(outputs)[torch.randint(len(outputs), (count,))]
    allowed = None
    if heads is not None:
        allowed = torch.zeros(count, OUTPUTS, dtype=torch.bool)
        allowed[:, list(heads)] = True
    return Batch(torch.randn(count, INPUTS, dtype=torch.float64), y, None, allowed)
