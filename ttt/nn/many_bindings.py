"""Kernels that take many layers in one call: the bindings of those in C++, and calls of that in Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ttt.nn.cpu_binding import Binding, bound, why_not_bound
from ttt.ops import cuda
from ttt.ops.backends import ONE_BY_ONE, record
from ttt.ops.modes import must_call_ops

_SEEN = "a dispatch mode or a compiler that must see every op"


def bindings_of(op: str, layers: Sequence[Any]) -> list[Binding]:
    """The bindings of ``layers``, counted as a call of ``op``; empty if one has none: each must be called by itself."""
    found = all_bound(layers)
    if None not in found:
        record(op, "cpu")
        return found
    record(op, ONE_BY_ONE, why_alone(layers[found.index(None)]))
    return []


def all_bound(layers: Sequence[Any]) -> list[Any]:
    """The binding of each of ``layers``, as `ttt.nn.cpu_binding.binding_of` finds it, or None."""
    return [None] * len(layers) if must_call_ops() else [bound(layer) for layer in layers]


def why_alone(layer: Any) -> str:
    """Why a layer for which `all_bound` finds None must be called by itself."""
    if must_call_ops():
        return _SEEN
    device = layer.weight.device.type
    return f"no kernel for many layers on {device}" if device != "cpu" else why_not_bound(layer)


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
