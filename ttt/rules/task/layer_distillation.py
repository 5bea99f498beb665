"""Learning without Forgetting at the layer, inside the commit."""

from __future__ import annotations

from typing import Any

from ttt.checks import check_number, check_whole
from ttt.rules.task.base import Rule


class LayerDistillation(Rule):
    """Each commit pulls the layer's outputs on some of the inputs it learns from to those that the anchor W* gives.

    `ttt.rules.LwF` (Li & Hoiem, "Learning without Forgetting", ECCV 2016) taken layer by layer: what the layer said
    about the present inputs before the task is kept up, as far as ``beta`` says. There is no second forward pass, and
    nothing is kept but the anchor; see `ttt.ops.commit`. The anchor moves when a task ends.

    Args:
        rows: inputs of each commit that are pulled, in [1, 64]; with the rows of other rules 64 at most.
        beta: strength of the projection step, in [0, 2). Rules for rows of the commit share one.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(self, rows: int = 4, *, beta: float = 0.1) -> None:
        self.rows = check_whole("rows", rows, 1)
        self.beta = check_number("beta", beta, 0.0, 2.0)

    def options(self) -> dict[str, Any]:
        return {"distill_rows": self.rows, "replay_beta": self.beta, "replay": "projection"}
