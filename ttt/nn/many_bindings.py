"""The bindings of many layers, whose C++ kernels take all of them in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ttt.nn.cpu_binding import Binding, binding_of
from ttt.ops import cpu
from ttt.ops.backends import ONE_BY_ONE, record


def bindings_of(op: str, layers: Sequence[Any]) -> list[Binding]:
    """The bindings of ``layers``; empty if one has none, and each must be called by itself. It is counted for ``op``."""
    found = [binding for layer in layers if (binding := binding_of(layer)) is not None]
    if len(found) == len(layers):
        record(op, "cpu")
        return found
    weight = layers[0].weight
    on = f"no kernel for many layers on {weight.device.type}" if not weight.is_cpu else cpu.why_not(weight.dtype)
    record(op, ONE_BY_ONE, on or "a layer whose calls must be seen one by one")
    return []
