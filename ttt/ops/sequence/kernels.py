"""Which kernel serves a call of a sequence op, if any: C++ on CPUs, Triton on GPUs.

Where gradients are needed, there are kernels of the delta rule and of memories on CPUs. Each function returns a
callable, or None where the torch form must be taken; it is always taken while a transform of torch.func or forward-mode
autograd is active.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ttt.ops.backends import record
from ttt.ops.cpu import why_not
from ttt.ops.modes import transforms_active
from ttt.ops.sequence import cpu, cpu_steps, cuda, training
from ttt.ops.sequence.dual_form import NO_NORM
from ttt.ops.sequence.states import LargeChunkState, MemoryState, changes_in_place, tensors_of

MOST_MINI_BATCH = 256
"""Longest mini-batch of the C++ kernel for texts: its scratch memory grows with the square of it."""

MOST_FAST_WEIGHT = 1 << 16
"""Most numbers of a head's fast weight for the C++ kernel for texts with large chunks, which keeps it in the cache."""

_SCHEMAS = {
    "sequence_delta_rule": (
        "(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor? state, Tensor? begins, float scale) "
        "-> (Tensor, Tensor)"
    ),
    "sequence_delta_rule_step": (
        "(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor(a!) state, float scale) -> Tensor"
    ),
    "sequence_memory": (
        "(Tensor q, Tensor k, Tensor v, Tensor rate, Tensor? gate, Tensor? momentum, Tensor? norm_weight, "
        "Tensor? norm_bias, float eps, Tensor[] weights, Tensor[] start, Tensor[] velocity, Tensor position, "
        "Tensor? begins, int mini_batch, float scale) -> (Tensor, Tensor[], Tensor[], Tensor[], Tensor)"
    ),
    "sequence_memory_step": (
        "(Tensor q, Tensor k, Tensor v, Tensor rate, Tensor? gate, Tensor? momentum, Tensor? norm_weight, "
        "Tensor? norm_bias, float eps, Tensor(a!)[] weights, Tensor(b!)[] start, Tensor(c!)[] velocity, "
        "Tensor(d!) position, int mini_batch, float scale) -> Tensor"
    ),
    "sequence_large_chunk": (
        "(Tensor q, Tensor k, Tensor v, Tensor rates, Tensor? momentum, Tensor[] weights, Tensor[] sums, "
        "Tensor[] velocity, Tensor[] norms, Tensor[] total_momentum, Tensor position, Tensor? begins, int size, "
        "bool orthogonal, float scale) -> (Tensor, Tensor[], Tensor[], Tensor[], Tensor[], Tensor)"
    ),
    "sequence_large_chunk_step": (
        "(Tensor q, Tensor k, Tensor v, Tensor rates, Tensor? momentum, Tensor[] weights, Tensor(a!)[] sums, "
        "Tensor(b!)? total_momentum, Tensor(c!) position, float scale) -> Tensor"
    ),
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"ttt::{_name}", _schema)


def gated_delta_rule(q, k, v, beta, g, state) -> Callable | None:
    """The kernel of `ttt.ops.sequence.gated_delta_rule`."""
    others = (k, v, beta, g, state)
    if q.device.type == "cpu" and _need_gradients(q, *others):
        return training.delta_rule if _trains("gated_delta_rule", q) else None
    served = _serves("gated_delta_rule", lambda: cuda.why_not(q, v), q, *others)
    return torch.ops.ttt.sequence_delta_rule if served else None


def gated_delta_rule_step(q, k, v, beta, g, state) -> Callable | None:
    """The kernel of `ttt.ops.sequence.gated_delta_rule_step`."""
    served = _serves("gated_delta_rule_step", lambda: cuda.why_not(q, v), q, k, v, beta, g, state)
    return torch.ops.ttt.sequence_delta_rule_step if served else None


def memory(
    q, k, v, rate, gate, momentum, norm: Any, state: MemoryState, mini_batch: int, begun: bool
) -> Callable | None:
    """The kernel of `ttt.ops.sequence.memory`, called with the state, where packed texts begin, and the options.

    ``begun``: whether the state may be within a mini-batch.
    """
    if q.device.type == "cpu" and mini_batch > MOST_MINI_BATCH:
        return None
    tensors = (k, v, rate, gate, momentum, *(norm or NO_NORM)[:2], *tensors_of(state))
    if q.device.type == "cpu" and _need_gradients(q, *tensors):
        op = cpu_steps.memory_op(state.weights, gate, momentum, norm and norm.weight)
        if not _trains(op, q) or (begun and bool(state.position.any())):
            return None
        return functools.partial(training.memory, q, k, v, rate, gate, momentum, norm or NO_NORM)
    if not _serves_memory("", q, k, v, rate, gate, momentum, norm, state):
        return None

    def run(state, begins, mini_batch, scale):
        held = (state.weights, state.start, state.velocity, state.position)
        out, weights, start, velocity, position = torch.ops.ttt.sequence_memory(
            q, k, v, rate, gate, momentum, *(norm or NO_NORM), *held, begins, mini_batch, scale
        )
        return out, MemoryState(tuple(weights), tuple(start), tuple(velocity), position)

    return run


def memory_step(q, k, v, rate, gate, momentum, norm: Any, state: MemoryState) -> Callable | None:
    """The kernel of `ttt.ops.sequence.memory_step`, called with the state and the options."""
    if not _serves_memory("_step", q, k, v, rate, gate, momentum, norm, state):
        return None

    def run(state, mini_batch, scale):
        held = (state.weights, state.start, state.velocity, state.position)
        return torch.ops.ttt.sequence_memory_step(
            q, k, v, rate, gate, momentum, *(norm or NO_NORM), *held, mini_batch, scale
        )

    return run


