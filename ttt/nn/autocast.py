"""Layers inside of `torch.autocast`: they compute in the dtype of their weight, and give what nn.Linear would give."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that `nn.Linear` would give its output for inputs ``x``; None outside of autocast.

    Autocast leaves float64 alone.
    """
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64 or not x.is_floating_point():
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Inside, products have the dtypes of their factors."""
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def full_precision(method: F) -> F:
    """Decorate a method of a layer that learns: it computes as outside of autocast."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        with without_autocast(self.weight.device):
            return method(self, *args, **kwargs)

    return wrapped  # type: ignore[return-value]
