"""`Clock`: the time that a method takes to read, as a multiple of the frozen model's in the same run."""

from __future__ import annotations

import time
from statistics import median


class Clock:
    """Compares the time of a method's turns with the frozen model's.

    The frozen model takes one turn in each block of turns of the method, after the first of them.

    Args:
        block: number of turns of the method in a block.
    """

    def __init__(self, block: int = 4) -> None:
        self.block = block
        self._blocks: list[tuple[list[float], list[float]]] = []

    def turn(self) -> _Timer:
        """Times a turn of the method."""
        if not self._blocks or len(self._blocks[-1][0]) == self.block:
            self._blocks.append(([], []))
        return _Timer(self._blocks[-1][0])

    def due(self) -> bool:
        """Whether the frozen model has not yet had its turn in this block."""
        return not self._blocks[-1][1]

    def frozen(self) -> _Timer:
        """Times a turn of the frozen model."""
        return _Timer(self._blocks[-1][1])

    def ratio(self) -> float:
        """Median over the blocks of (mean time of the method's turns / time of the frozen model's turn).

        The mean within a block spreads work that is done only once every few turns.
        """
        ratios = [sum(own) / len(own) / frozen[0] for own, frozen in self._blocks]
        return round(median(ratios), 4)


class _Timer:
    """A context manager that appends the seconds spent in it to ``times``."""

    def __init__(self, times: list[float]) -> None:
        self.times = times

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self.times.append(time.perf_counter() - self.began)
