"""Which kernel serves a call of a sequence op, if any: C++ on CPUs, Triton on GPUs, where no gradient is needed.

Each function returns a callable, or None where the torch form must be taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ttt.ops.backends import record
from ttt.ops.cpu import _C, _DTYPE, _address, _why_not
from ttt.ops.sequence.states import MemoryState, own, tensors_of

MOST_MINI_BATCH = 256
"""Longest mini-batch of the C++ kernel for texts: its scratch memory grows with the square of it."""

_SCHEMAS = {
    "sequence_delta_rule": (
        "(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor? state, Tensor? begins, float scale) "
        "-> (Tensor, Tensor)"
    ),
    "sequence_delta_rule_step": (
        "(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor(a!) state, float scale) -> Tensor"
    ),
    "sequence_ttt_linear": (
        "(Tensor q, Tensor k, Tensor v, Tensor rate, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight, "
        "Tensor bias, Tensor start_weight, Tensor start_bias, Tensor position, Tensor? begins, int mini_batch, "
        "float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "sequence_ttt_linear_step": (
        "(Tensor q, Tensor k, Tensor v, Tensor rate, Tensor norm_weight, Tensor norm_bias, float eps, "
        "Tensor(a!) weight, Tensor(b!) bias, Tensor(c!) start_weight, Tensor(d!) start_bias, Tensor(e!) position, "
        "int mini_batch, float scale) -> Tensor"
    ),
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"ttt::{_name}", _schema)


def gated_delta_rule(q, k, v, beta, g, state) -> Callable | None:
    """The kernel of `ttt.ops.sequence.gated_delta_rule`."""
    return torch.ops.ttt.sequence_delta_rule if _serves("gated_delta_rule", q, k, v, beta, g, state) else None


def gated_delta_rule_step(q, k, v, beta, g, state) -> Callable | None:
    """The kernel of `ttt.ops.sequence.gated_delta_rule_step`."""
    served = _serves("gated_delta_rule_step", q, k, v, beta, g, state)
    return torch.ops.ttt.sequence_delta_rule_step if served else None


def ttt_linear(q, k, v, rate, gate, momentum, norm: Any, state: MemoryState, mini_batch: int) -> Callable | None:
    """The kernel of `ttt.ops.sequence.memory`, for TTT-Linear."""
    if not _is_ttt_linear(q, gate, momentum, norm, state) or mini_batch > MOST_MINI_BATCH:
        return None
    if not _serves("ttt_linear", q, k, v, rate, *norm[:2], *tensors_of(state)):
        return None

    def run(q, k, v, rate, norm, state, begins, mini_batch, scale):
        given = (*state.weights, *state.start, state.position)
        out, *new = torch.ops.ttt.sequence_ttt_linear(q, k, v, rate, *norm, *given, begins, mini_batch, scale)
        return out, MemoryState(tuple(new[:2]), tuple(new[2:4]), (), new[4])

    return run


def ttt_linear_step(q, k, v, rate, gate, momentum, norm: Any, state: MemoryState) -> Callable | None:
    """The kernel of `ttt.ops.sequence.memory_step`, for TTT-Linear."""
    if not _is_ttt_linear(q, gate, momentum, norm, state):
        return None
    if not _serves("ttt_linear_step", q, k, v, rate, *norm[:2], *tensors_of(state)):
        return None

    def run(q, k, v, rate, norm, state, mini_batch, scale):
        given = (*state.weights, *state.start, state.position)
        return torch.ops.ttt.sequence_ttt_linear_step(q, k, v, rate, *norm, *given, mini_batch, scale)

    return run


def _is_ttt_linear(q, gate, momentum, norm, state) -> bool:
    return q.device.type == "cpu" and gate is None and momentum is None and norm is not None and len(state.weights) == 2


def _serves(op: str, q: Tensor, *others: Tensor | None) -> bool:
    """Whether a kernel serves ``q`` and the others, none of which needs a gradient; counts the call if not."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, *others)):
        return False
    if q.device.type != "cpu":
        return False
    if why := _why_not(q.dtype):
        record(op, "torch", why)
    return not why


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().float().contiguous()


