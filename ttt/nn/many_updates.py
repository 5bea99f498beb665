"""The updates of many layers, of which those of one shape are made together.

To compute the steps of one layer is some hundred small operations, which take about as long for many layers. So
`ttt.nn.rates` computes the steps of all experts of one shape at once, to each of which a router sends a few tokens of a
chunk: their rows are padded with zeros to one length. On the CPU it does so for other layers, too, except where they
get so many rows that sums over these are made as matrices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ttt.nn.autocast import without_autocast
from ttt.nn.cpu_binding import Binding, binding_of
from ttt.nn.feedback import Followed, Latest
from ttt.nn.linear import Linear
from ttt.nn.many_bindings import all_bound, bindings_of
from ttt.nn.own_loss import applies
from ttt.nn.parallel import UNSHARDED, Sharding
from ttt.nn.rates import Rows, rates
from ttt.nn.update import Update
from ttt.ops import cpu
from ttt.ops.dtypes import accumulation

MOST = 64
"""Layers that are computed at a time where their bases or windows are copied."""

FEW = 8
"""Up to so many rows, the operations take longer than what they compute: all such layers are computed together."""


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

    Those of layers of one shape are made together if they are experts, and on the CPU usually if they are not. They
    have the same values but for rounding. Nothing is written.

    Raises:
        ValueError: as `Linear.update_from`.
    """
    found: list[Update | None] = []
    alike: defaultdict[Any, list[_Task]] = defaultdict(list)
    for at, (layer, own) in enumerate(zip(layers, given, strict=True)):
        captured, traced, rows = own
        gains = applies(layer.config, emphasis)
        if not captured:
            found.append(None)
            continue
        if layer.sharding or traced or not (layer.routed or _is_on_cpu(layer)):
            found.append(layer.update_from(*own, gains=gains))
            continue
        x, delta, _ = layer.rows_of(captured, None, rows)
        count = x.shape[0]
        if not count or type(x) is not Tensor or type(delta) is not Tensor:  # kernels could not read others' rows
            found.append(layer.update_from([(x, delta)], gains=gains))
            continue
        weight = layer.weight
        x, delta = x.to(weight.dtype).contiguous(), delta.to(weight.dtype).contiguous()
        if not layer.routed and (count * sum(weight.shape) > weight.numel() or not cpu.takes(x, delta)):
            found.append(layer.update_from([(x, delta)], gains=gains))
            continue
        found.append(None)
        # Of many rows at most half are padding if the next power of two of their number is the same.
        length = (max(count, FEW) - 1).bit_length()
        alike[id(layer.config), layer.share, layer.routed, weight.shape, weight.dtype, weight.device, length].append(
            _Task(at, layer, x, delta)
        )
    for tasks in alike.values():
        if len(tasks) == 1 and not tasks[0].layer.routed:
            at, layer, x, delta = tasks[0]
            found[at] = layer.update_from([(x, delta)], gains=applies(layer.config, emphasis))
            continue
        most = MOST if tasks[0].layer.damps or binding_of(tasks[0].layer) is None else 4 * MOST
        for start in range(0, len(tasks), most):
            part = tasks[start : start + most]
            with without_autocast(part[0].layer.weight.device):
                updates = _together(part, applies(part[0].layer.config, emphasis))
            for task, update in zip(part, updates, strict=True):
                task.layer.keep_in_budget(update)
                found[task.at] = update
    return found


