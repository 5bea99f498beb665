"""Undoing a learning step of users whose low-rank weights were written only in part."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ttt.atomic import whole_write
from ttt.nn import LowRankLinear
from ttt.nn.low_rank import PER_ROW, PER_SLOT
from ttt.per_user.pool import Companion
from ttt.signals import SignalsDeferred

_COUNTERS = ("rows", *PER_SLOT, "moments")


@contextlib.contextmanager
def whole_user_write(
    layers: Sequence[LowRankLinear], users: Tensor, companion: Companion | None = None
) -> Iterator[None]:
    """Inside, ``layers`` learn tokens of ``users``: all of them or, after an exception, none.

    No signal interrupts the block (`ttt.signals`). Appending leaves the rows in use as they are, so for going back
    it is enough to know the counters, and the rows of those slots that this step compresses.

    Args:
        users: (T,) int32, the slot of each token; -1 for tokens that nobody learns from.
        companion: of the users' pool; what its `pace` counts goes back, too.
    """
    counters = [{name: t.clone() for name in _COUNTERS if (t := getattr(layer, name)) is not None} for layer in layers]
    rows = [
        [(slot, {name: getattr(layer, name)[slot].clone() for name in PER_ROW}) for slot in slots]
        for layer, slots in zip(layers, _compressed(layers, users), strict=True)
    ]
    put_back = None if companion is None else companion.remember()
    with SignalsDeferred():
        try:
            yield
        except BaseException:
            if put_back is not None:
                put_back()
            with whole_write(layers, "going back from a learning step that failed"), torch.no_grad():
                for layer, counted, kept in zip(layers, counters, rows, strict=True):
                    for name, t in counted.items():
                        getattr(layer, name).copy_(t)
                    for slot, state in kept:
                        for name, t in state.items():
                            getattr(layer, name)[slot].copy_(t)
            raise


def _compressed(layers: Sequence[LowRankLinear], users: Tensor) -> list[list[int]]:
    """Of each layer, the slots that are full, or have too little room, when the tokens of ``users`` are learnt."""
    slots, capacity = layers[0].low_rank.slots, layers[0].low_rank.capacity
    count = torch.zeros(slots + 1, dtype=torch.int64, device=users.device)
    count = count.index_add_(0, users.long() + 1, torch.ones_like(users, dtype=torch.int64))[1:]
    full = torch.stack([(count > 0) & (layer.rows.to(users.device) + count >= capacity) for layer in layers])
    found: list[list[int]] = [[] for _ in layers]
    for layer, slot in full.nonzero().tolist():
        found[layer].append(slot)
    return found
