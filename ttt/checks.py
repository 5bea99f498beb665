"""Checks of single arguments: each returns the value, or raises a ValueError that names it and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence


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