def _delta_rule(q, k, v, beta, g, state, begins, scale):
    record("gated_delta_rule", "cpu")
    batch, tokens, heads, keys = q.shape
    values, rows = v.shape[-1], batch if begins is None else begins.numel() - 1
    q, k, v, beta, g = q.contiguous(), k.contiguous(), v.contiguous(), _float(beta), _float(g)
    state = (
        q.new_zeros(rows, heads, keys, values, dtype=torch.float32)
        if state is None
        else state.clone(memory_format=torch.contiguous_format)
    )
    out = torch.empty_like(v)
    _C.delta_rule(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), beta.data_ptr(), _address(g), _address(begins), state.data_ptr(),
        out.data_ptr(), rows, tokens, heads, keys, values, scale, False, _DTYPE[q.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out, state


def _delta_rule_step(q, k, v, beta, g, state, scale):
    record("gated_delta_rule_step", "cpu")
    batch, heads, keys = q.shape
    q, k, v, beta, g = q.contiguous(), k.contiguous(), v.contiguous(), _float(beta), _float(g)
    out = torch.empty_like(v)
    _C.delta_rule(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), beta.data_ptr(), _address(g), 0, state.data_ptr(),
        out.data_ptr(), batch, 1, heads, keys, v.shape[-1], scale, True, _DTYPE[q.dtype], torch.get_num_threads(),
    )  # fmt: skip
    torch.autograd.graph.increment_version([state])
    return out


def _ttt_linear(
    q, k, v, rate, norm_weight, norm_bias, eps, weight, bias, start_weight, start_bias, position, begins, mini_batch,
    scale,
):  # fmt: skip
    record("ttt_linear", "cpu")
    tokens, heads, width = q.shape[1:]
    state = own((weight.contiguous(), bias.contiguous(), start_weight.contiguous(), start_bias.contiguous()))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _call_ttt_linear(
        q, k, v, rate, norm_weight, norm_bias, eps, state, position, begins, out, tokens, heads, width, mini_batch,
        scale, False,
    )  # fmt: skip
    lengths = tokens if begins is None else begins.diff()
    return out, *state, (position + lengths) % mini_batch


def _ttt_linear_step(
    q, k, v, rate, norm_weight, norm_bias, eps, weight, bias, start_weight, start_bias, position, mini_batch, scale
):
    record("ttt_linear_step", "cpu")
    heads, width = q.shape[1:]
    state = (weight, bias, start_weight, start_bias)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _call_ttt_linear(
        q, k, v, rate, norm_weight, norm_bias, eps, state, position, None, out, 1, heads, width, mini_batch, scale, True
    )
    torch.autograd.graph.increment_version(list(state))
    position.copy_((position + 1) % mini_batch)
    return out


def _call_ttt_linear(
    q, k, v, rate, norm_weight, norm_bias, eps, state, position, begins, out, tokens, heads, width, mini_batch, scale,
    one_token,
):  # fmt: skip
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    rate, norm_weight, norm_bias = _float(rate), _float(norm_weight), _float(norm_bias)
    position = position.contiguous()
    _C.ttt_linear(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), rate.data_ptr(), norm_weight.data_ptr(), norm_bias.data_ptr(),
        _address(begins), *(t.data_ptr() for t in state), position.data_ptr(), out.data_ptr(), len(position), tokens,
        heads, width, mini_batch, scale, eps, one_token, _DTYPE[q.dtype], torch.get_num_threads(),
    )  # fmt: skip


def _fake_delta_rule(q, k, v, beta, g, state, begins, scale):
    rows = q.shape[0] if begins is None else begins.shape[0] - 1
    shape = (rows, q.shape[2], q.shape[3], v.shape[3])
    return v.new_empty(v.shape), q.new_empty(shape, dtype=torch.float32)


def _fake_delta_rule_step(q, k, v, beta, g, state, scale):
    return v.new_empty(v.shape)


def _fake_ttt_linear(q, k, v, rate, norm_weight, norm_bias, eps, weight, bias, start_weight, start_bias, position, *_):
    return q.new_empty(q.shape), *(torch.empty_like(t) for t in (weight, bias, start_weight, start_bias, position))


def _fake_ttt_linear_step(q, *_):
    return q.new_empty(q.shape)


for _op, _run, _fake in (
    ("delta_rule", _delta_rule, _fake_delta_rule),
    ("delta_rule_step", _delta_rule_step, _fake_delta_rule_step),
    ("ttt_linear", _ttt_linear, _fake_ttt_linear),
    ("ttt_linear_step", _ttt_linear_step, _fake_ttt_linear_step),
):
    torch.library.impl(f"ttt::sequence_{_op}", "CPU", _run)
    torch.library.register_fake(f"ttt::sequence_{_op}", _fake)
