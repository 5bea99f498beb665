"""`LowRank`: how many users learn at a time, and how much each may learn."""

from __future__ import annotations

import dataclasses

from ttt.checks import check_choice, check_whole
from ttt.ops.schema import SHRINK


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Low-rank weights B_u^T A_u of many users, for ``TTTConfig(users=...)``.

    A layer of m x n holds ``slots`` (rank + window) (m + n) numbers for them, whatever they learn.

    Args:
        slots: S, users whose weights are in memory at a time.
        rank: r, rows that a user's weights are compressed to.
        window: C, the latest tokens of a user, in effect with full rank until r + C rows are in use.
        shrink: how the singular values beyond ``rank`` are dropped: ``"truncate"``, the best approximation each time,
            or ``"directions"`` (co-occurring directions, Mroueh et al. 2017), which takes the first of them off all
            that stay. See `ttt.ops.low_rank_compress`.

    Raises:
        ValueError: for a value out of range.
    """

    slots: int = 32
    rank: int = 16
    window: int = 64
    shrink: str = "truncate"

    def __post_init__(self) -> None:
        for name in ("slots", "rank", "window"):
            check_whole(name, getattr(self, name), 1)
        check_choice("shrink", self.shrink, SHRINK)

    @property
    def capacity(self) -> int:
        """R = r + C, rows of a slot."""
        return self.rank + self.window
