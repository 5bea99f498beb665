"""What reading and writing text with a transformers model share: its flags, masks and caches."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires grad inside; afterwards those do that did. Learning needs no gradient of a parameter."""
    thawed = [p for p in model.parameters() if p.requires_grad]
    for p in thawed:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in thawed:
            p.requires_grad_(True)


def masked_inputs(attend: Tensor, width: int) -> dict[str, Tensor]:
    """The model's ``attention_mask`` and ``position_ids`` for the last ``width`` of the tokens ``attend`` (B, L)."""
    positions = (attend.cumsum(1) - 1).clamp_min(0)[:, -width:]
    return {"attention_mask": attend.long(), "position_ids": positions}


def cached(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The arguments with which ``model`` goes on from ``cache``, None for a new text, and returns it.

    transformers 5.2x calls it ``cache``, and older ones ``past_key_values``.
    """
    return {_cache_name(type(model).forward): cache, "use_cache": True}


@functools.cache
def _cache_name(forward: Callable) -> str:
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def cache_of(out: Any) -> Any:
    """The cache that a model returned."""
    return out.cache if hasattr(out, "cache") else out.past_key_values


def detached(cache):
    """The same cache without its autograd graph: gradients never cross chunks.

    Works on whatever tensors the layers of a transformers cache hold (keys, values, recurrent states).
    """
    for layer in getattr(cache, "layers", []):
        for name, value in vars(layer).items():
            if isinstance(value, Tensor) and value.requires_grad:
                setattr(layer, name, value.detach())
    return cache


@contextlib.contextmanager
def swapped(module: nn.Module, forward: Callable) -> Iterator[None]:
    """``module`` computes ``forward`` instead."""
    object.__setattr__(module, "forward", forward)
    try:
        yield
    finally:
        object.__delattr__(module, "forward")
