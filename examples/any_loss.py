"""A regression model learns from a stream whose rule changes, with any loss, and keeps what it must not forget.

Run it with ``python examples/any_loss.py``.
"""

import copy

import torch
from torch import nn
from torch.nn.functional import mse_loss

import ttt

torch.manual_seed(0)


def samples(count: int, region: float, shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (count, 8) around ``region``, and targets (count, 1) of a rule that ``shift`` changes."""
    x = torch.randn(count, 8) + region
    return x, (x[:, :1] * x[:, 1:2]).sin() + shift


# A model that knows the rule in one region ...
model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(1500):
    x, y = samples(128, region=0.0, shift=0.0)
    optimizer.zero_grad()
    mse_loss(model(x), y).backward()
    optimizer.step()
known, new = samples(1000, region=0.0, shift=0.0), samples(1000, region=2.0, shift=1.0)


def report(name: str, model: nn.Module) -> None:
    with torch.no_grad():
        errors = [float(mse_loss(model(x), y)) for x, y in (known, new)]
    print(f"{name:24} squared error {errors[0]:.3f} in the known region, {errors[1]:.3f} in the new one")


report("before the stream", model)
for name, protected in (("learnt, unprotected", False), ("learnt, protected", True)):
    # ... reads a stream from another region, where another rule holds. The bias is not learnt, only the weights.
    config = ttt.TTTConfig(target_modules="all-linear")
    learning_model = ttt.adapt_(copy.deepcopy(model), config)
    if protected:
        batches = [samples(64, region=0.0, shift=0.0) for _ in range(8)]
        learner = ttt.Learner(learning_model)
        learner.calibrate(batches, loss=lambda model, batch: mse_loss(model(batch[0]), batch[1], reduction="sum"))
    for _ in range(300):
        x, y = samples(8, region=2.0, shift=1.0)
        with ttt.learning(learning_model):  # every backward() inside teaches; the loss is summed over the samples
            mse_loss(learning_model(x), y, reduction="sum").backward()
    report(name, learning_model)
