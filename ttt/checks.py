"""Checks of single arguments: each returns the value, or raises an error that names it and what is allowed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


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


def check_layers(name: str, value: Sequence[int] | str) -> Sequence[int] | str:
    """``value``, if it is a string or a sequence of whole numbers, as ``TTTConfig.layers`` is.

    Raises:
        ValueError: otherwise.
    """
    if not isinstance(value, str) and not _sequence_of(value, int):
        raise ValueError(f'{name} must be "all", "last:0.25", "last:2" or a list of indices, got {value!r:.200}')
    return value


def _sequence_of(value: object, kind: type) -> bool:
    return isinstance(value, Sequence) and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)
