"""The states that sequence layers carry from token to token, and functions over all of their tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class MemoryState(NamedTuple):
    """The state of a memory that learns in mini-batches: TTT-Linear, TTT-MLP, Titans.

    Attributes:
        weights: a weight (B, H, I, O) and a bias (B, H, O) for each layer of the memory, after the latest token.
        start: the same before the first token of the present mini-batch; gradients are taken there.
        velocity: the momentum of each, or () for a memory without momentum.
        position: (B,) int64, the tokens of the present mini-batch so far.
    """

    weights: tuple[Tensor, ...]
    start: tuple[Tensor, ...]
    velocity: tuple[Tensor, ...]
    position: Tensor


class LargeChunkState(NamedTuple):
    """The state of fast weights that change at the ends of large chunks: LaCT and In-Place TTT.

    Attributes:
        weights: the fast weights (B, H, I, O), as they are used in the present chunk.
        sums: of the present chunk's updates, one for each of ``weights``.
        velocity: the momentum of each, or () without momentum.
        norms: the norms (B, H, 1, O) that the columns of each keep, or () if they keep none.
        momentum: (B, H), the sum of the present chunk's momentum factors, or None without momentum.
        position: (B,) int64, the tokens of the present chunk so far.
    """

    weights: tuple[Tensor, ...]
    sums: tuple[Tensor, ...]
    velocity: tuple[Tensor, ...]
    norms: tuple[Tensor, ...]
    momentum: Tensor | None
    position: Tensor


def map_state(function: Callable[..., Any], *states: Any) -> Any:
    """A state of the same form, of ``function``'s values of the tensors in the same places of ``states``."""
    first = states[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return function(*states)
    parts = [map_state(function, *of_all) for of_all in zip(*states, strict=True)]
    return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)


def tensors_of(state: Any) -> list[Tensor]:
    """All tensors of ``state``, in a fixed order."""
    found: list[Tensor] = []
    map_state(lambda t: found.append(t), state)
    return found


def own(state: Any) -> Any:
    """A copy of ``state``, which a step may change in place."""
    return map_state(torch.clone, state)


def for_sequences(weight: Tensor, batch: int) -> Tensor:
    """A contiguous copy (B, ...) of ``weight`` (...) for each of ``batch`` new sequences, also where that is only one.

    Steps change it in place, and the weight must keep its numbers.
    """
    return weight.unsqueeze(0).expand(batch, *weight.shape).clone(memory_format=torch.contiguous_format)


def changes_in_place(t: Tensor) -> bool:
    """Whether kernels can change ``t`` in place: it is contiguous, and no negative view (`torch.Tensor.is_neg`).

    The compiler cannot follow the second question; the ops refuse such views there.
    """
    return t.is_contiguous() and (torch.compiler.is_dynamo_compiling() or not t.is_neg())


def state_bytes(state: Any) -> int:
    """The bytes that the tensors of ``state`` hold."""
    return sum(t.numel() * t.element_size() for t in tensors_of(state))


def select_rows(state: Any, index: Tensor | slice) -> Any:
    """The rows ``index`` of the batch in every tensor of ``state``."""
    return map_state(lambda t: t[index], state)


def concatenated(states: Sequence[Any]) -> Any:
    """One state of the rows of all ``states``, in their order."""
    return states[0] if len(states) == 1 else map_state(lambda *ts: torch.cat(ts), *states)


def over_sequences(
    run: Callable[[tuple[Tensor | None, ...], Any], tuple[Tensor, Any]],
    tensors: tuple[Tensor | None, ...],
    state: Any,
    bounds: list[int] | None,
) -> tuple[Tensor, Any]:
    """The outputs and final states of ``run(tensors, state)``, sequence by sequence if they are packed.

    Args:
        tensors: (B, T, ...), or (1, T, ...) if packed; None stays None.
        state: with a row for each sequence, or None.
        bounds: where the packed sequences begin, and the end of the last; None if nothing is packed.
    """
    if bounds is None:
        return run(tensors, state)
    outs, states = [], []
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        part = tuple(None if t is None else t[:, begin:end] for t in tensors)
        out, final = run(part, select_rows(state, slice(n, n + 1)))
        outs.append(out)
        states.append(final)
    return torch.cat(outs, 1), concatenated(states)


def by_position(
    run: Callable[[tuple[Tensor | None, ...], Any, int], tuple[Tensor, Any]],
    tensors: tuple[Tensor | None, ...],
    state: Any,
) -> tuple[Tensor, Any]:
    """The outputs and final states of ``run(tensors, state, position)``, for rows at any positions.

    Rows at one position run together. Without ``state``, all are at position 0.
    """
    if state is None:
        return run(tensors, None, 0)
    found = state.position.unique().tolist()
    if len(found) <= 1:
        return run(tensors, state, found[0] if found else 0)
    order, outs, states = [], [], []
    for position in found:
        rows = (state.position == position).nonzero().flatten()
        out, final = run(tuple(None if t is None else t[rows] for t in tensors), select_rows(state, rows), position)
        order.append(rows)
        outs.append(out)
        states.append(final)
    back = torch.cat(order).argsort()
    return torch.cat(outs)[back], select_rows(concatenated(states), back)
