"""Counting a capturable layer's window on the device, as a CUDA graph needs it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


def forbid_capture(what: str) -> None:
    """Raise RuntimeError if a CUDA graph is being captured on the current stream; ``what`` names what needs a wait."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{what} needs the host to wait for the device, which cannot be captured in a CUDA graph")


def check_capturable(rows: int, weight: Tensor, generated_rows: int) -> None:
    """Raise ValueError unless steps of ``rows`` rows of a layer with ``weight`` can be captured in a CUDA graph."""
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise ValueError(f"rows must be a whole number of at least 1, or None, got {rows!r}")
    if weight.is_cuda and weight.dtype == torch.float64:
        raise ValueError("a layer of torch.float64 cannot be captured: there are no GPU kernels for it")
    if generated_rows:
        raise ValueError(
            f"a layer with generated_rows = {generated_rows} cannot be captured: each of its commits "
            "takes an eigendecomposition, for which the host waits"
        )


@dataclasses.dataclass
class WindowCounter:
    """Counts, on the device, the rows in a window that is filled by steps of ``rows`` rows each.

    Attributes:
        rows: rows of every step.
        capacity: rows in the window when no further step fits. 0 if a step has more than half the window's rows:
            such steps are committed at once and never enter the window.
        counters: (3,) int64 on the device, as `ttt.ops.window_append` takes them: rows in the window, whether it is
            full, and a number for the kernel's own use.
    """

    rows: int
    capacity: int
    counters: Tensor

    @classmethod
    def of(cls, rows: int, window: int, device: torch.device) -> WindowCounter:
        """A counter at 0 for steps of ``rows`` rows through a window of ``window`` rows."""
        capacity = window // rows * rows if 2 * rows <= window else 0
        with torch.inference_mode(False):
            return cls(rows, capacity, torch.zeros(3, dtype=torch.int64, device=device))

    @property
    def full(self) -> Tensor:
        """(1,) int64: 1 if the window is to be committed before the next step."""
        return self.counters[1:2]

    def can_hold(self, pending: int) -> bool:
        """Whether steps can leave exactly ``pending`` rows in the window."""
        return pending % self.rows == 0 and 0 <= pending <= self.capacity

    @property
    def pending(self) -> int:
        """Rows in the window. Reading waits for the device."""
        forbid_capture("the number of rows in the window")
        return int(self.counters[0])

    @pending.setter
    def pending(self, rows: int) -> None:
        self.counters[0] = rows
        self.counters[1] = int(0 < self.capacity == rows)
