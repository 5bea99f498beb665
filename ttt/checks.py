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
