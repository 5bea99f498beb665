"""Whether kernels may be called directly, without torch's dispatcher."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
"""The number of dispatch modes (FlopCounterMode, FakeTensorMode, ...) that are active in this thread."""


_transforms_of_func = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


_jit_state = getattr(torch._C, "_get_tracing_state", lambda: None)


def transforms_active() -> bool:
    """Whether a transform of torch.func (vmap, jvp, grad, functionalize, ...) or forward-mode autograd is active.

    Transforms cannot see into a kernel: it would lose their tangents, or find no numbers in the tensors that they wrap.
    """
    return _transforms_of_func() or has_tangents()


def has_tangents() -> bool:
    """Whether forward-mode autograd is active, as in `torch.func.jvp` and `torch.autograd.forward_ad.dual_level`."""
    return getattr(forward_ad, "_current_level", -1) >= 0


def is_scripted() -> bool:
    """Whether `torch.jit.trace` records what this thread computes: what does not go through ops is not recorded."""
    return _jit_state() is not None


def gradients_batched() -> bool:
    """Whether several gradients are computed at once, as by ``is_grads_batched`` of `torch.autograd.grad`.

    That is another vmap than the one of torch.func, and can be told by the depth of its nesting only.
    """
    enter, leave = (getattr(torch._C, f"_vmapmode_{change}_nesting", None) for change in ("increment", "decrement"))
    if enter is None or leave is None:
        return False
    depth = enter()
    leave()
    return depth > 1


def must_call_ops() -> bool:
    """Whether this thread must call ops rather than kernels: modes, transforms and tracers must see every op."""
    return torch.compiler.is_dynamo_compiling() or dispatch_modes() > 0 or transforms_active() or is_scripted()
