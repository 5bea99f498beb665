"""Reading and writing the (m, n) state of a layer, importance and trace, in whatever form it is stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ttt.ops import log8

if TYPE_CHECKING:
    from ttt.nn.linear import Linear


def wide(layer: Linear, name: str) -> Tensor:
    """``importance`` or ``trace`` of ``layer`` as (m, n) float32, float64 for float64 weights.

    It may be the live tensor itself: do not write to it.
    """
    state = getattr(layer, name)
    if log8.is_packed(state):
        return log8.decode(state, layer.in_features)
    return state.to(layer.win_eta.dtype)


@torch.no_grad()
def write(layer: Linear, name: str, values: Tensor) -> None:
    """Store ``values`` (m, n), float32 or float64, rounded to nearest, as ``importance`` or ``trace`` of ``layer``.

    A tensor that is shared with other models (`ttt.fork`) is replaced by one of the layer's own first.
    """
    layer.own(name, copy=False)
    state = getattr(layer, name)
    state.copy_(log8.encode(values) if log8.is_packed(state) else values)
