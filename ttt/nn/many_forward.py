"""Several learning layers, each with rows of its own, as one node of autograd's graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ttt.nn.autocast import autocast_dtype, without_autocast
from ttt.nn.base import captures, is_traced, refuse_written
from ttt.nn.cpu_binding import Binding
from ttt.nn.linear import Linear
from ttt.nn.many_bindings import bindings_of, by_triton
from ttt.ops import cpu
from ttt.ops.backends import ONE_BY_ONE, record
from ttt.ops.modes import transforms_active


class _CaptureMany(torch.autograd.Function):
    """As that of one `ttt.nn.Linear`: the backward pass leaves (x, delta) and the places of each layer's own rows."""

    @staticmethod
    def forward(ctx, x, root, layers, counts, places):
        ctx.save_for_backward(x, places)
        ctx.layers, ctx.counts, ctx.captures = layers, counts, [captures(layer) for layer in layers]
        ctx.written = None if is_traced() else [layer.written() for layer in layers]
        return _outputs(layers, x, counts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, places = ctx.saved_tensors
        for layer, written in zip(ctx.layers, ctx.written or [], strict=False):  # none if this is traced
            if layer.written() != written:
                refuse_written(layer)
        deltas = grad.detach().split(ctx.counts)
        parts = zip(
            ctx.layers, ctx.captures, x.detach().split(ctx.counts), deltas, places.split(ctx.counts), strict=True
        )
        for layer, captured, rows, delta, own in parts:
            if layer.sink is not None and captured:
                layer.sink.append((rows, delta))
                layer.sink.places.append(own)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        with without_autocast(x.device):
            return _gradients(ctx.layers, grad.detach(), ctx.counts), None, None, None, None


def _outputs(layers: Sequence[Linear], x: Tensor, counts: list[int]) -> Tensor:
    """What `outputs_of` returns, without a graph."""
    if (y := _by_kernels("experts_forward", layers, x, counts, False)) is not None:
        return y
    return torch.cat([layer._apply_window(part) for layer, part in zip(layers, x.split(counts), strict=True)])


def _gradients(layers: Sequence[Linear], delta: Tensor, counts: list[int]) -> Tensor:
    """The gradients at the inputs (R, n) of those at the outputs, ``delta`` (R, m)."""
    if (found := _by_kernels("experts_backward", layers, delta, counts, True)) is not None:
        return found
    return torch.cat([layer._transposed_window(part) for layer, part in zip(layers, delta.split(counts), strict=True)])


def _by_kernels(op: str, layers: Sequence[Linear], x: Tensor, counts: list[int], transposed: bool) -> Tensor | None:
    """What the kernels for many layers make of the rows ``x``; None if each layer must be called by itself."""
    weight = layers[0].weight
    size = weight.shape[0 if transposed else 1]
    if x.dtype is not weight.dtype or x.shape != (sum(counts), size) or x.device != weight.device:
        return None  # a call of the layer says what is wrong
    if type(x) is not Tensor:  # those that wrap others have no address
        record(op, ONE_BY_ONE, f"rows in a {type(x).__name__}")
        return None
    if x.is_cuda:
        return by_triton(op, layers, x, counts, transposed)
    bindings = bindings_of(op, layers)
    return _by_bindings(layers, bindings, x.contiguous(), counts, transposed) if bindings else None


def _by_bindings(
    layers: Sequence[Linear], bindings: Sequence[Binding], x: Tensor, counts: list[int], transposed: bool
) -> Tensor:
    """`_by_kernels` in C++. Of layers with many rows torch makes the product with the weight."""
    one, at = bindings[0], 0
    few = cpu.FEW_OF_MANY[one.dtype][transposed]
    y = x.new_empty((len(x), one.n if transposed else one.m))
    for layer, count in zip(layers, counts, strict=True):
        if count > few:
            part, to, weight = x[at : at + count], y[at : at + count], layer.weight
            if transposed:
                torch.mm(part, weight, out=to)
            elif layer.bias is None:
                torch.mm(part, weight.T, out=to)
            else:
                torch.addmm(layer.bias, part, weight.T, out=to)
        at += count
    kernels = [binding.kernels for binding in bindings]
    kernel = cpu._C.backward_many if transposed else cpu._C.forward_many
    kernel(kernels, x.data_ptr(), y.data_ptr(), counts, few, torch.get_num_threads())
    return y


def outputs_of(layers: Sequence[Linear], x: Tensor, counts: list[int], places: Tensor) -> Tensor:
    """What each of ``layers`` gives for its own rows of ``x``, of which the first ``counts[0]`` are those of the first.

    Args:
        layers: of one size and dtype, at least one.
        x: (R, n), rows of all of them, one layer after the other.
        counts: how many rows each layer has, at least 1; R in all.
        places: (R,) int64: which tokens the rows are, for masks.

    Returns:
        (R, m).
    """
    if is_traced() or transforms_active() or any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers):
        parts = zip(layers, x.split(counts), places.split(counts), strict=True)
        return torch.cat([_called(layer, rows, own) for layer, rows, own in parts])
    if (dtype := autocast_dtype(x)) is not None:
        with without_autocast(x.device):
            return outputs_of(layers, x.to(layers[0].weight.dtype), counts, places).to(dtype)
    if torch.is_grad_enabled():
        for layer in layers:
            layer._require_frozen()
        if x.requires_grad or any(captures(layer) for layer in layers):
            return _CaptureMany.apply(x, layers[0]._root, layers, counts, places)
    return _outputs(layers, x, counts)


def _called(layer: Linear, x: Tensor, places: Tensor) -> Tensor:
    """The layer's output for the rows ``x`` of ``places``, which it remembers for masks if it is to learn from them."""
    if not captures(layer):
        return layer(x)
    object.__setattr__(layer, "places", places)
    try:
        return layer(x)
    finally:
        object.__setattr__(layer, "places", None)
