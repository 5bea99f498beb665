"""Steps of the sequence ops on CPUs, of one token of each sequence: one call of a C++ kernel that checks its arguments.

With a state that fits into the cache, checks in Python and torch's dispatcher would take several times as long as the
kernels. So the ops first try the functions here. Where one of the arguments is not what a kernel reads, as one that is
wrong, has another dtype, is a negative view, or is on another device, they return None and have written nothing; the
ops then check the arguments one by one, and go through torch's dispatcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ttt.ops.backends import record
from ttt.ops.cpu import _C
from ttt.ops.modes import must_call_ops
from ttt.ops.sequence.checks import MOST_COUNT
from ttt.ops.sequence.dual_form import NO_NORM, Norm
from ttt.ops.sequence.states import LargeChunkState, MemoryState

UNREAD = "" if _C is None else _C.read_tensors(torch.Tensor, torch.nn.Parameter)
"""Empty, or why the kernels of steps cannot read the tensors of this version of torch."""


def delta_rule(q: Any, k: Any, v: Any, beta: Any, g: Any, state: Any, scale: float | None) -> Tensor | None:
    """`ttt.ops.sequence.gated_delta_rule_step`, or None."""
    out = _out_like(v)
    if out is None or type(q) is not Tensor or q.dim() != 3 or not q.shape[-1]:
        return None
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not _C.delta_rule_step(q, k, v, beta, g, state, out, scale, torch.get_num_threads()):
        return None
    counted("gated_delta_rule_step", [state])
    return out


def memory(
    q: Any, k: Any, v: Any, rate: Any, gate: Any, momentum: Any, norm: Any, state: Any, size: Any, scale: float | None
) -> Tensor | None:
    """`ttt.ops.sequence.memory_step` in mini-batches of ``size`` tokens, or None."""
    out = _out_like(q)
    if out is None or type(state) is not MemoryState or not _is_count(size):
        return None
    if norm is not None and (type(norm) is not Norm or type(norm.eps) is not float):
        return None
    weights, start, velocity, position = state
    weight, bias, eps = norm or NO_NORM
    done = _C.memory_step(
        q, k, v, rate, gate, momentum, weight, bias, eps, weights, start, velocity, position, out, size,
        1.0 if scale is None else float(scale), torch.get_num_threads(),
    )  # fmt: skip
    if not done:
        return None
    counted(memory_op(weights, gate, momentum, weight) + "_step", [*weights, *start, *velocity, position])
    return out


def large_chunk(
    q: Any, k: Any, v: Any, rates: Any, momentum: Any, state: Any, weights: int, size: Any, scale: float | None
) -> tuple[Tensor, bool] | None:
    """The token's part of `lact_step` (three ``weights``) or `in_place_ttt_step` (one), in chunks of ``size`` tokens.

    Returns:
        The output, and whether the chunk of some sequence is full now and has to be ended; or None.
    """
    out = _out_like(v)
    if out is None or type(state) is not LargeChunkState or not _is_count(size) or len(state.weights) != weights:
        return None
    done = _C.large_chunk_step(
        q, k, v, rates, momentum, state.weights, state.sums, state.velocity, state.norms, state.momentum,
        state.position, out, size, 1.0 if scale is None else float(scale), torch.get_num_threads(),
    )  # fmt: skip
    if not done:
        return None
    large_chunk_counted(state.sums, state.momentum, state.position)
    return out, done == 2


def large_chunk_counted(sums: Sequence[Tensor], momentum: Tensor | None, position: Tensor) -> None:
    """Count a call of `large_chunk`, and the changes of these parts of its state."""
    changed = [*sums, position] if momentum is None else [*sums, momentum, position]
    counted("lact_step" if len(sums) == 3 else "in_place_ttt_step", changed)


def counted(op: str, changed: list[Tensor]) -> None:
    """Count a call of ``op``, and for autograd that it has ``changed`` these tensors."""
    record(op, "cpu")
    torch.autograd.graph.increment_version(changed)


def memory_op(weights: Sequence[Tensor], gate: Any, momentum: Any, norm_weight: Any) -> str:
    """The name under which calls of `memory` with these arguments are counted."""
    if gate is None and momentum is None and norm_weight is not None:
        return {2: "ttt_linear", 4: "ttt_mlp"}.get(len(weights), "memory")
    return "memory" if gate is None or momentum is None or norm_weight is not None else "titans"


def _is_count(size: Any) -> bool:
    return type(size) is int and 0 < size <= MOST_COUNT


def _out_like(t: Any) -> Tensor | None:
    """What the output is written to, of the shape and dtype of ``t``; None where no kernel may be called directly.

    With gradients, the ops have to see whether an argument needs one.
    """
    if _C is None or UNREAD or type(t) is not Tensor or torch.is_grad_enabled() or must_call_ops() or not t.is_cpu:
        return None
    return torch.empty_like(t, memory_format=torch.contiguous_format)
