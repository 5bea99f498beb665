"""The C++ kernels of the sequence ops: copies of what they change, and the call by addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from ttt.ops.backends import record
from ttt.ops.cpu import _C, DTYPE_CODES, address
from ttt.ops.sequence.checks import check_positions
from ttt.ops.sequence.states import own


def as_float(t: Tensor | None) -> Tensor | None:
    """``t`` as a contiguous float32 tensor without gradient, or None."""
    return None if t is None else t.detach().float().contiguous()


def delta_rule(q, k, v, beta, g, state, begins, scale, kept=None):
    """``kept``: in training, the states of `ttt.ops.sequence.cpu_training.delta_rule_kept`, which are written."""
    record("gated_delta_rule", "cpu")
    batch, tokens, heads, keys = q.shape
    values, rows = v.shape[-1], batch if begins is None else begins.numel() - 1
    q, k, v, beta, g = q.contiguous(), k.contiguous(), v.contiguous(), as_float(beta), as_float(g)
    state = (
        q.new_zeros(rows, heads, keys, values, dtype=torch.float32)
        if state is None
        else state.clone(memory_format=torch.contiguous_format)
    )
    out = torch.empty_like(v)
    given = delta_rule_addresses(q, k, v, beta, g, begins, kept, (rows, tokens, heads, keys, values), scale)
    _C.delta_rule(*given, state.data_ptr(), out.data_ptr(), False)
    return out, state


def delta_rule_step(q, k, v, beta, g, state, scale):
    record("gated_delta_rule_step", "cpu")
    q, k, v, beta, g = q.contiguous(), k.contiguous(), v.contiguous(), as_float(beta), as_float(g)
    out, (batch, heads, keys) = torch.empty_like(v), q.shape
    given = delta_rule_addresses(q, k, v, beta, g, None, None, (batch, 1, heads, keys, v.shape[-1]), scale)
    _C.delta_rule(*given, state.data_ptr(), out.data_ptr(), True)
    torch.autograd.graph.increment_version([state])
    return out


def delta_rule_addresses(q, k, v, beta, g, begins, kept, sizes, scale):
    """What `_C.delta_rule` and its backward pass take first; the tensors are contiguous, and are held by the caller."""
    tensors = (q, k, v, beta, g, begins, kept)
    return *map(address, tensors), *sizes, scale, DTYPE_CODES[q.dtype], torch.get_num_threads()


def memory(
    q, k, v, rate, gate, momentum, norm_weight, norm_bias, eps, weights, start, velocity, position, begins, mini_batch,
    scale, kept=((), ()),
):  # fmt: skip
    """``kept``: in training, what `ttt.ops.sequence.cpu_training.memory_kept` has shapes of; it is written."""
    check_positions("mini_batch", position, mini_batch)
    record(memory_op(weights, gate, momentum, norm_weight), "cpu")
    state = own([[t.contiguous() for t in tensors] for tensors in (weights, start, velocity)])
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    factors, norm = (rate, gate, momentum), (norm_weight, norm_bias, eps)
    held, given = memory_arguments(q, k, v, factors, norm, state, kept, position, begins, q.shape[1], mini_batch, scale)
    _C.memory(*given, out.data_ptr(), False)
    del held
    lengths = q.shape[1] if begins is None else begins.diff()
    return out, *state, (position + lengths) % mini_batch


def memory_step(
    q, k, v, rate, gate, momentum, norm_weight, norm_bias, eps, weights, start, velocity, position, mini_batch, scale
):
    record(f"{memory_op(weights, gate, momentum, norm_weight)}_step", "cpu")
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    factors, norm, state = (rate, gate, momentum), (norm_weight, norm_bias, eps), (weights, start, velocity)
    held, given = memory_arguments(q, k, v, factors, norm, state, ((), ()), position, None, 1, mini_batch, scale)
    _C.memory(*given, out.data_ptr(), True)
    del held
    torch.autograd.graph.increment_version([*weights, *start, *velocity])
    position.add_(1)
    position.masked_fill_(position >= mini_batch, 0)
    return out


def swiglu_token(q, k, v, rates, weights, sums):
    record("lact_step", "cpu")
    given = [t.contiguous() for t in (q, k, v, rates)]
    out, (batch, heads, width) = torch.empty_like(given[0]), q.shape
    _C.swiglu_token(
        *(t.data_ptr() for t in given), [w.data_ptr() for w in weights], [s.data_ptr() for s in sums], out.data_ptr(),
        batch * heads, width, weights[0].shape[-1], torch.get_num_threads(),
    )  # fmt: skip
    torch.autograd.graph.increment_version(list(sums))
    return out


def memory_op(weights, gate, momentum, norm_weight) -> str:
    """The name under which calls of `memory` with these arguments are counted."""
    if gate is None and momentum is None and norm_weight is not None:
        return {2: "ttt_linear", 4: "ttt_mlp"}.get(len(weights), "memory")
    return "memory" if gate is None or momentum is None or norm_weight is not None else "titans"


def memory_arguments(q, k, v, factors, norm, state, kept, position, begins, tokens, mini_batch, scale):
    """What must be held until the call returns, and what `_C.memory` and its backward pass take first.

    Args:
        factors: rate, gate, momentum. norm: weight, bias, eps; numbers may have any dtype.
        state: weights, those before the mini-batch, and the momentum, contiguous; each may be () for none.
        kept: weights and momenta that are kept in training; each may be ().
    """
    heads, width = q.shape[-2:]
    shapes = kept[0] or state[0]
    # The addresses are those of copies, where there had to be one.
    held = [q.contiguous(), k.contiguous(), v.contiguous(), *(as_float(t) for t in (*factors, *norm[:2])), begins]
    position = position.contiguous()
    given = (
        *map(address, held), layer_addresses(*state, *kept), [width, *(t.shape[-1] for t in shapes[1::2])],
        position.data_ptr(), len(position), tokens, heads, mini_batch, scale, norm[2], DTYPE_CODES[q.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return (held, position), given


def layer_addresses(*parts):
    """Of each layer, the addresses of five weights and biases; ``parts`` (W_1, b_1, W_2, ...) or (), at most five."""
    tensors = max(len(part) for part in parts)
    rows = [part or [None] * tensors for part in (*parts, *[()] * (5 - len(parts)))]
    return [[address(t) for part in rows for t in part[i : i + 2]] for i in range(0, tensors, 2)]
