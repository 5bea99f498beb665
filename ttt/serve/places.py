"""How much may wait at a time: places for requests and jobs, and tokens that are to be learnt."""

from __future__ import annotations

import threading
from collections import Counter

from ttt.serve.errors import TooBusy
from ttt.serve.limits import Limits


class Places:
    """Counts what waits in a `ttt.serve.service.Service`, from any thread. A token counts once in each pass over it.

    Args:
        limits: how much may.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._lock = threading.Lock()
        self._taken: Counter[str | None] = Counter()
        self._waiting = self._tokens = 0

    @property
    def waiting(self) -> int:
        """Number of requests and jobs that wait."""
        return self._waiting

    @property
    def tokens(self) -> int:
        """Number of tokens that are to be learnt."""
        return self._tokens

    def take(self, user: str | None, tokens: int = 0) -> None:
        """Take a place for ``user``, and for so many ``tokens`` that are to be learnt.

        Raises:
            TooBusy: if too much waits already, of this user or at all; then nothing is taken.
        """
        limits = self.limits
        with self._lock:
            if self._waiting >= limits.waiting:
                raise TooBusy(
                    f"{self._waiting} requests are waiting, which is as many as are allowed; try again later",
                    retry_after=2,
                )
            if user is not None and self._taken[user] >= limits.waiting_per_user:
                raise TooBusy(
                    f"{self._taken[user]} requests of this user are waiting, which is as many as one user may have; "
                    "try again later",
                    retry_after=2,
                )
            if tokens and self._tokens and self._tokens + tokens > limits.learning_tokens:
                raise TooBusy(
                    f"{self._tokens} tokens wait to be read and learnt, {tokens} would be added, and "
                    f"{limits.learning_tokens} are allowed; try again later, or "
                    "with x-ttt-learn: off",
                    retry_after=10,
                )
            self._waiting += 1
            self._taken[user] += 1
            self._tokens += tokens

    def leave(self, user: str | None) -> None:
        """Give a place back."""
        with self._lock:
            self._waiting -= 1
            self._taken[user] -= 1
            if not self._taken[user]:
                del self._taken[user]

    def learnt(self, tokens: int) -> None:
        """Note that so many ``tokens`` wait no longer: they were learnt, or never will be."""
        with self._lock:
            self._tokens -= tokens
