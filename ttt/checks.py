"""Checks of single arguments: each returns the value, or raises a ValueError that names it and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence


def check_number(name: str, value: float, low: float, high: float = float("inf"), *, above: bool = False) -> float:
    """``value``, if it is in [low, high], in (low, high] with ``above``.

    Raises:
        ValueError: otherwise; it names the argument, the value and what is allowed.
    """
    if not (low <= value <= high) or (above and value == low):
        raise ValueError(f"{name} must be a number in {'(' if above else '['}{low}, {high}], got {value!r}")
    return value


def check_whole(name: str, value: int, low: int) -> int:
    """``value``, if it is a whole number of at least ``low``.

    Raises:
        ValueError: otherwise.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")
    return value


def check_choice(name: str, value: str, allowed: Sequence[str]) -> str:
    """``value``, if it is one of ``allowed``.

    Raises:
        ValueError: otherwise.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {tuple(allowed)}, got {value!r}")
    return value
