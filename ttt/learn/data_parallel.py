"""Learning in all processes from what each of them has read, as from one batch.

Each process holds the whole of every learning layer, and finds inputs and gradients of its own text. What they found is
joined before the update is made of it, in the order of the processes. So all make the same update, to the bit, which is
the one that a single process would make of a batch with all texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ttt.nn import Linear
from ttt.nn.parallel import SharedSide


def join(processes: Sequence[SharedSide], t: Tensor) -> Tensor:
    """The rows of ``t`` (T, ...) of all ``processes``, each of which may have another number T of them."""
    for side in processes:
        t = side.join(t)
    return t


def joined_rows(processes: Sequence[SharedSide], layer: Linear, given: tuple[Any, Any, Tensor | None]) -> Any:
    """The arguments of `ttt.nn.Linear.update_from` with the rows of all ``processes``.

    Args:
        given: those of this process, which may have captured nothing.
    """
    captured, traced, rows = given
    dtype, trace = layer.weight.dtype, None
    if captured:
        x, delta, trace = layer.rows_of(captured, traced, rows)
    else:
        x, delta = (layer.weight.new_zeros(0, size) for size in (layer.in_features, layer.out_features))
        trace = None if traced is None else delta
    parts = [x, delta] if trace is None else [x, delta, trace]
    found = join(processes, torch.cat([part.to(dtype) for part in parts], 1))
    if not len(found):
        return [], None, None
    x, *gradients = found.split([part.shape[1] for part in parts], 1)
    return [(x, gradients[0])], None if trace is None else [(x, gradients[1])], None
