"""Checks of single arguments: each returns the value, or raises an error that names it and what is allowed."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
Layers = Sequence[int] | str | Mapping[str, Any]

MOST_ROWS = 2**24
"""The largest number of rows of a layer's window, its memory or a user's weights."""

_LAST = re.compile(r"last:(?:(?P<count>\d+)|(?P<share>\d*\.\d+|\d+\.))", re.ASCII)


def check_type(name: str, value: Any, kind: type[T] | tuple[type[T], ...], allowed: str) -> T:
    """``value``, if it is of type ``kind``; ``allowed`` says in words what it must be.

    Raises:
        TypeError: otherwise; it names the argument, the type of the value and what is allowed.
    """
    if not isinstance(value, kind):
        shown = "None" if value is None else f"{type(value).__name__} {value!r:.80}"
        raise TypeError(f"{name} must be {allowed}, got {shown}")
    return value


def check_bool(name: str, value: bool) -> bool:
    """``value``, if it is True or False.

    Raises:
        TypeError: otherwise.
    """
    return check_type(name, value, bool, "True or False")


def check_path(name: str, value: str | os.PathLike) -> Path:
    """``value`` as a path.

    Raises:
        TypeError: if it is neither a string nor a path. ValueError: if it is empty.
    """
    check_type(name, value, (str, os.PathLike), "a path (a string or os.PathLike)")
    text = os.fspath(value)
    if not isinstance(text, str) or not text:
        raise ValueError(f"{name} must be a path of at least one character, got {value!r:.80}")
    return Path(text)


def check_model(value: nn.Module, name: str = "model") -> nn.Module:
    """``value``, if it is a module.

    Raises:
        TypeError: otherwise.
    """
    return check_type(name, value, nn.Module, "a torch.nn.Module")


def check_dense(name: str, value: Tensor) -> Tensor:
    """``value``, if it is a strided tensor whose numbers are in memory.

    Raises:
        TypeError: otherwise.
    """
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
        kind = type(value).__name__
        if isinstance(value, Tensor):
            kind = "one on the meta device" if value.is_meta else f"a {value.layout} tensor"
        raise TypeError(f"{name} must be a dense tensor with data, got {kind}")
    return value


def check_token_ids(name: str, ids: Tensor, model: Any) -> Tensor:
    """``ids``, if they are (B, T) int64 tokens of the vocabulary of ``model``, a transformers language model.

    Raises:
        TypeError: if ``ids`` is no such tensor, or ``model`` has no input embeddings.
        ValueError: for a wrong shape, or a token outside the vocabulary.
    """
    check_dense(name, ids)
    if ids.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {ids.dtype}")
    if ids.ndim != 2 or ids.shape[0] == 0 or ids.shape[1] == 0:
        raise ValueError(f"{name} must have shape (B, T) with B, T >= 1, got {tuple(ids.shape)}")
    if not hasattr(model, "get_input_embeddings"):
        raise TypeError(
            f"model must be a transformers causal language model to read tokens, got {type(model).__name__}; "
            "ttt.learning learns with other models"
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    low, high = torch.stack(ids.aminmax()).tolist()
    if low < 0 or high >= vocabulary:
        raise ValueError(f"{name} must be in [0, {vocabulary}), got {low} to {high}")
    return ids


def check_number(
    name: str,
    value: float,
    low: float,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    finite: bool = False,
) -> float:
    """``value``, if it is a number in [low, high]; ``above`` excludes low, ``below`` high, and ``finite`` infinity.

    Raises:
        ValueError: otherwise; it names the argument, the value and what is allowed.
    """
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not ok or (above and value == low) or (below and value == high) or (finite and math.isinf(value)):
        span = f"{'(' if above else '['}{low}, {high}{')' if below or (finite and math.isinf(high)) else ']'}"
        raise ValueError(f"{name} must be a number in {span}, got {value!r}")
    return value


def check_whole(name: str, value: int, low: int, high: int | None = None) -> int:
    """``value``, if it is a whole number of at least ``low`` and at most ``high``.

    Raises:
        ValueError: otherwise.
    """
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= low
    if not ok or (high is not None and value > high):
        allowed = f"of at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be a whole number {allowed}, got {value!r}")
    return value


def check_choice(name: str, value: str, allowed: Sequence[str]) -> str:
    """``value``, if it is one of ``allowed``.

    Raises:
        ValueError: otherwise.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {tuple(allowed)}, got {value!r}")
    return value


def check_real(name: str, value: float, low: float = float("-inf"), high: float = float("inf")) -> float:
    """``value``, if it is a finite number in [low, high]; a bool is not a number.

    Raises:
        ValueError: otherwise.
    """
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    # Compared before `float` is called on it: a whole number may be too large for that.
    if not ok or not (low <= value <= high) or value in (float("inf"), float("-inf")):
        raise ValueError(f"{name} must be a finite number in [{low}, {high}], got {value!r:.80}")
    return value


def check_names(name: str, value: Sequence[str] | str | None) -> Sequence[str] | str | None:
    """``value``, if it is None, a string, or a sequence of strings.

    Raises:
        ValueError: otherwise.
    """
    if value is not None and not isinstance(value, str) and not _sequence_of(value, str):
        raise ValueError(f"{name} must be a string, a list of strings or None, got {value!r:.200}")
    return value


def check_layers(name: str, value: Layers) -> Layers:
    """``value``, if it is "all", "last:" and a number, or a sequence of whole numbers, as ``TTTConfig.layers`` is.

    It may also be a dictionary of such values by the names of stacks of blocks.

    Raises:
        ValueError: otherwise.
    """
    if value == "all" or (not isinstance(value, str) and _sequence_of(value, int)):
        return value
    if isinstance(value, str) and last_blocks(value) is not None:
        return value
    if isinstance(value, Mapping) and value and all(isinstance(key, str) and key for key in value):
        for key, part in value.items():
            if isinstance(part, Mapping):
                break
            check_layers(f"{name}[{key!r}]", part)
        else:
            return value
    raise ValueError(
        f'{name} must be "all", "last:F" with a share F in (0.0, 1.0], "last:N" with a whole number N of at least 1, '
        f"or a list of indices, got {value!r:.200}"
    )


def last_blocks(text: str) -> int | float | None:
    """The number of blocks that "last:2" names, a whole number, or the share of them that "last:0.25" names.

    It is None for other texts, and for a number or a share that is 0 or a share above 1.
    """
    found = _LAST.fullmatch(text)
    if found is None:
        return None
    amount = int(found["count"]) if found["count"] else float(found["share"])
    return amount if amount > 0 and (isinstance(amount, int) or amount <= 1) else None


def _sequence_of(value: object, kind: type) -> bool:
    if isinstance(value, (bytes, bytearray)):
        return False
    return isinstance(value, Sequence) and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)
