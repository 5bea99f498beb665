"""The calls of the C++ kernels that train sequence layers: what the forward pass keeps, and the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ttt.ops.backends import record
from ttt.ops.cpu import _C, address
from ttt.ops.sequence.cpu import as_float, delta_rule, delta_rule_addresses, memory, memory_arguments


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
    q, k, v, rate, norm_weight, norm_bias, eps, weight, bias, start_weight, start_bias, begins, mini_batch, scale
):
    weights, begun = [weight, bias], [start_weight, start_bias]
    kept = [w.new_empty(shape) for w, shape in zip(weights, memory_kept(q, weights, begins, mini_batch), strict=True)]
    position = torch.zeros(len(weight), dtype=torch.int64)
    out, weights, begun, _, _ = memory(
        q, k, v, rate, None, None, norm_weight, norm_bias, eps, weights, begun, [], position, begins, mini_batch, scale,
        kept,
    )  # fmt: skip
    return out, *weights, *begun, *kept


def memory_backward(
    q, k, v, rate, norm_weight, norm_bias, eps, kept_weight, kept_bias, begins, mini_batch, scale, d_out, d_weight,
    d_bias, d_start_weight, d_start_bias,
):  # fmt: skip
    record("ttt_linear_backward", "cpu")
    given_states = (d_weight, d_bias, d_start_weight, d_start_bias)
    states = [t.clone(memory_format=torch.contiguous_format) for t in given_states]
    d_tokens = [q.new_empty(t.shape) for t in (q, k, v)]
    d_rate = q.new_empty(rate.shape, dtype=torch.float32)
    d_norms = [q.new_empty((len(d_weight), *norm_weight.shape), dtype=torch.float32) for _ in range(2)]
    position = torch.zeros(len(d_weight), dtype=torch.int64)
    held, given = memory_arguments(
        q, k, v, (rate, None, None), (norm_weight, norm_bias, eps), ((), (), ()), [kept_weight, kept_bias], position,
        begins, q.shape[1], mini_batch, scale,
    )  # fmt: skip
    d_out = d_out.contiguous()
    _C.memory_backward(*given, [t.data_ptr() for t in (d_out, *states, *d_tokens, d_rate, *d_norms)])
    del held
    return *d_tokens, d_rate, *(t.sum(0) for t in d_norms), *states


def delta_rule_kept(q: Tensor, v: Tensor, begins: Tensor | None) -> tuple[int, ...]:
    """The shape of the states that are kept: one for each `_C.DELTA_KEPT_TOKENS` of a sequence, and some to spare."""
    return _kept_rows(q, begins, _C.DELTA_KEPT_TOKENS), q.shape[2], q.shape[3], v.shape[3]


def memory_kept(q: Tensor, weights: list[Tensor], begins: Tensor | None, mini_batch: int) -> list[tuple[int, ...]]:
    """The same of weights (B, H, ...), of which some mini-batches have one."""
    rows = _kept_rows(q, begins, _C.MEMORY_KEPT_MINI_BATCHES * mini_batch)
    return [(rows, *w.shape[1:]) for w in weights]


def _kept_rows(q, begins, each):
    batch, tokens = q.shape[:2]
    return batch * tokens // each + (batch if begins is None else begins.shape[0] - 1)
