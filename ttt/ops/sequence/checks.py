"""Checks of the arguments that the sequence ops share; they run before anything is computed or written."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ttt.ops.sequence.states import tensors_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORMS = ("auto", "chunk", "reference")

MOST_COUNT = (1 << 63) - 1
"""The largest number that int64, and so an op of torch, can hold."""

Form = list[tuple[tuple[int, ...], torch.dtype]]
"""Of the tensors of a state, in the order of `tensors_of`: the shape without the sequences, and the dtype."""


def check_form(form: str) -> None:
    """Raise ValueError unless ``form`` is one of `FORMS`."""
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")


def refuse_gradients(op: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError if grad mode is on and one of ``tensors`` requires grad."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(f"{op} has no derivative: call it under torch.no_grad(), or use the op for whole sequences")


def check_tokens(q: Tensor, k: Tensor, v: Tensor, dims: int = 4) -> None:
    """Check that q and k are (B, T, H, K) and v is (B, T, H, V), K not 0; without T if ``dims`` is 3.

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
    if not q.shape[-1]:
        raise ValueError(f"q must be {shape} with D of at least 1, got {tuple(q.shape)}")
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
    """Check that ``value`` is a whole number of at least ``least`` and at most `MOST_COUNT`.

    Raises:
        TypeError, ValueError: otherwise.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__} {value!r:.40}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if value > MOST_COUNT:
        raise ValueError(f"{name} must be at most {MOST_COUNT}, got {value}")


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


def sequences(bounds: list[int] | None, batch: int) -> int:
    """How many sequences there are: those that are packed between ``bounds`` (`bounds_of`), or the ``batch``."""
    return batch if bounds is None else len(bounds) - 1


def check_positions(name: str, position: Tensor, size: int) -> None:
    """Check that the positions of a state lie in chunks or mini-batches of ``size`` tokens; ``name`` is that argument.

    Raises:
        ValueError: otherwise: the state was made with larger ones.
    """
    wrong = [p for p in position.tolist() if not 0 <= p < size]
    if wrong:
        raise ValueError(f"initial_state.position must be at least 0 and below {name}, {size}, got {wrong[0]}")


def check_state(state: Any, kind: type, form: Form, rows: int, device: torch.device) -> None:
    """Check that ``state`` is a ``kind`` of ``rows`` sequences, whose tensors have the ``form``, on ``device``.

    Raises:
        TypeError, ValueError: otherwise.
    """
    if type(state) is not kind:
        raise TypeError(f"initial_state must be a {kind.__name__}, got {type(state).__name__}")
    found = tensors_of(state)
    if len(found) != len(form):
        raise ValueError(f"initial_state must hold {len(form)} tensors, got {len(found)}")
    for t, (shape, dtype) in zip(found, form, strict=True):
        if tuple(t.shape) != (rows, *shape):
            raise ValueError(f"initial_state must hold a tensor {(rows, *shape)} here, got {tuple(t.shape)}")
        if t.dtype != dtype or t.device != device:
            raise TypeError(f"initial_state must hold {dtype} on {device} here, got {t.dtype} on {t.device}")
