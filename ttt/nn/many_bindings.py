"""The bindings of many layers, whose C++ kernels take all of them in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ttt.nn.cpu_binding import Binding, bound, must_call_ops
from ttt.ops import cpu
from ttt.ops.backends import ONE_BY_ONE, record


def bindings_of(op: str, layers: Sequence[Any]) -> list[Binding]:
    """The bindings of ``layers``, counted as a call of ``op``; empty if one has none: each must be called by itself."""
    found = [] if must_call_ops() else [bound(layer) for layer in layers]
    if found and None not in found:
        record(op, "cpu")
        return found
    weight = layers[0].weight
    on = f"no kernel for many layers on {weight.device.type}" if not weight.is_cpu else cpu.why_not(weight.dtype)
    record(op, ONE_BY_ONE, on or "a layer whose calls must be seen one by one")
    return []
