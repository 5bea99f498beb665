"""`learning`: any model and any loss; `capturable_`: in a CUDA graph."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ttt.adapt.convert import require_layers
from ttt.nn import Capturing


@dataclasses.dataclass
class Outcome:
    """Of `ttt.learning` with capturable layers: ``learned`` (1,) int64, 1 if they learnt; None if there was nothing.

    Set when the block ends; of a captured block it is the tensor that every replay writes.
    """

    learned: Tensor | None = None


def capturable_(model: nn.Module, rows: int | None) -> nn.Module:
    """Make learning from steps of ``rows`` rows (tokens, in a language model) capturable in a CUDA graph, in place::

        ttt.capturable_(model, rows=8)
        with torch.cuda.graph(graph), ttt.learning(model) as outcome:
            model(static_input).square().sum().backward()

    See `ttt.nn.Linear.capturable_` for what differs then. ``rows`` None ends it.

    Returns:
        ``model``.

    Raises:
        ValueError: if the model has no learning layer, or ``rows`` does not suit one of them; those before it have
            changed then.
    """
    for layer in require_layers(model):
        layer.capturable_(rows)
    return model


@contextlib.contextmanager
def learning(model: nn.Module) -> Iterator[Outcome]:
    """Learn from every ``backward()`` inside: ``with ttt.learning(model): loss.backward()``.

    The loss must be SUMMED over tokens (or samples), as ``lr`` is a step per token. The forward pass must run
    inside, too. What was captured is learnt when the block ends; if it raises, nothing is.

    After `ttt.capturable_` the block may stand in a CUDA graph. Then a gradient that is not finite raises nothing: the
    device finds it and changes nothing, and the block's `Outcome` says so.

    Raises:
        ValueError: if the model has no learning layer.
        FloatingPointError: if a gradient is not finite; nothing has changed then.
    """
    layers, outcome = require_layers(model), Outcome()
    with Capturing(layers) as capturing, torch.enable_grad():
        yield outcome
        captured = capturing.renew()
    updates = [layer.update_from(rows) for layer, rows in zip(layers, captured, strict=True)]
    if any(layer.capturable is not None for layer in layers):
        finite = [update.finite.view(1) for update in updates if update is not None]
        outcome.learned = torch.cat(finite).all().long().view(1) if finite else None
        for layer, update in zip(layers, updates, strict=True):
            if update is not None:
                layer.learn(update, outcome.learned)
        return
    for layer, update in zip(layers, updates, strict=True):
        if update is not None and not bool(update.finite):
            raise FloatingPointError(f"the gradient at {layer.name or layer} is not finite; nothing was learnt")
    for layer, update in zip(layers, updates, strict=True):
        if update is not None:
            layer.learn(update)
