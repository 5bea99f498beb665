"""Learning of many layers, of which those of experts learn in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ttt.nn.cpu_binding import Binding
from ttt.nn.linear import Linear
from ttt.nn.many_bindings import all_bound, why_alone
from ttt.nn.update import Update
from ttt.ops import cpu
from ttt.ops.backends import ONE_BY_ONE, record


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

    Those of the first kind are checked: they cannot be refused any more, unless a counter of a layer was damaged. Of a
    layer that has several updates, all but the first are among the others, which are learnt afterwards.

    `ttt.info` counts the call, and once more for each reason for which experts learn by themselves.
    """
    found: list[Together] = []
    others: list[tuple[Linear, Update]] = []
    met: set[int] = set()
    reasons: dict[str, None] = {}  # in the order in which they were met
    bindings = iter(all_bound([layer for layer, _ in updates]))
    for layer, update in updates:
        rows, binding, given = len(update.x), next(bindings), None
        if not (layer.routed and rows and layer.config.lr):
            others.append((layer, update))
            continue
        again, full = id(layer) in met, layer._pending + rows
        met.add(id(layer))
        if binding is not None and not again:
            given = binding.given(update, layer._pending)
        if given is not None:
            found.append(Together(layer, binding, full, given, update))
            continue
        others.append((layer, update))
        if again:
            why = "a layer that learns twice in one step"
        else:
            why = why_alone(layer) if binding is None else binding.why_not_given(full)
        reasons[why] = None
    if found:
        record("experts_learn", "cpu")
    for why in reasons:
        record("experts_learn", ONE_BY_ONE, why)
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
        one.layer.set_learnt(one.binding.learnt(one.rows, one.update))
