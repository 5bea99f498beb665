"""Work in steps, as a generator: between two steps, who takes them may do something else."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

R = TypeVar("R")


def finish(steps: Generator[Any, None, R]) -> R:
    """Take all ``steps``, and return what the generator returns."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value
