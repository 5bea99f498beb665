"""Calling a transformers model chunk by chunk: its parameters' flags, masks, positions and caches."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ttt.adapt.names import unwrapped


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter of ``model`` requires grad: learning needs none. Afterwards the flags are as before."""
    thawed = [p for p in model.parameters() if p.requires_grad]
    for p in thawed:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in thawed:
            p.requires_grad_(True)


def masked_inputs(attend: Tensor, width: int) -> dict[str, Tensor]:
    """The ``attention_mask`` and ``position_ids`` of the last ``width`` of L tokens with mask ``attend`` (B, L)."""
    positions = (attend.cumsum(1) - 1).clamp_min(0)[:, -width:]
    return {"attention_mask": attend.long(), "position_ids": positions}


def cached(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The arguments that make ``model`` continue from ``cache`` (None: begin a new text) and return the longer cache.

    The name of the argument is ``cache`` in transformers 5.2x; in older releases ``past_key_values``, or
    ``cache_params`` for state-space models.

    Raises:
        ValueError: if the model takes no cache.
    """
    name = _cache_name(type(_called(model)).forward)
    if not name:
        raise ValueError(
            f"model ({type(model).__name__}) takes no cache, so it cannot be read chunk by chunk; ttt.learning(model) "
            "learns from any loss"
        )
    return {name: cache, "use_cache": True}


def _called(model: Any) -> Any:
    """The model that takes the arguments of ``model``: what `torch.compile` or PEFT has wrapped, if it has."""
    model = unwrapped(model)
    return unwrapped(model.get_base_model()) if hasattr(model, "get_base_model") else model


@functools.cache
def _cache_name(forward: Callable) -> str:
    parameters = inspect.signature(forward).parameters
    for name in ("cache", "past_key_values", "cache_params"):
        if name in parameters:
            return name
    own = [p.kind for n, p in parameters.items() if n != "self"]
    hidden = own == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]  # of a wrapper, as PEFT's
    return "past_key_values" if hidden else ""


def cache_of(out: Any) -> Any:
    """The cache that a model returned."""
    for name in ("cache", "past_key_values", "cache_params"):
        if hasattr(out, name):
            return getattr(out, name)
    raise ValueError(f"model returned {type(out).__name__}, which holds no cache; ttt.learning learns from any loss")


def detached(cache):
    """``cache`` itself, its tensors cut from their autograd graph, so that gradients never cross chunks.

    It works on all tensors that the layers of a transformers cache hold: keys, values, and the states of recurrent
    blocks, some of which are in dictionaries or named tuples.
    """
    return changed(cache, lambda t: t.detach() if t.requires_grad else t)


def changed(cache: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``cache`` itself, each tensor in its layers replaced by what ``change`` makes of it."""
    for layer in [cache, *getattr(cache, "layers", [])] if hasattr(cache, "layers") else []:
        for name, value in vars(layer).items():
            if isinstance(value, Tensor):
                setattr(layer, name, change(value))
            elif isinstance(value, tuple):
                setattr(layer, name, _changed_tuple(value, change))
            elif isinstance(value, list) and any(isinstance(t, Tensor) for t in value):
                value[:] = [change(t) if isinstance(t, Tensor) else t for t in value]
            elif isinstance(value, dict) and any(isinstance(t, Tensor) for t in value.values()):
                setattr(layer, name, _States({k: change(t) if isinstance(t, Tensor) else t for k, t in value.items()}))
    return cache


def _changed_tuple(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A tuple of the kind of ``value``, each tensor in it replaced by what ``change`` makes of it."""
    parts = [
        change(each) if isinstance(each, Tensor) else _changed_tuple(each, change) if isinstance(each, tuple) else each
        for each in value
    ]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


class _States(dict[Any, Any]):
    """States of a recurrent block, which transformers overwrites in place after it has read them.

    The backward pass needs what was read. So while gradients are enabled every access makes a copy, which takes the
    place of the tensor: what is overwritten is never what was read.
    """

    def __getitem__(self, key: Any) -> Any:
        value = super().__getitem__(key)
        if isinstance(value, Tensor) and torch.is_grad_enabled():
            value = value.clone()
            self[key] = value
        return value


@contextlib.contextmanager
def swapped(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Inside, ``module`` computes ``forward`` instead of its own forward pass."""
    object.__setattr__(module, "forward", forward)
    try:
        yield
    finally:
        object.__delattr__(module, "forward")
