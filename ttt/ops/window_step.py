"""Implements ``torch.ops.ttt.window_step`` by the ops `commit` and `window_append`, on devices without a kernel for it."""

from __future__ import annotations

import torch

from ttt.ops import schema
from ttt.ops.arguments import WindowStepArguments


def by_two_ops(*args) -> None:
    """Commit the window if it is full, and append the new rows."""
    a = WindowStepArguments(*args)
    full = a.counters[1:2]
    torch.ops.ttt.commit(*a.commit._replace(gate=full if a.gate is None else full * a.gate))
    torch.ops.ttt.window_append(*a.append)


schema.implement("window_step", "CompositeExplicitAutograd", by_two_ops)
