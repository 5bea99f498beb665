"""Learning of many layers, of which those of experts learn in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ttt.nn.cpu_binding import Binding
from ttt.nn.linear import Linear
from ttt.nn.many_bindings import bindings_of
from ttt.nn.update import Update
from ttt.ops import cpu


class Together(NamedTuple):
    """A layer that learns in one call with others.

    Attributes:
        rows: the number of rows in its window afterwards, before a commit.
        given: what the kernels are given (`ttt.nn.cpu_binding.Binding.given`).
        update: what it learns, whose tensors ``given`` has the addresses of.
    """

    layer: Linear
    binding: Binding
    rows: int
    given: tuple[int, ...]
    update: Update


def divided(updates: Sequence[tuple[Linear, Update]]) -> tuple[list[Together], list[tuple[Linear, Update]]]:
    """Which of ``updates`` are to be learnt in one call by `learn_together`, and the others. Nothing is written.

    Those of the first kind are checked: they cannot be refused any more, unless a counter of a layer was damaged.
    """
    found: list[Together] = []
    others: list[tuple[Linear, Update]] = []
    experts = [layer for layer, _ in updates if layer.routed]
    bindings = iter(bindings_of("experts_learn", experts) if experts else ())
    for layer, update in updates:
        binding = next(bindings, None) if layer.routed else None
        given = None
        if binding is not None and len(update.x) and layer.config.lr:
            given = binding.given(update, layer._pending)
        if binding is None or given is None:
            others.append((layer, update))
        else:
            found.append(Together(layer, binding, layer._pending + len(update.x), given, update))
    return found, others


@torch.no_grad()
def learn_together(found: Sequence[Together]) -> None:
    """Let the layers learn what `divided` has found for them, as `ttt.nn.Linear.learn` does, with the same bits.

    Raises:
        ValueError: if a counter of a layer is out of range. Nothing has changed then.
    """
    if not found:
        return
    cpu._C.learn_many([one.binding.kernels for one in found], [one.given for one in found], torch.get_num_threads())
    for one in found:
        one.layer.set_learnt(one.binding.learnt(one.rows))
