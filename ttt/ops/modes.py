"""Whether kernels may be called directly, without torch's dispatcher."""

from __future__ import annotations

import torch

dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
"""The number of dispatch modes (FlopCounterMode, FakeTensorMode, ...) that are active in this thread."""


def must_call_ops() -> bool:
    """Whether this thread must call ops rather than kernels: dispatch modes must see every op."""
    return torch.compiler.is_dynamo_compiling() or dispatch_modes() > 0
