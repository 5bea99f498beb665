"""The gated delta rule and memories in training on CPUs: kernels for both passes, as ops with a derivative.

Second derivatives are computed by the torch forms, and so are those that a transform must see into, such as vmap, which
computes several gradients at once.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ttt.ops.modes import gradients_batched, transforms_active
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
    "(Tensor q, Tensor k, Tensor v, Tensor rate, Tensor? gate, Tensor? momentum, Tensor? norm_weight, "
    "Tensor? norm_bias, float eps, {0}Tensor? begins, int mini_batch, float scale{1}) -> ({2})"
)
torch.library.define(
    "ttt::sequence_memory_in_training",
    _MEMORY.format(
        "Tensor[] weights, Tensor[] start, Tensor[] velocity, ", "", ", ".join(["Tensor", *["Tensor[]"] * 5])
    ),
)
torch.library.define(
    "ttt::sequence_memory_backward",
    _MEMORY.format(
        "Tensor[] kept_weights, Tensor[] kept_velocity, ",
        ", Tensor d_out, Tensor[] d_weights, Tensor[] d_start, Tensor[] d_velocity",
        ", ".join([*["Tensor"] * 8, *["Tensor[]"] * 3]),
    ),
)
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
    gate: Tensor | None,
    momentum: Tensor | None,
    norm: Norm | tuple[None, None, float],
    state: MemoryState,
    begins: Tensor | None,
    mini_batch: int,
    scale: float,
) -> tuple[Tensor, MemoryState]:
    """The outputs and the final state of a memory, which can be differentiated.

    Args:
        q, k, v, rate, gate, momentum, mini_batch, scale: as of `ttt.ops.sequence.memory`.
        norm: weight, bias and eps of the inner norm, the first two None without one.
        state: at the beginning of a mini-batch.
        begins: as of `delta_rule`.
    """
    held = ([*state.weights], [*state.start], [*state.velocity])
    out, *parts, _, _ = torch.ops.ttt.sequence_memory_in_training(
        q, k, v, rate, gate, momentum, *norm, *held, begins, mini_batch, scale
    )
    lengths = q.shape[1] if begins is None else begins.diff()
    weights, start, velocity = (tuple(part) for part in parts)
    return out, MemoryState(weights, start, velocity, (state.position + lengths) % mini_batch)


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
    if _by_torch():
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


def _by_torch() -> bool:
    """Whether the torch form gives the derivatives: they are differentiated again, or a transform must see into it."""
    return torch.is_grad_enabled() or transforms_active() or gradients_batched()


def _again(given, run, d_outs):
    """The derivatives of ``run(given)``, which can be differentiated themselves; None where none is needed.

    Args:
        d_outs: the derivatives by the outputs; those of outputs that no tensor with a gradient reaches are not used.
    """
    again = torch.is_grad_enabled()
    wanted = [n for n, t in enumerate(given) if t is not None and t.requires_grad]
    with torch.enable_grad():
        # Views: where an input was computed from another one, the derivative by the latter would have both shares.
        given = [t.view_as(t) if n in wanted else t for n, t in enumerate(given)]
        outs = [(out, d) for out, d in zip(run(given), d_outs, strict=True) if out.requires_grad]
    grads = torch.autograd.grad(
        *([out for out, _ in outs], [given[n] for n in wanted], [d for _, d in outs]),
        create_graph=again, allow_unused=True,
    )  # fmt: skip
    found = dict(zip(wanted, grads, strict=True))
    return [found.get(n) for n in range(len(given))]


torch.library.register_autograd("ttt::sequence_delta_rule_in_training", _differentiate, setup_context=_save)


@torch.library.register_fake("ttt::sequence_memory_in_training")
def _fake_memory(q, k, v, rate, gate, momentum, norm_weight, norm_bias, eps, weights, start, velocity, begins, size, _):
    states = [[_like(t) for t in part] for part in (weights, start, velocity)]
    kept = [
        [t.new_empty(shape) for t, shape in zip(part, cpu_training.memory_kept(q, part, begins, size), strict=True)]
        for part in (weights, velocity)
    ]
    return q.new_empty(q.shape), *states, *kept


@torch.library.register_fake("ttt::sequence_memory_backward")
def _fake_memory_backward(
    q, k, v, rate, gate, momentum, norm_weight, norm_bias, eps, kept_weights, kept_velocity, begins, size, scale, d_out,
    *d_states,
):  # fmt: skip
    numbers = (rate, gate, momentum, norm_weight, norm_bias)
    found = [q.new_empty(0 if t is None else t.shape, dtype=torch.float32) for t in numbers]
    return *(t.new_empty(t.shape) for t in (q, k, v)), *found, *([_like(t) for t in part] for part in d_states)


def _like(t):
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _save_memory(ctx, inputs, output):
    *tensors, ctx.eps, weights, start, velocity, begins, ctx.mini_batch, ctx.scale = inputs
    ctx.layers, ctx.moving = len(weights), bool(velocity)
    ctx.mark_non_differentiable(*output[4], *output[5])  # no zeros are made for what nobody sees
    ctx.save_for_backward(*tensors, begins, *weights, *start, *velocity, *output[4], *output[5])


def _differentiate_memory(ctx, d_out, d_weights, d_start, d_velocity, *_):
    saved = ctx.saved_tensors  # which torch's checkpoints allow once
    tensors, begins, rest = saved[:8], saved[8], saved[9:]
    sizes = [ctx.layers] * 2 + [ctx.layers * ctx.moving]
    *states, kept_weights, kept_velocity = _in_parts(rest, [*sizes, ctx.layers, sizes[2]])
    given = [*tensors, *itertools.chain(*states)]
    if _by_torch():
        d_outs = (d_out, *d_weights, *d_start, *d_velocity)
        found = _again(given, lambda ts: _memory_by_torch(ts, sizes, begins, ctx), d_outs)
    else:
        *found, d_weights, d_start, d_velocity = torch.ops.ttt.sequence_memory_backward(
            *tensors, ctx.eps, kept_weights, kept_velocity, begins, ctx.mini_batch, ctx.scale,
            d_out, d_weights, d_start, d_velocity,
        )  # fmt: skip
        found += [*d_weights, *d_start, *d_velocity]
        found = [None if t is None else d.to(t.dtype) for d, t in zip(found, given, strict=True)]
    return *found[:8], None, *_in_parts(found[8:], sizes), None, None, None


def _in_parts(tensors, sizes):
    """Lists of so many of ``tensors``, one after the other."""
    remaining = iter(tensors)
    return [list(itertools.islice(remaining, size)) for size in sizes]


def _memory_by_torch(given, sizes, begins, ctx):
    q, k, v, rate, gate, momentum, norm_weight, norm_bias, *states = given
    bounds = None if begins is None else begins.tolist()
    weights, start, velocity = (tuple(part) for part in _in_parts(states, sizes))
    state = MemoryState(weights, start, velocity, torch.zeros(len(weights[0]), dtype=torch.int64))
    norm = None if norm_weight is None else Norm(norm_weight, norm_bias, ctx.eps)
    out, final = memory_texts.texts(q, k, v, rate, gate, momentum, norm, state, bounds, ctx.mini_batch, ctx.scale, 0)
    return out, *final.weights, *final.start, *final.velocity


torch.library.register_autograd("ttt::sequence_memory_in_training", _differentiate_memory, setup_context=_save_memory)
