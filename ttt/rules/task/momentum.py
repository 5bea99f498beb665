"""Momentum and a forget gate in the commit: the update rule of Titans."""

from __future__ import annotations

from typing import Any

from ttt.checks import check_number
from ttt.rules.task.base import Rule


class Momentum(Rule):
    """Updates carry a velocity, and weights decay to the anchor.

    Behrouz, Zhong & Mirrokni, "Titans: Learning to Memorize at Test Time", 2024, inside the commit. `ttt.ops.momentum`
    derives what a window makes of the paper's recurrence. The forget gate pulls weights to the anchor instead of 0, so
    what is forgotten is what was learnt since the anchor last moved.

    Args:
        mu: share of the velocity that stays from token to token, in [0, 1).
        decay: pull to the anchor per token and unit of the learning rate, at least 0.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(self, mu: float = 0.9, *, decay: float = 0.0) -> None:
        if not 0 <= mu < 1:
            raise ValueError(f"mu must be a number in [0.0, 1.0), got {mu!r}")
        self.mu = mu
        self.decay = check_number("decay", decay, 0.0)

    def options(self) -> dict[str, Any]:
        return {"momentum": self.mu, "decay": self.decay}
