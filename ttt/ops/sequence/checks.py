"""Checks of the arguments that the sequence ops share; they run before anything is computed or written."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ttt.ops.sequence.states import tensors_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tokens(q: Tensor, k: Tensor, v: Tensor, dims: int = 4) -> None:
    """Check that q and k are (B, T, H, K) and v is (B, T, H, V); without T if ``dims`` is 3.

    Raises:
        TypeError, ValueError: otherwise.
    """
    shape = "(B, T, H, D)" if dims == 4 else "(B, H, D)"
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.dim() != dims:
            raise ValueError(f"{name} must be {shape}, got {tuple(t.shape)}")
        if t.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {t.dtype}")
        if t.dtype != q.dtype or t.device != q.device:
            raise TypeError(f"{name} must be {q.dtype} on {q.device} like q, got {t.dtype} on {t.device}")
    if k.shape != q.shape:
        raise ValueError(f"k must have the shape of q, {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.shape[:-1] != q.shape[:-1]:
        raise ValueError(f"v must be {(*q.shape[:-1], 'any')} like q but for the last size, got {tuple(v.shape)}")


def check_shape(name: str, t: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    """Check that ``t`` is None or a floating-point tensor of ``shape`` on ``device``.

    Raises:
        TypeError, ValueError: otherwise.
    """
    if t is None:
        return
    if not isinstance(t, Tensor) or not t.is_floating_point() or t.device != device:
        found = f"{t.dtype} on {t.device}" if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name} must be a floating-point tensor on {device}, got {found}")
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(t.shape)}")


def check_count(name: str, value: int, least: int = 1) -> None:
    """Check that ``value`` is a whole number of at least ``least``.

    Raises:
        TypeError, ValueError: otherwise.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__} {value!r:.40}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def bounds_of(cu_seqlens: Tensor | None, batch: int, tokens: int) -> list[int] | None:
    """``cu_seqlens`` as a list, or None for None.

    Raises:
        TypeError, ValueError: if it is not a vector of integers that rises from 0 to ``tokens``, or ``batch`` is not 1.
    """
    if cu_seqlens is None:
        return None
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        found = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens must be an int32 or int64 tensor, got {found}")
    if batch != 1:
        raise ValueError(f"cu_seqlens packs all sequences into a batch of 1, got a batch of {batch}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must hold at least 2 numbers, got shape {tuple(cu_seqlens.shape)}")
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to the {tokens} tokens, got {bounds[:8]}")
    return bounds


def check_state(state: Any, like: Any, rows: int) -> None:
    """Check that ``state`` has the form of ``like``, tensors of its shapes and dtypes, and ``rows`` sequences.

    Args:
        like: a state for any number of sequences.

    Raises:
        TypeError, ValueError: otherwise.
    """
    if type(state) is not type(like):
        raise TypeError(f"initial_state must be a {type(like).__name__}, got {type(state).__name__}")
    found, wanted = tensors_of(state), tensors_of(like)
    if len(found) != len(wanted):
        raise ValueError(f"initial_state must hold {len(wanted)} tensors, got {len(found)}")
    for t, w in zip(found, wanted, strict=True):
        if tuple(t.shape) != (rows, *w.shape[1:]):
            raise ValueError(f"initial_state must hold a tensor {(rows, *w.shape[1:])} here, got {tuple(t.shape)}")
        if t.dtype != w.dtype or t.device != w.device:
            raise TypeError(f"initial_state must hold {w.dtype} on {w.device} here, got {t.dtype} on {t.device}")
