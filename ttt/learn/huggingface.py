"""Calling a transformers model chunk by chunk: its parameters' flags, masks, positions and caches."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn


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

    The name of the argument is ``cache`` in transformers 5.2x and ``past_key_values`` in older releases.
    """
    return {_cache_name(type(model).forward): cache, "use_cache": True}


@functools.cache
def _cache_name(forward: Callable) -> str:
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def cache_of(out: Any) -> Any:
    """The cache that a model returned."""
    return out.cache if hasattr(out, "cache") else out.past_key_values


def detached(cache):
    """``cache`` itself, its tensors cut from their autograd graph, so that gradients never cross chunks.

    It works on all tensors that the layers of a transformers cache hold (keys, values, recurrent states).
    """
    for layer in getattr(cache, "layers", []):
        for name, value in vars(layer).items():
            if isinstance(value, Tensor) and value.requires_grad:
                setattr(layer, name, value.detach())
    return cache


@contextlib.contextmanager
def swapped(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Inside, ``module`` computes ``forward`` instead of its own forward pass."""
    object.__setattr__(module, "forward", forward)
    try:
        yield
    finally:
        object.__delattr__(module, "forward")
