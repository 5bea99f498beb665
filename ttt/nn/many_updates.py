"""The updates of many layers, of which those that get few rows each are made together.

A router sends each expert of a mixture a few tokens of a chunk. To compute the steps of one expert takes about as long
as of many, as it is some fifty small operations. So the rows of layers of one shape are padded with zeros to one
length, and `ttt.nn.rates` computes the steps of all of them at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ttt.nn import own_loss
from ttt.nn.autocast import without_autocast
from ttt.nn.feedback import Latest
from ttt.nn.linear import Linear
from ttt.nn.rates import Rows, rates
from ttt.nn.update import Update
from ttt.ops.dtypes import accumulation

MOST = 64
"""Layers whose windows and bases are copied at a time."""


class _Task(NamedTuple):
    """What one of several layers is to learn from: its place among them, and its rows (T, n) and (T, m), T > 0."""

    at: int
    layer: Linear
    x: Tensor
    delta: Tensor


@torch.no_grad()
def updates_from(layers: Sequence[Linear], given: Sequence[Any], emphasis: float = 1.0) -> list[Update | None]:
    """`Linear.update_from` of each of ``layers``, with the arguments (captured, trace_captured, rows) in ``given``.

    They get a ``gain`` where steps that are multiplied by ``emphasis`` are bounded by the loss (`ttt.nn.own_loss`).

    Those of experts are made together. They have the same values but for rounding. Nothing is written.

    Raises:
        ValueError: as `Linear.update_from`.
    """
    found: list[Update | None] = []
    alike: defaultdict[Any, list[_Task]] = defaultdict(list)
    for at, (layer, own) in enumerate(zip(layers, given, strict=True)):
        captured, traced, rows = own
        gains = own_loss.applies(layer.config, emphasis)
        if not captured or not layer.routed or layer.sharding or traced:
            found.append(layer.update_from(*own, gains=gains))
            continue
        x, delta, _ = layer.rows_of(captured, None, rows)
        if not len(x):
            found.append(layer.update_from([(x, delta)], gains=gains))
            continue
        found.append(None)
        # At most half of the rows are padding if the next power of two of their number is the same.
        alike[_kind(layer), (len(x) - 1).bit_length()].append(
            _Task(at, layer, x.to(layer.weight.dtype), delta.to(layer.weight.dtype))
        )
    for tasks in alike.values():
        for start in range(0, len(tasks), MOST):
            part = tasks[start : start + MOST]
            with without_autocast(part[0].layer.weight.device):
                updates = _together(part, own_loss.applies(part[0].layer.config, emphasis))
            for task, update in zip(part, updates, strict=True):
                task.layer.keep_in_budget(update)
                found[task.at] = update
    return found


def _kind(layer: Linear) -> Any:
    """What layers must have in common for their steps to be computed together."""
    weight = layer.weight
    return id(layer.config), layer.share, weight.shape, weight.dtype, weight.device


def _together(tasks: Sequence[_Task], gains: bool) -> list[Update]:
    """The updates of L layers of one kind, with a ``gain`` if ``gains``, but for what their budgets demand."""
    layers = [task.layer for task in tasks]
    first = layers[0]
    device, numbers = first.weight.device, [len(task.x) for task in tasks]
    x = pad_sequence([task.x for task in tasks], batch_first=True)
    delta = pad_sequence([task.delta for task in tasks], batch_first=True)
    latest = None
    if first.latest is not None:
        latest = Latest(*(torch.stack(parts) for parts in zip(*(layer.latest for layer in layers), strict=True)))
    limits = [layer.largest_step() for layer in layers]
    limit = None
    if any(limits):
        wide = [float("inf") if size is None else size for size in limits]
        limit = torch.tensor(wide, dtype=torch.float64, device=device).unsqueeze(1)
    moments = None if first.moments is None else torch.stack([layer.moments for layer in layers]).sum(1)

    def applied(x: Tensor, delta: Tensor) -> Rows:
        return _project(x, [layer.basis for layer in layers]), _project(delta, [la.output_basis for la in layers])

    made = rates(
        x, delta, first.config, first.win_eta.dtype, before=moments, applied=applied if first.damps else None,
        share=first.share, limit=limit, latest=latest, counts=torch.tensor(numbers, device=device).unsqueeze(1),
        gains=gains,
    )  # fmt: skip
    finite = made.finite.all(1)
    return [
        Update(
            x=x[i, :count],
            delta=delta[i, :count],
            eta=made.eta[i, :count],
            trace_delta=None,
            finite=finite[i],
            moments=None if made.grown is None else made.grown[i],
            weight=None if made.weight is None else made.weight[i, :count],
            agreement=None if made.agreement is None else made.agreement[i],
            gain=None if made.gain is None else made.gain[i, :count],
        )
        for i, count in enumerate(numbers)
    ]


def _project(rows: Tensor, bases: Sequence[Tensor | None]) -> Tensor:
    """`ttt.nn.directions.project_rows` of ``rows`` (L, T, n), each with its own of the L ``bases`` (k, n) or None."""
    given = [basis for basis in bases if basis is not None]
    if not given:
        return rows
    wide = accumulation(rows.dtype)
    u, x = torch.stack(given).to(wide), rows.to(wide)
    return (x - (x @ u.mT) @ u).to(rows.dtype)
