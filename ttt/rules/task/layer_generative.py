"""Generative replay of layer inputs inside the commit: a Gaussian answers for the past, and no input is kept."""

from __future__ import annotations

from typing import Any

from ttt.checks import check_number, check_whole
from ttt.rules.task.base import Rule


class LayerGenerativeReplay(Rule):
    """Each commit is checked against inputs drawn from a low-rank Gaussian of the layer's past inputs.

    Generative replay (Shin et al., "Continual Learning with Deep Generative Replay", 2017) layer by layer, by the
    simplest generator there is: see `ttt.nn.gaussian`. It is of fixed size and is updated at every commit; the inputs
    of a task join the past, and the anchor moves, when the task ends.

    Args:
        rows: inputs drawn at each commit, in [1, 64]; with the rows of other rules 64 at most.
        beta: strength of the projection step, in [0, 2). Rules for rows of the commit share one.
        rank: principal directions of the Gaussian, >= 1.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(self, rows: int = 16, *, beta: float = 0.3, rank: int = 16) -> None:
        self.rows = check_whole("rows", rows, 1)
        self.beta = check_number("beta", beta, 0.0, 2.0)
        self.rank = check_whole("rank", rank, 1)

    def options(self) -> dict[str, Any]:
        return {
            "generated_rows": self.rows,
            "generated_rank": self.rank,
            "replay_beta": self.beta,
            "replay": "projection",
        }
