"""Kernels that take many layers in one call: the bindings of those in C++, and calls of that in Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ttt.nn.cpu_binding import Binding, bound, must_call_ops
from ttt.ops import cpu, cuda
from ttt.ops.backends import ONE_BY_ONE, record

_SEEN = "a layer whose calls must be seen one by one"


def bindings_of(op: str, layers: Sequence[Any]) -> list[Binding]:
    """The bindings of ``layers``, counted as a call of ``op``; empty if one has none: each must be called by itself."""
    found = [] if must_call_ops() else [bound(layer) for layer in layers]
    if found and None not in found:
        record(op, "cpu")
        return found
    weight = layers[0].weight
    on = f"no kernel for many layers on {weight.device.type}" if not weight.is_cpu else cpu.why_not(weight.dtype)
    record(op, ONE_BY_ONE, on or _SEEN)
    return []


def by_triton(op: str, layers: Sequence[Any], x: Tensor, counts: Sequence[int], transposed: bool) -> Tensor | None:
    """What the kernel `ttt.ops.triton.experts` gives, counted for ``op``; None if each layer must be called by itself.

    Args:
        layers: of one size and dtype, on a GPU.
        x: (R, n) inputs or, ``transposed``, gradients (R, m) at the outputs, in their dtype.
        counts: the number of rows of each layer.
    """
    why = _SEEN if must_call_ops() else cuda.why_not_experts(x.dtype, counts)
    if any(layer.bias is not None or not layer.weight.is_contiguous() for layer in layers):
        why = why or "a layer has a bias, or a weight that is not contiguous"
    if why:
        record(op, ONE_BY_ONE, why)
        return None
    record(op, "triton")
    held = [(layer.weight, layer.win_x, layer.win_delta, layer.win_eta) for layer in layers]
    return cuda.experts(x.contiguous(), held, counts, transposed)
