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
