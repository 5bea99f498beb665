"""The gated delta rule and TTT-Linear in training on CPUs: kernels for both passes, as ops with a derivative.

Second derivatives are computed by the torch forms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ttt.ops.sequence import cpu_training, memory_texts
from ttt.ops.sequence import delta_rule as torch_form
from ttt.ops.sequence.dual_form import Norm
from ttt.ops.sequence.states import MemoryState

CHUNK = 64
"""Tokens of a chunk of the delta rule's torch form."""

_TOKENS = "(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, "
torch.library.define(
    "ttt::sequence_delta_rule_in_training",
    _TOKENS + "Tensor? state, Tensor? begins, float scale) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "ttt::sequence_delta_rule_backward",
    _TOKENS + "Tensor? begins, Tensor kept, float scale, Tensor d_out, Tensor d_state)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_MEMORY = (
    "(Tensor q, Tensor k, Tensor v, Tensor rate, Tensor norm_weight, Tensor norm_bias, float eps, "
    "Tensor {0}weight, Tensor {0}bias, {1}Tensor? begins, int mini_batch, float scale{2}) -> ({3})"
)
torch.library.define(
    "ttt::sequence_memory_in_training",
    _MEMORY.format("", "Tensor start_weight, Tensor start_bias, ", "", ", ".join(["Tensor"] * 7)),
)
_GIVEN = "".join(f", Tensor d_{name}" for name in ("out", "weight", "bias", "start_weight", "start_bias"))
torch.library.define("ttt::sequence_memory_backward", _MEMORY.format("kept_", "", _GIVEN, ", ".join(["Tensor"] * 10)))
torch.library.impl("ttt::sequence_delta_rule_in_training", "CPU", cpu_training.delta_rule_in_training)
torch.library.impl("ttt::sequence_delta_rule_backward", "CPU", cpu_training.delta_rule_backward)
torch.library.impl("ttt::sequence_memory_in_training", "CPU", cpu_training.memory_in_training)
torch.library.impl("ttt::sequence_memory_backward", "CPU", cpu_training.memory_backward)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    state: Tensor | None,
    begins: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The outputs and the final states, which can be differentiated; arguments as of `gated_delta_rule`.

    Args:
        begins: (N + 1,) int64, where packed sequences begin, and the end of the last; None if nothing is packed.
    """
    out, final, _ = torch.ops.ttt.sequence_delta_rule_in_training(q, k, v, beta, g, state, begins, scale)
    return out, final


def memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    norm: Norm,
    state: MemoryState,
    begins: Tensor | None,
    mini_batch: int,
    scale: float,
) -> tuple[Tensor, MemoryState]:
    """The outputs and the final state of a memory of one layer, which can be differentiated.

    Args:
        q, k, v, rate, norm, mini_batch, scale: as of `ttt.ops.sequence.memory`.
        state: at the beginning of a mini-batch, without momentum.
        begins: as of `delta_rule`.
    """
    out, weight, bias, start_weight, start_bias, _, _ = torch.ops.ttt.sequence_memory_in_training(
        q, k, v, rate, *norm, *state.weights, *state.start, begins, mini_batch, scale
    )
    lengths = q.shape[1] if begins is None else begins.diff()
    position = (state.position + lengths) % mini_batch
    return out, MemoryState((weight, bias), (start_weight, start_bias), (), position)


@torch.library.register_fake("ttt::sequence_delta_rule_in_training")
def _fake_in_training(q, k, v, beta, g, state, begins, scale):
    rows = q.shape[0] if begins is None else begins.shape[0] - 1
    shape = (rows, q.shape[2], q.shape[3], v.shape[3])
    final, kept = (q.new_empty(s, dtype=torch.float32) for s in (shape, cpu_training.delta_rule_kept(q, v, begins)))
    return v.new_empty(v.shape), final, kept


@torch.library.register_fake("ttt::sequence_delta_rule_backward")
def _fake_backward(q, k, v, beta, g, begins, kept, scale, d_out, d_state):
    d_beta = beta.new_empty(beta.shape, dtype=torch.float32)
    d_g = d_beta.new_empty(0 if g is None else g.shape)
    return *(t.new_empty(t.shape) for t in (q, k, v)), d_beta, d_g, d_state.new_empty(d_state.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx, d_out, d_state, _):
    *given, begins, kept = ctx.saved_tensors
    if torch.is_grad_enabled():
        found = _again(given, lambda ts: _delta_rule_by_torch(ts, begins, ctx.scale), (d_out, d_state))
    else:
        *found, d_state = torch.ops.ttt.sequence_delta_rule_backward(
            *given[:5], begins, kept, ctx.scale, d_out, d_state
        )
        found = [None if t is None else d.to(t.dtype) for d, t in zip((*found, d_state), given, strict=True)]
    return *found, None, None


def _delta_rule_by_torch(given, begins, scale):
    bounds = None if begins is None else begins.tolist()
    arguments: Any = (*given, bounds, scale, CHUNK)
    return torch_form.texts(*arguments)


def _again(given, run, d_outs):
    """The derivatives of ``run(given)``, which can be differentiated themselves; None where none is needed."""
    wanted = [n for n, t in enumerate(given) if t is not None and t.requires_grad]
    grads = torch.autograd.grad(run(given), [given[n] for n in wanted], d_outs, create_graph=True, allow_unused=True)
    found = dict(zip(wanted, grads, strict=True))
    return [found.get(n) for n in range(len(given))]


torch.library.register_autograd("ttt::sequence_delta_rule_in_training", _differentiate, setup_context=_save)


@torch.library.register_fake("ttt::sequence_memory_in_training")
def _fake_memory(q, k, v, rate, norm_weight, norm_bias, eps, weight, bias, _, __, begins, mini_batch, scale):
    states = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (weight, bias) * 2]
    shapes = cpu_training.memory_kept(q, [weight, bias], begins, mini_batch)
    return q.new_empty(q.shape), *states, *(weight.new_empty(shape) for shape in shapes)


@torch.library.register_fake("ttt::sequence_memory_backward")
def _fake_memory_backward(q, k, v, rate, norm_weight, norm_bias, eps, _, __, begins, mini_batch, scale, d_out, *states):
    numbers = (rate, norm_weight, norm_bias, *states)
    return *(t.new_empty(t.shape) for t in (q, k, v)), *(t.new_empty(t.shape, dtype=torch.float32) for t in numbers)


def _save_memory(ctx, inputs, output):
    *tensors, ctx.eps, weight, bias, start_weight, start_bias, begins, ctx.mini_batch, ctx.scale = inputs
    ctx.save_for_backward(*tensors, weight, bias, start_weight, start_bias, begins, *output[-2:])


def _differentiate_memory(ctx, d_out, d_weight, d_bias, d_start_weight, d_start_bias, *_):
    *given, begins, kept_weight, kept_bias = ctx.saved_tensors
    d_outs = (d_out, d_weight, d_bias, d_start_weight, d_start_bias)
    if torch.is_grad_enabled():
        found = _again(given, lambda ts: _memory_by_torch(ts, begins, ctx), d_outs)
    else:
        tokens, norm = given[:4], given[4:6]
        found = torch.ops.ttt.sequence_memory_backward(
            *tokens, *norm, ctx.eps, kept_weight, kept_bias, begins, ctx.mini_batch, ctx.scale, *d_outs
        )
        found = [d.to(t.dtype) for d, t in zip(found, given, strict=True)]
    return *found[:6], None, *found[6:], None, None, None


def _memory_by_torch(given, begins, ctx):
    q, k, v, rate, norm_weight, norm_bias, *states = given
    bounds = None if begins is None else begins.tolist()
    rows = len(states[0])
    state = MemoryState(tuple(states[:2]), tuple(states[2:]), (), torch.zeros(rows, dtype=torch.int64))
    norm = Norm(norm_weight, norm_bias, ctx.eps)
    out, final = memory_texts.texts(q, k, v, rate, None, None, norm, state, bounds, ctx.mini_batch, ctx.scale, 0)
    return out, *final.weights, *final.start


torch.library.register_autograd("ttt::sequence_memory_in_training", _differentiate_memory, setup_context=_save_memory)
