"""Whole texts in the torch forms of `memory`: the dual form, or token by token."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ttt.ops.dtypes import accumulation
from ttt.ops.sequence import dual_form, memory_reference
from ttt.ops.sequence.dual_form import Norm
from ttt.ops.sequence.states import MemoryState, by_position, over_sequences, own


def texts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    gate: Tensor | None,
    momentum: Tensor | None,
    norm: Norm | None,
    state: MemoryState,
    bounds: list[int] | None,
    mini_batch: int,
    scale: float,
    position: int | None = None,
    reference: bool = False,
) -> tuple[Tensor, MemoryState]:
    """The outputs in the dtype of q, and the final states.

    Args:
        q, k, v, rate, gate, momentum, norm, mini_batch, scale: as of `ttt.ops.sequence.memory`, checked.
        state: in float32, or float64 if the others are.
        bounds: where packed sequences begin, and the end of the last; None if they are not packed.
        position: of all rows of ``state``; None if it has to be read from there.
        reference: whether to go token by token.
    """
    dtype = accumulation(q.dtype)
    wide: Any = tuple(None if t is None else t.to(dtype) for t in (q * scale, k, v, rate, gate, momentum))
    wide_norm = None if norm is None else Norm(norm.weight.to(dtype), norm.bias.to(dtype), norm.eps)

    def at_position(tensors: Any, state: Any, position: int) -> Any:
        given: Any = (*tensors, state, wide_norm, mini_batch, position)
        return dual_form.chunked(*given)

    def run(tensors: Any, state: Any) -> Any:
        if reference:
            given: Any = (*tensors, state, wide_norm, mini_batch)
            return memory_reference.recurrent(*given)
        if position is not None:
            return at_position(tensors, state, position)
        return by_position(at_position, tensors, state)

    out, final = over_sequences(run, wide, state, bounds)
    return out.to(q.dtype), own(final) if q.shape[1] == 0 else final
