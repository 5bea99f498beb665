"""The time that a method takes; `Clock` has it as a multiple of the frozen model's in the same run."""

from __future__ import annotations

import time
from statistics import median

import torch


def seconds(device: str) -> float:
    """Processor time; on "cuda", where it leaves out the GPU's, the wall clock's after all work there has ended."""
    return _wall_clock(device) if device == "cuda" else time.process_time()


def _wall_clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """Compares the time of a method's turns with the frozen model's.

    The frozen model takes one turn in each block of turns of the method, after the first of them.

    Args:
        block: number of turns of the method in a block.
        device: where they are computed; "cuda" is waited for.
    """

    def __init__(self, block: int = 4, device: str = "cpu") -> None:
        self.block, self.device = block, device
        self._blocks: list[tuple[list[float], list[float]]] = []

    def turn(self) -> _Timer:
        """Times a turn of the method."""
        if not self._blocks or len(self._blocks[-1][0]) == self.block:
            self._blocks.append(([], []))
        return _Timer(self._blocks[-1][0], self.device)

    def due(self) -> bool:
        """Whether the frozen model has not yet had its turn in this block."""
        return not self._blocks[-1][1]

    def frozen(self) -> _Timer:
        """Times a turn of the frozen model."""
        return _Timer(self._blocks[-1][1], self.device)

    def ratio(self) -> float:
        """Median over the blocks of (mean time of the method's turns / time of the frozen model's turn).

        The mean within a block spreads work that is done only once every few turns.
        """
        ratios = [sum(own) / len(own) / frozen[0] for own, frozen in self._blocks]
        return round(median(ratios), 4)


class _Timer:
    """A context manager that appends the seconds spent in it to ``times``."""

    def __init__(self, times: list[float], device: str) -> None:
        self.times, self.device = times, device

    def __enter__(self) -> None:
        self.began = _wall_clock(self.device)

    def __exit__(self, *exc: object) -> None:
        self.times.append(_wall_clock(self.device) - self.began)
