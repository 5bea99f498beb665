"""How a capturable layer counts the rows of its window: on the device, where a CUDA graph can follow."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


def forbid_capture(what: str) -> None:
    """Raise RuntimeError if the present stream is being captured."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{what} needs the host to wait for the device, which cannot be captured in a CUDA graph")


@dataclasses.dataclass
class Steps:
    """Steps of ``rows`` rows through a window.

    ``held``: rows in the window when no other step fits; 0 where steps are more than half of it and do not enter.
    ``counters`` (3,) int64: as `ttt.ops.window_append` takes them.
    """

    rows: int
    held: int
    counters: Tensor

    @classmethod
    def of(cls, rows: int, window: int, device: torch.device) -> Steps:
        held = window // rows * rows if 2 * rows <= window else 0
        return cls(rows, held, torch.zeros(3, dtype=torch.int64, device=device))

    @property
    def full(self) -> Tensor:
        """(1,) int64: 1 if the window is to be committed before the next step."""
        return self.counters[1:2]

    def takes(self, pending: int) -> bool:
        """Whether so many rows are what steps leave in the window, ``held`` included."""
        return pending % self.rows == 0 and pending <= self.held

    @property
    def pending(self) -> int:
        forbid_capture("the number of rows in the window")
        return int(self.counters[0])

    @pending.setter
    def pending(self, rows: int) -> None:
        self.counters[0] = rows
        self.counters[1] = int(0 < self.held == rows)
