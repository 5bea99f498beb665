"""Hooks of modules that `ttt.adapt_` replaces, and forward passes that it cannot keep."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn

from ttt.nn.parallel import is_sharded

_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
          "_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks")  # fmt: skip


def move_hooks(module: nn.Module, to: nn.Module) -> None:
    """Give the hooks of ``module`` on its forward and backward passes to ``to``, which takes its place.

    Their handles go on working. ``module`` has none afterwards: a quantized one is called by the layer in its place.
    """
    for hooks in _HOOKS:
        to.__dict__[hooks] = getattr(module, hooks)
        module.__dict__[hooks] = OrderedDict()
    to.__dict__["_is_full_backward_hook"] = module._is_full_backward_hook
    module.__dict__["_is_full_backward_hook"] = None


def accelerate_hooks(module: Any) -> Sequence[Any]:
    """The hooks of accelerate in the forward pass of ``module``; None stands for none."""
    hook = getattr(module, "_hf_hook", None)
    hooks: Sequence[Any] = getattr(hook, "hooks", [hook])
    return hooks


def own_forward(module: Any) -> str:
    """Why the forward pass of ``module`` is not its class's, so that a layer in its place would not have it; or "".

    That with which accelerate moves inputs to the module's device does not count: they are there.
    """
    if "forward" not in vars(module) or is_sharded(module.weight):
        return ""
    if all(type(each).__name__ == "AlignDevicesHook" for each in accelerate_hooks(module)):
        return ""
    return (
        "has a forward pass that was set on this module, and not by its class, so it cannot be adapted: a learning "
        "layer would not have it. Use register_forward_hook, or leave the module out"
    )
