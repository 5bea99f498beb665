"""The Triton kernels of the sequence ops. Nothing here imports triton before the first call with CUDA tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ttt.ops.backends import record, unavailable
from ttt.ops.cuda import _DTYPES, _kernels
from ttt.ops.sequence.cpu import as_float

MOST_KEYS_OF_A_STEP = 256


def why_not(q: Tensor, v: Tensor) -> str:
    """Empty if the kernels take ``q`` and ``v``, of a text (B, T, H, D) or a token (B, H, D), else why not."""
    kernels = _kernels()
    if kernels is None:
        return unavailable["triton"]
    if q.dtype not in _DTYPES:
        return f"no Triton kernel for {q.dtype}"
    keys, values = q.shape[-1], v.shape[-1]
    if q.dim() == 4 and (keys % 16 or values % 16):  # their addresses would take registers that are not there
        return f"no Triton kernel for widths that are no multiples of 16, got {keys} and {values}"
    most = kernels.most_keys if q.dim() == 4 else MOST_KEYS_OF_A_STEP
    return f"no Triton kernel for keys wider than {most}, got {keys}" if keys > most else ""


def delta_rule(q, k, v, beta, g, state, begins, scale):
    record("gated_delta_rule", "triton")
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    state = None if state is None else state.contiguous()
    begins = None if begins is None else begins.to(q.device, torch.int64)
    with torch.cuda.device(q.device):  # Triton launches on the current device, whatever the tensors' is
        return _kernels().delta_rule(  # type: ignore[union-attr]
            q, k, v, as_float(beta), as_float(g), state, begins, scale
        )


def delta_rule_step(q, k, v, beta, g, state, scale):
    record("gated_delta_rule_step", "triton")
    with torch.cuda.device(q.device):
        out = _kernels().delta_rule_step(  # type: ignore[union-attr]
            q.contiguous(), k.contiguous(), v.contiguous(), as_float(beta), as_float(g), state, scale
        )
    torch.autograd.graph.increment_version([state])
    return out
