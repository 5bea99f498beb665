"""The C++ kernels of the sequence ops: copies of what they change, and the call by addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from ttt.ops.backends import record
from ttt.ops.cpu import _C, _DTYPE, _address
from ttt.ops.sequence.states import own


def as_float(t: Tensor | None) -> Tensor | None:
    """``t`` as a contiguous float32 tensor without gradient, or None."""
    return None if t is None else t.detach().float().contiguous()


def delta_rule(q, k, v, beta, g, state, begins, scale):
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
    _C.delta_rule(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), beta.data_ptr(), _address(g), _address(begins), state.data_ptr(),
        out.data_ptr(), rows, tokens, heads, keys, values, scale, False, _DTYPE[q.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out, state


def delta_rule_step(q, k, v, beta, g, state, scale):
    record("gated_delta_rule_step", "cpu")
    batch, heads, keys = q.shape
    q, k, v, beta, g = q.contiguous(), k.contiguous(), v.contiguous(), as_float(beta), as_float(g)
    out = torch.empty_like(v)
    _C.delta_rule(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), beta.data_ptr(), _address(g), 0, state.data_ptr(),
        out.data_ptr(), batch, 1, heads, keys, v.shape[-1], scale, True, _DTYPE[q.dtype], torch.get_num_threads(),
    )  # fmt: skip
    torch.autograd.graph.increment_version([state])
    return out


def ttt_linear(
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


def ttt_linear_step(
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
    rate, norm_weight, norm_bias = as_float(rate), as_float(norm_weight), as_float(norm_bias)
    position = position.contiguous()
    _C.ttt_linear(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), rate.data_ptr(), norm_weight.data_ptr(), norm_bias.data_ptr(),
        _address(begins), *(t.data_ptr() for t in state), position.data_ptr(), out.data_ptr(), len(position), tokens,
        heads, width, mini_batch, scale, eps, one_token, _DTYPE[q.dtype], torch.get_num_threads(),
    )  # fmt: skip
