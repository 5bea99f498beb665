"""The right gradient through frozen quantized layers that do not learn, whose library gives none or a wrong one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ttt.nn.autocast import without_autocast
from ttt.nn.frozen_weight import FrozenWeight


class OwnGradient:
    """A forward hook of a frozen quantized layer that gives its inputs the gradient of its `FrozenWeight`."""

    def __init__(self, module: nn.Module) -> None:
        self.weight = FrozenWeight(module)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not args or not torch.is_grad_enabled() or not args[0].requires_grad:
            return None
        return _Through.apply(args[0], output.detach(), self.weight)


class _Through(torch.autograd.Function):
    """The output of a layer, whose gradient at the layer's input is that of a `FrozenWeight`."""

    @staticmethod
    def forward(ctx, x, output, weight):
        ctx.weight = weight
        return output.view_as(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        with without_autocast(grad.device):
            return ctx.weight.transposed_product(grad), None, None


def give_own_gradient(module: nn.Module) -> None:
    """Let the gradient at the inputs of ``module`` be that of its `FrozenWeight`."""
    module.register_forward_hook(OwnGradient(module))


def is_own_gradient(hook: Any) -> bool:
    """Whether ``hook`` is one that `give_own_gradient` registers."""
    return isinstance(hook, OwnGradient)


def take_own_gradients(model: nn.Module) -> None:
    """Undo `give_own_gradient` in all of ``model``, also in a copy of it."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_hooks.items() if is_own_gradient(hook)]:
            del module._forward_hooks[key]
