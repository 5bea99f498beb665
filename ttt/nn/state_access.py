"""Reading and writing the (m, n) state of layers: importance and trace, however they are stored, and the weight."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ttt.nn.linear import Linear
from ttt.ops import log8


def read_matrix(layer: Linear, name: str) -> Tensor:
    """``importance`` or ``trace`` of ``layer``, decoded to (m, n) float32 (float64 for float64 weights).

    It may be the live tensor itself: do not write to it.
    """
    state = getattr(layer, name)
    if log8.is_packed(state):
        return log8.decode(state, layer.in_features)
    return state.to(layer.win_eta.dtype)


@torch.no_grad()
def write_matrix(layer: Linear, name: str, values: Tensor) -> None:
    """Store ``values`` (m, n), float32 or float64, rounded to nearest, as ``importance`` or ``trace`` of ``layer``.

    A tensor that is shared with other models (`ttt.fork`) is first replaced by one of the layer's own.
    """
    layer.unshare(name, copy=False)
    state = getattr(layer, name)
    state.copy_(log8.encode(values) if log8.is_packed(state) else values)


@torch.no_grad()
def set_weight(layer: Linear, delta: Tensor | None) -> None:
    """Set W to W* + ``delta`` (m, n), or to W* if ``delta`` is None, and empty the window."""
    if delta is None:
        layer.weight.copy_(layer.anchor)
    else:
        layer.weight.copy_(layer.anchor + delta)
    layer.win_eta.zero_()
    layer.pending = 0


@contextlib.contextmanager
def temporary_weights(layers: Sequence[Linear], deltas: Sequence[Tensor | None]) -> Iterator[None]:
    """Within the block, every layer has the weights that `set_weight` gives it with its delta.

    Afterwards the layers are as before, to the bit. Do not learn within the block.
    """
    before = [(layer.weight.detach().clone(), layer.win_eta.clone(), layer.pending) for layer in layers]
    try:
        for layer, delta in zip(layers, deltas, strict=True):
            set_weight(layer, delta)
        yield
    finally:
        with torch.no_grad():
            for layer, (weight, eta, pending) in zip(layers, before, strict=True):
                layer.weight.copy_(weight)
                layer.win_eta.copy_(eta)
                layer.pending = pending
