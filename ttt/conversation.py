"""How users' weights learn from conversations: what ``ttt chat``, the servers and the demo have in common."""

from __future__ import annotations

import dataclasses
from typing import Any

from ttt.checks import check_number, check_whole
from ttt.config import TTTConfig
from ttt.defences import DriftBudget, KroneckerFisher, LowRank

CONVERSATION = TTTConfig(
    target_modules=["down_proj"],
    layers="last:0.25",
    protect=[KroneckerFisher(), DriftBudget()],
    per_user=LowRank(slots=1, rank=96, window=32),
)
"""What learns: the layers of the default, with weights of each user whose change has a budget. The rank is large,
because each sentence adds directions of its own: what does not fit into the rank is forgotten first."""

SHORT = 64
"""Tokens of a text that is read with the whole emphasis."""
MOST_PASSES = 16


@dataclasses.dataclass(frozen=True)
class Telling:
    """How `ttt.Learner.observe` reads what a user says, so that it is remembered after one telling.

    The defaults were chosen on people of the benchmark's suite "facts" that it does not report (docs/language.md).

    Attributes:
        passes: how often it is read and learnt, at most `MOST_PASSES`.
        emphasis: multiplies the steps on a short text, in (0, 100], within the bound of `ttt.nn.own_loss`.

    Raises:
        TypeError, ValueError: for a value out of range.
    """

    passes: int = 2
    emphasis: float = 20.0

    def __post_init__(self) -> None:
        check_whole("passes", self.passes, 1, MOST_PASSES)
        check_number("emphasis", self.emphasis, 0.0, 100.0, above=True)

    def of(self, tokens: int) -> Telling:
        """How a text is read of which so many ``tokens`` teach.

        Beyond `SHORT` tokens the emphasis falls in proportion, so that a long text moves the weights about as far as a
        short one; a text for which it falls to 1, the steps of a stream, is read once.
        """
        emphasis = max(self.emphasis * min(1.0, SHORT / max(tokens, 1)), min(self.emphasis, 1.0))
        return Telling(1 if emphasis == 1.0 < self.emphasis else self.passes, emphasis)

    def changed(self, *, passes: int | None = None, emphasis: float | None = None) -> Telling:
        """The same but for what is given, not None."""
        return Telling(self.passes if passes is None else passes, self.emphasis if emphasis is None else emphasis)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `ttt.Learner.observe`."""
        return dataclasses.asdict(self)
