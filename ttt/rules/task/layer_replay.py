"""Replay of layer inputs inside the commit: the anchor answers for the past."""

from __future__ import annotations

from typing import Any

from ttt.checks import check_number, check_whole
from ttt.rules.task.base import Rule


class LayerReplay(Rule):
    """Each commit is checked against remembered inputs of the layer, whose outputs the anchor W* defines.

    No label and no sample of the model's input is kept, and no further forward pass is made; see `ttt.ops.commit`.
    Inputs enter the memory, and the anchor moves, when a task ends.

    Args:
        rows: R in [1, 64], inputs replayed at each commit.
        beta: strength of the projection step, in [0, 2).
        capacity: inputs held for each layer.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(self, rows: int = 16, *, beta: float = 0.3, capacity: int = 200) -> None:
        self.rows = check_whole("rows", rows, 1)
        self.beta = check_number("beta", beta, 0.0, 2.0)
        self.capacity = check_whole("capacity", capacity, 1)

    def options(self) -> dict[str, Any]:
        return {
            "replay_rows": self.rows,
            "replay_beta": self.beta,
            "replay_capacity": self.capacity,
            "replay": "projection",
        }
