"""The error of a training loop on an adapted model in which nothing can be trained, with the ways out.

`adapt_` freezes a model, so that its loss has no gradient outside of `ttt.learning`. Torch then says that a tensor does
not require grad, and not why, nor what to do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ttt.nn.base import is_traced
from ttt.nn.own_gradient import is_own_gradient


class _Frozen(torch.autograd.Function):
    """The loss itself; its backward pass is an error."""

    @staticmethod
    def forward(ctx, loss, root):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(
            "there is nothing to train: the loss of this model, which ttt.adapt_ froze, depends on no parameter that "
            "requires grad. Its layers learn from backward passes inside of `with ttt.learning(model):` (users: from "
            "ttt.Learner(model).observe(ids, users=[...])), not by an optimizer. To train parameters beside them, let "
            "those require grad; to train the adapted weights, call ttt.restore_(model, keep_learned=True) first"
        )


def refuse_when_frozen(model: nn.Module) -> None:
    """Let backward passes from the loss that ``model`` returns in training mode raise while it has no gradient.

    A loss is the entry ``loss`` of a model output, and what a call with ``labels`` returns, or returns first. It then
    requires grad, so that it must be detached for numpy or a deep copy. Inside of ``torch.compile`` nothing is changed.
    """
    model.register_forward_hook(_watch, with_kwargs=True)


def refuse_no_more(model: nn.Module) -> None:
    """Undo `refuse_when_frozen`, also in a copy of the model."""
    for key in [key for key, hook in model._forward_hooks.items() if hook is _watch]:
        del model._forward_hooks[key]
        model._forward_hooks_with_kwargs.pop(key, None)


def other_hooks(module: nn.Module) -> bool:
    """Whether ``module`` has hooks on its forward pass that are not of this package."""
    hooks = module._forward_hooks.values()
    return bool(module._forward_pre_hooks) or any(hook is not _watch and not is_own_gradient(hook) for hook in hooks)


def _watch(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """The forward hook: ``output`` with a loss whose backward pass raises, if it holds one without a gradient."""
    if not module.training or not torch.is_grad_enabled() or is_traced():
        return None
    if isinstance(output, dict):
        if _is_frozen(output.get("loss")):
            output["loss"] = _watched(output["loss"])
    elif kwargs.get("labels") is not None:  # without them a number may be anything
        if _is_frozen(output):
            return _watched(output)
        if type(output) is tuple and output and _is_frozen(output[0]):
            return (_watched(output[0]), *output[1:])
    return None


def _is_frozen(loss: Any) -> bool:
    return isinstance(loss, Tensor) and loss.ndim == 0 and loss.is_floating_point() and not loss.requires_grad


def _watched(loss: Tensor) -> Tensor:
    return _Frozen.apply(loss, torch.zeros((), requires_grad=True))