def _together(tasks: Sequence[_Task], gains: bool) -> list[Update]:
    """The updates of L layers of one kind, with a ``gain`` if ``gains``, but for what their budgets demand."""
    layers = [task.layer for task in tasks]
    first = layers[0]
    device, numbers = first.weight.device, [len(task.x) for task in tasks]
    x = pad_sequence([task.x for task in tasks], batch_first=True)
    delta = pad_sequence([task.delta for task in tasks], batch_first=True)
    latest = None
    if first.latest is not None:
        latest = _latest_of(layers, numbers)
    limits = [layer.largest_step() for layer in layers]
    limit = None
    if any(limits):
        wide = [float("inf") if size is None else size for size in limits]
        limit = torch.tensor(wide, dtype=torch.float64, device=device).unsqueeze(1)
    moments = None if first.moments is None else _stacked(layers, "moments").sum(1)

    rows_applied: list[Rows] = []  # of each layer, where they are kept

    def applied(x: Tensor, delta: Tensor) -> Rows:
        if first.routed:
            return _project(x, [layer.basis for layer in layers]), _project(delta, [la.output_basis for la in layers])
        # Where layers have many rows each, this takes less time.
        rows_applied.extend(layer.applied(*own) for layer, *own in zip(layers, x, delta, strict=True))
        inputs, gradients = zip(*rows_applied, strict=True)
        return torch.stack(inputs), torch.stack(gradients)

    made = rates(
        x, delta, first.config, first.win_eta.dtype, before=moments, applied=applied if first.damps else None,
        share=first.share, limit=limit, latest=latest, counts=torch.tensor(numbers, device=device).unsqueeze(1),
        gains=gains,
    )  # fmt: skip
    several = (made.grown, made.weight, made.agreement, made.gain)
    each = [[None] * len(tasks) if t is None else t.unbind() for t in several]
    kept: Sequence[Rows | None] = rows_applied or [None] * len(tasks)
    parts = zip(tasks, made.eta.unbind(), made.finite.all(1).unbind(), *each, kept, strict=True)
    return [
        Update(
            x=task.x,
            delta=task.delta,
            eta=eta[: len(task.x)],
            trace_delta=None,
            finite=finite,
            moments=grown,
            weight=None if weight is None else weight[: len(task.x)],
            agreement=agreement,
            gain=None if gain is None else gain[: len(task.x)],
            applied=None if rows is None else (rows[0][: len(task.x)], rows[1][: len(task.x)]),
            made_of=task.layer.made_of(task.x, task.delta),
        )
        for task, eta, finite, grown, weight, agreement, gain, rows in parts
    ]


class _BoundLatest(NamedTuple):
    """The latest updates of L layers, whose windows the kernels read where they are (`ttt.nn.feedback.Followed`).

    Attributes:
        weight: (L, C).
        agreement: (L, 1).
        counts: the number of rows of each layer; those after them are 0.
    """

    weight: Tensor
    agreement: Tensor
    bindings: list[Binding]
    counts: list[int]

    def pairs(self, x: Tensor, delta: Tensor, wide: torch.dtype, sharding: Sharding = UNSHARDED) -> Tensor:
        """(L, T, C) for ``x`` (L, T, n) and ``delta`` (L, T, m), in the dtype ``wide``, which is float32."""
        layers, rows, _ = x.shape
        found = x.new_zeros((layers, rows, self.weight.shape[1]), dtype=wide)
        x, delta = x.contiguous(), delta.contiguous()
        cpu._C.pairs_many(
            [binding.kernels for binding in self.bindings], x.data_ptr(), delta.data_ptr(), found.data_ptr(),
            self.counts, rows, torch.get_num_threads(),
        )  # fmt: skip
        return found


def _latest_of(layers: Sequence[Linear], counts: list[int]) -> Followed:
    """The latest updates of L ``layers``, which are to get ``counts`` rows."""
    # Only those of experts are counted.
    bindings = bindings_of("experts_update", layers) if layers[0].routed else all_bound(layers)
    if bindings and None not in bindings:
        return _BoundLatest(_stacked(layers, "win_weight"), _stacked(layers, "agreement"), bindings, counts)
    return Latest(*(torch.stack(parts) for parts in zip(*(layer.latest for layer in layers), strict=True)))


def _stacked(layers: Sequence[Linear], buffer: str) -> Tensor:
    return torch.stack([layer._buffers[buffer] for layer in layers])  # type: ignore[misc]


def _is_on_cpu(layer: Linear) -> bool:
    return layer.weight.is_cpu and layer._counter is None


def _project(rows: Tensor, bases: Sequence[Tensor | None]) -> Tensor:
    """`ttt.nn.directions.project_rows` of ``rows`` (L, T, n), each with its own of the L ``bases`` (k, n) or None."""
    given = [basis for basis in bases if basis is not None]
    if not given:
        return rows
    wide = accumulation(rows.dtype)
    u, x = torch.stack(given).to(wide), rows.to(wide)
    return (x - (x @ u.mT) @ u).to(rows.dtype)
