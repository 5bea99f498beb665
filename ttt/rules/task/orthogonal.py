"""Updates that leave the directions of earlier inputs alone."""

from __future__ import annotations

from typing import Any

from ttt.checks import check_whole
from ttt.rules.task.base import Rule


class OrthogonalUpdates(Rule):
    """Each update is made with x - U^T U x in place of the input x, U being directions of earlier tasks' inputs.

    With x - U^T U x = 0 for earlier inputs, what they gave before they give still (Saha et al., "Gradient Projection
    Memory for Continual Learning", ICLR 2021). U is computed when a task ends, from the inputs that the layer
    remembers; until the first task's end nothing is left out. See `ttt.ops.project_out`.

    Args:
        directions: k >= 1, principal directions kept of each layer's remembered inputs.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(self, directions: int = 16) -> None:
        self.directions = check_whole("directions", directions, 1)

    def options(self) -> dict[str, Any]:
        return {"orthogonal": self.directions}