def large_chunk(op: str, q, k, v, rates, momentum, state: LargeChunkState) -> Callable | None:
    """The kernel of ``op`` for texts, called with where packed texts begin, the size of chunks and the options."""
    if q.device.type != "cpu" or not q.numel() or max(w[0, 0].numel() for w in state.weights) > MOST_FAST_WEIGHT:
        return None
    if _need_gradients(q, k, v, rates, momentum, *tensors_of(state)) or _counted(op, _why_not_cpu(op, q)):
        return None

    def run(begins, size, orthogonal, scale):
        total = [] if state.momentum is None else [state.momentum]
        held = (state.weights, state.sums, state.velocity, state.norms, total, state.position)
        out, weights, sums, velocity, total, position = torch.ops.ttt.sequence_large_chunk(
            q, k, v, rates, momentum, *held, begins, size, orthogonal, scale
        )
        found = (tuple(weights), tuple(sums), tuple(velocity), state.norms)
        return out, LargeChunkState(*found, total[0] if total else None, position)

    return run


def large_chunk_step(op: str, q: Tensor, state: LargeChunkState) -> Callable | None:
    """The kernel of the token's part of ``op``, for tokens ``q`` and a state, none of which needs a gradient."""
    why = _why_not_cpu(op, q) if q.device.type == "cpu" else f"no kernel for {q.device.type}"
    if not why and not all(map(changes_in_place, (*state.weights, *state.sums, state.position))):
        why = "a state that is not contiguous, or is a negative view"
    return None if _counted(op, why) else torch.ops.ttt.sequence_large_chunk_step


_TRANSFORMED = "a transform of torch.func, or forward-mode autograd, that must see every op"


def _serves_memory(end: str, q, k, v, rate, gate, momentum, norm: Any, state: MemoryState) -> bool:
    op = cpu_steps.memory_op(state.weights, gate, momentum, norm and norm.weight) + end
    others = (k, v, rate, gate, momentum, *(norm or NO_NORM)[:2], *tensors_of(state))
    return _serves(op, lambda: cuda.why_not_memory(q, state.weights), q, *others)


def _serves(op: str, why_not_cuda: Callable[[], str], q: Tensor, *others: Tensor | None) -> bool:
    """Whether a kernel serves ``q`` and the others, none of which needs a gradient; if it does not, counts why."""
    if _need_gradients(q, *others):
        return False
    if q.device.type == "cpu":
        why = _why_not_cpu(op, q)
    elif q.device.type == "cuda":
        why = _TRANSFORMED if transforms_active() else why_not_cuda()
    else:
        why = f"no kernel for {q.device.type}"
    return not _counted(op, why)


def _trains(op: str, q: Tensor) -> bool:
    """Whether a kernel on CPUs serves ``q`` with gradients; if it does not, counts why."""
    return not _counted(op, _why_not_cpu(op, q))


def _why_not_cpu(op: str, q: Tensor) -> str:
    """Empty if the C++ kernels serve ``q``, else the reason they do not."""
    if transforms_active():
        return _TRANSFORMED
    return why_not(q.dtype) or (cpu_steps.UNREAD if op.endswith("_step") else "")


def _need_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _counted(op: str, why: str) -> str:
    """``why``, after counting a call of the torch form unless it is empty."""
    if why:
        record(op, "torch", why)
    return why


def _fake_delta_rule(q, k, v, beta, g, state, begins, scale):
    rows = q.shape[0] if begins is None else begins.shape[0] - 1
    shape = (rows, q.shape[2], q.shape[3], v.shape[3])
    return v.new_empty(v.shape), q.new_empty(shape, dtype=torch.float32)


def _fake_delta_rule_step(q, k, v, beta, g, state, scale):
    return v.new_empty(v.shape)


def _fake_memory(q, k, v, rate, gate, momentum, norm_weight, norm_bias, eps, weights, start, velocity, position, *_):
    new = ([torch.empty_like(t) for t in tensors] for tensors in (weights, start, velocity))
    return q.new_empty(q.shape), *new, torch.empty_like(position)


def _fake_memory_step(q, *_):
    return q.new_empty(q.shape)


def _fake_large_chunk(q, k, v, rates, momentum, weights, sums, velocity, norms, total_momentum, position, *_):
    new = ([torch.empty_like(t) for t in tensors] for tensors in (weights, sums, velocity, total_momentum))
    return v.new_empty(v.shape), *new, torch.empty_like(position)


def _fake_large_chunk_step(q, k, v, *_):
    return v.new_empty(v.shape)


for _op, _run, _fake in (
    ("delta_rule", cpu.delta_rule, _fake_delta_rule),
    ("delta_rule_step", cpu.delta_rule_step, _fake_delta_rule_step),
    ("memory", cpu.memory, _fake_memory),
    ("memory_step", cpu.memory_step, _fake_memory_step),
    ("large_chunk", cpu.large_chunk, _fake_large_chunk),
    ("large_chunk_step", cpu.large_chunk_step, _fake_large_chunk_step),
):
    torch.library.impl(f"ttt::sequence_{_op}", "CPU", _run)
    torch.library.register_fake(f"ttt::sequence_{_op}", _fake)
torch.library.impl("ttt::sequence_delta_rule", "CUDA", cuda.delta_rule)
torch.library.impl("ttt::sequence_delta_rule_step", "CUDA", cuda.delta_rule_step)
torch.library.impl("ttt::sequence_memory", "CUDA", cuda.memory)
torch.library.impl("ttt::sequence_memory_step", "CUDA", cuda.memory_step)
