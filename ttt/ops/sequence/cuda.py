"""The Triton kernels of the sequence ops. Nothing here imports triton before the first call with CUDA tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ttt.ops.backends import record, unavailable
from ttt.ops.cuda import DTYPES, loaded_kernels
from ttt.ops.sequence.checks import check_positions
from ttt.ops.sequence.cpu import as_float
from ttt.ops.sequence.cpu_steps import memory_op
from ttt.ops.sequence.states import own

MOST_KEYS_OF_A_STEP = 256


def _why_none(q: Tensor) -> str:
    """Why no kernel of this file takes ``q``, of a text (B, T, H, D) or a token (B, H, D); empty if some may."""
    if loaded_kernels() is None:
        return unavailable["triton"]
    if q.dim() == 4 and torch.version.hip is not None:
        return "no Triton kernel for texts on AMD GPUs, which have no products of three passes of tf32"
    return "" if q.dtype in DTYPES else f"no Triton kernel for {q.dtype}"


def why_not(q: Tensor, v: Tensor) -> str:
    """Empty if the kernels of the delta rule take ``q`` and ``v``, of a text or a token, else why not."""
    if why := _why_none(q):
        return why
    kernels: Any = loaded_kernels()
    keys, values = q.shape[-1], v.shape[-1]
    if q.dim() == 4 and (keys % 16 or values % 16):  # their addresses would take registers that are not there
        return f"no Triton kernel for widths that are no multiples of 16, got {keys} and {values}"
    most = kernels.most_keys if q.dim() == 4 else MOST_KEYS_OF_A_STEP
    return f"no Triton kernel for keys wider than {most}, got {keys}" if keys > most else ""


def why_not_memory(q: Tensor, weights: Sequence[Tensor]) -> str:
    """Empty if the kernels of memories take ``q``, of a text or a token, and memories of ``weights``, else why not."""
    if why := _why_none(q):
        return why
    kernels: Any = loaded_kernels()
    return (kernels.why_not_memory if q.dim() == 4 else kernels.why_not_memory_step)(weights)


def delta_rule(q, k, v, beta, g, state, begins, scale):
    record("gated_delta_rule", "triton")
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    state = None if state is None else state.contiguous()
    begins = None if begins is None else begins.to(q.device, torch.int64)
    with torch.cuda.device(q.device):  # Triton launches on the current device, whatever the tensors' is
        return loaded_kernels().delta_rule(  # type: ignore[union-attr]
            q, k, v, as_float(beta), as_float(g), state, begins, scale
        )


def delta_rule_step(q, k, v, beta, g, state, scale):
    record("gated_delta_rule_step", "triton")
    with torch.cuda.device(q.device):
        out = loaded_kernels().delta_rule_step(  # type: ignore[union-attr]
            q.contiguous(), k.contiguous(), v.contiguous(), as_float(beta), as_float(g), state, scale
        )
    torch.autograd.graph.increment_version([state])
    return out


def memory(
    q, k, v, rate, gate, momentum, norm_weight, norm_bias, eps, weights, start, velocity, position, begins, mini_batch,
    scale,
):  # fmt: skip
    check_positions("mini_batch", position, mini_batch)
    record(memory_op(weights, gate, momentum, norm_weight), "triton")
    state = own([[t.contiguous() for t in tensors] for tensors in (weights, start, velocity)])
    lengths = q.shape[1] if begins is None else begins.diff().to(q.device)
    begins = None if begins is None else begins.to(q.device, torch.int64)
    numbers = [as_float(t) for t in (rate, gate, momentum, norm_weight, norm_bias)]
    with torch.cuda.device(q.device):  # Triton launches on the current device, whatever the tensors' is
        out = loaded_kernels().memory(  # type: ignore[union-attr]
            q.contiguous(), k.contiguous(), v.contiguous(), *numbers, eps, *state, position.contiguous(), begins,
            mini_batch, scale,
        )  # fmt: skip
    return out, *state, (position + lengths) % mini_batch


def memory_step(
    q, k, v, rate, gate, momentum, norm_weight, norm_bias, eps, weights, start, velocity, position, mini_batch, scale
):
    record(f"{memory_op(weights, gate, momentum, norm_weight)}_step", "triton")
    numbers = [as_float(t) for t in (rate, gate, momentum, norm_weight, norm_bias)]
    with torch.cuda.device(q.device):
        out = loaded_kernels().memory_step(  # type: ignore[union-attr]
            q.contiguous(), k.contiguous(), v.contiguous(), *numbers, eps, weights, start, velocity, position,
            mini_batch, scale,
        )  # fmt: skip
    torch.autograd.graph.increment_version([*weights, *start, *velocity])
    position.add_(1)
    position.masked_fill_(position >= mini_batch, 0)
    return out
