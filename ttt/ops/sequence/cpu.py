"""The C++ kernels of the sequence ops: copies of what they change, and the call by addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from ttt.ops.backends import record
from ttt.ops.cpu import _C, DTYPE_CODES, address
from ttt.ops.sequence import cpu_steps
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
    _C.delta_rule(*given, state.data_ptr(), out.data_ptr())
    return out, state


def delta_rule_step(q, k, v, beta, g, state, scale):
    q, k, v, state = _readable(q, k, v, state)
    out = torch.empty_like(v)
    _read(_C.delta_rule_step(q, k, v, _number(beta), _number(g), state, out, scale, torch.get_num_threads()))
    cpu_steps.counted("gated_delta_rule_step", [state])
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
    record(cpu_steps.memory_op(weights, gate, momentum, norm_weight), "cpu")
    state = own([[t.contiguous() for t in tensors] for tensors in (weights, start, velocity)])
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    factors, norm = (rate, gate, momentum), (norm_weight, norm_bias, eps)
    held, given = memory_arguments(q, k, v, factors, norm, state, kept, position, begins, q.shape[1], mini_batch, scale)
    _C.memory(*given, out.data_ptr())
    del held
    lengths = q.shape[1] if begins is None else begins.diff()
    return out, *state, (position + lengths) % mini_batch


def memory_step(
    q, k, v, rate, gate, momentum, norm_weight, norm_bias, eps, weights, start, velocity, position, mini_batch, scale
):
    q, k, v, now = _readable(q, k, v, position)
    weights, start, velocity = (_readable(*part) for part in (weights, start, velocity))
    numbers = [_number(t) for t in (rate, gate, momentum, norm_weight, norm_bias)]
    out = torch.empty_like(q)
    held = (weights, start, velocity, now)
    _read(_C.memory_step(q, k, v, *numbers, eps, *held, out, mini_batch, scale, torch.get_num_threads()))
    if now is not position:
        position.copy_(now)
    op = cpu_steps.memory_op(weights, gate, momentum, norm_weight)
    cpu_steps.counted(f"{op}_step", [*weights, *start, *velocity, position])
    return out


def large_chunk(
    q, k, v, rates, momentum, weights, sums, velocity, norms, total_momentum, position, begins, size, orthogonal, scale
):
    record("lact" if len(weights) == 3 else "in_place_ttt", "cpu")
    q, k, v, rates, momentum = q.contiguous(), k.contiguous(), v.contiguous(), as_float(rates), as_float(momentum)
    parts = [[t.contiguous() for t in part] for part in (weights, sums, velocity, total_momentum)]
    weights, sums, velocity, total = own(parts)
    norms, now, out = [t.contiguous() for t in norms], position.contiguous(), torch.empty_like(v)
    nothing = [None] * len(weights)
    columns = zip(weights, sums, velocity or nothing, norms or nothing, strict=True)
    addresses = [[address(t) for t in of_weight] for of_weight in columns]
    tokens, heads, inputs = q.shape[1:]
    _C.large_chunk(
        *(address(t) for t in (q, k, v, rates, momentum, begins)), addresses, address(total[0] if total else None),
        now.data_ptr(), len(now), tokens, heads, inputs, v.shape[-1], weights[0].shape[-1], size, orthogonal, scale,
        DTYPE_CODES[q.dtype], torch.get_num_threads(), out.data_ptr(),
    )  # fmt: skip
    lengths = tokens if begins is None else begins.diff()
    return out, weights, sums, velocity, total, (now + lengths) % size


def large_chunk_step(q, k, v, rates, momentum, weights, sums, total_momentum, position, scale):
    q, k, v, position = _readable(q, k, v, position)
    weights, sums = _readable(*weights), _readable(*sums)
    total = None if total_momentum is None else _readable(total_momentum)[0]
    rates = rates if len(weights) == 3 else rates.squeeze(-1)
    out, size = torch.empty_like(v), 1  # whether chunks are full is found out by the caller
    _read(
        _C.large_chunk_step(
            q, k, v, _number(rates), _number(momentum), weights, sums, None, None,
            total, position, out, size, scale, torch.get_num_threads(),
        )
    )  # fmt: skip
    if total is not None and total is not total_momentum:
        total_momentum.copy_(total)
    cpu_steps.large_chunk_counted(sums, total_momentum, position)
    return out


def _readable(*tensors: Tensor) -> list[Tensor]:
    """``tensors`` as the kernels of steps read them: contiguous, and of no subclass; copies where they are not."""
    return [(t if type(t) is Tensor else t.as_subclass(Tensor)).contiguous() for t in tensors]


def _number(t: Tensor | None) -> Tensor | None:
    """The same in float32, or None."""
    return None if t is None else _readable(t.detach().float())[0]


def _read(done: int) -> None:
    if not done:
        raise RuntimeError("the kernel of a step could not read tensors that had been checked")


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
