"""The calls of the C++ kernels that train sequence layers: what the forward pass keeps, and the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ttt.ops.backends import record
from ttt.ops.cpu import _C, address
from ttt.ops.sequence.cpu import as_float, delta_rule, delta_rule_addresses, layer_addresses, memory, memory_arguments
from ttt.ops.sequence.cpu_steps import memory_op


def delta_rule_in_training(q, k, v, beta, g, state, begins, scale):
    kept = q.new_empty(delta_rule_kept(q, v, begins), dtype=torch.float32)
    return *delta_rule(q, k, v, beta, g, state, begins, scale, kept), kept


def delta_rule_backward(q, k, v, beta, g, begins, kept, scale, d_out, d_state):
    record("gated_delta_rule_backward", "cpu")
    q, k, v, beta, g = q.contiguous(), k.contiguous(), v.contiguous(), as_float(beta), as_float(g)
    d_out, d_state = d_out.contiguous(), d_state.clone(memory_format=torch.contiguous_format)
    found = [torch.empty_like(t) for t in (q, k, v, beta, q.new_empty(0, dtype=torch.float32) if g is None else g)]
    sizes = (len(d_state), *q.shape[1:], v.shape[-1])
    given = delta_rule_addresses(q, k, v, beta, g, begins, kept, sizes, scale)
    gradients = (d_out, d_state, *found[:4], None if g is None else found[4])
    _C.delta_rule_backward(*given, [address(t) for t in gradients])
    return *found, d_state


def memory_in_training(
    q, k, v, rate, gate, momentum, norm_weight, norm_bias, eps, weights, start, velocity, begins, mini_batch, scale
):
    kept = [
        [w.new_empty(shape) for w, shape in zip(part, memory_kept(q, part, begins, mini_batch), strict=True)]
        for part in (weights, velocity)
    ]
    position = torch.zeros(len(weights[0]), dtype=torch.int64)
    out, *state, _ = memory(
        q, k, v, rate, gate, momentum, norm_weight, norm_bias, eps, weights, start, velocity, position, begins,
        mini_batch, scale, kept,
    )  # fmt: skip
    return out, *state, *kept


def memory_backward(
    q, k, v, rate, gate, momentum, norm_weight, norm_bias, eps, kept_weights, kept_velocity, begins, mini_batch, scale,
    d_out, d_weights, d_start, d_velocity,
):  # fmt: skip
    record(f"{memory_op(kept_weights, gate, momentum, norm_weight)}_backward", "cpu")
    given_states = (d_weights, d_start, d_velocity)
    states = [[t.clone(memory_format=torch.contiguous_format) for t in part] for part in given_states]
    rows, d_tokens = len(d_weights[0]), [q.new_empty(t.shape) for t in (q, k, v)]
    d_factors = [None if t is None else t.new_empty(t.shape, dtype=torch.float32) for t in (rate, gate, momentum)]
    norms = (norm_weight, norm_bias)
    d_norms = [None if t is None else t.new_empty((rows, *t.shape), dtype=torch.float32) for t in norms]
    held, given = memory_arguments(
        q, k, v, (rate, gate, momentum), (*norms, eps), ((), (), ()), (kept_weights, kept_velocity),
        torch.zeros(rows, dtype=torch.int64), begins, q.shape[1], mini_batch, scale,
    )  # fmt: skip
    d_out = d_out.contiguous()
    written = [address(t) for t in (d_out, *d_tokens, *d_factors, *d_norms)]
    _C.memory_backward(*given, written, layer_addresses(*states))
    del held
    # Of what is not given, the gradient is empty.
    found = [q.new_empty(0, dtype=torch.float32) if t is None else t for t in (*d_factors, *d_norms)]
    return *d_tokens, *found[:3], *(t.sum(0) for t in found[3:]), *states


def delta_rule_kept(q: Tensor, v: Tensor, begins: Tensor | None) -> tuple[int, ...]:
    """The shape of the states that are kept: one for each `_C.DELTA_KEPT_TOKENS` of a sequence, and some to spare."""
    return _kept_rows(q, begins, _C.DELTA_KEPT_TOKENS), q.shape[2], q.shape[3], v.shape[3]


def memory_kept(q: Tensor, weights: list[Tensor], begins: Tensor | None, mini_batch: int) -> list[tuple[int, ...]]:
    """The same of weights or momenta (B, H, ...), of which some mini-batches have one."""
    rows = _kept_rows(q, begins, _C.MEMORY_KEPT_MINI_BATCHES * mini_batch)
    return [(rows, *w.shape[1:]) for w in weights]


def _kept_rows(q, begins, each):
    batch, tokens = q.shape[:2]
    return batch * tokens // each + (batch if begins is None else begins.shape[0] - 1)
