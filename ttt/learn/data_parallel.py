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
from ttt.nn.parallel import SharedSide, agreed, is_sharded, same_bits
from ttt.nn.quantized import plain_parts


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


def refuse_other_replicas(processes: Sequence[SharedSide], model: Any, layers: Sequence[Linear]) -> None:
    """Raise ValueError, in all ``processes``, unless all of them hold the same model, to the bit.

    Only then do they stay the same. Compared are the parameters and buffers that are not sharded, and the state of the
    ``layers``. Weights that were compared, or written by `learnt_together`, since they were last changed are not read
    again.
    """
    small = [t for layer in layers for name, t in layer.state().items() if t.shape != layer.weight.shape]
    large: list[Tensor] = []
    if not bool(agreed(processes, torch.tensor(_compared(layers), device=layers[0].weight.device))):
        held = [*model.parameters(), *model.buffers()]
        large = [part for t in held if not is_sharded(t) for _, part in plain_parts(t)]
    if not same_bits(processes, [*small, *large]):
        raise ValueError(
            "data_parallel must be False where the processes hold different models, as each learns from the texts of "
            "all and they must stay the same: weights, or what was learnt, differ between them. Load the same "
            "checkpoint, and with ttt.load what was learnt, in all of them"
        )
    learnt_together(layers)


def learnt_together(layers: Sequence[Linear]) -> None:
    """Remember that the ``layers`` are now the same in all processes, where they were before."""
    for layer in layers:
        object.__setattr__(layer, "_together", _written(layer))


def _compared(layers: Sequence[Linear]) -> bool:
    return all(getattr(layer, "_together", None) == _written(layer) for layer in layers)


def _written(layer: Linear) -> Any:
    """What tells whether the weight of ``layer`` was written."""
    return layer.weight.data_ptr(), layer.weight._version
