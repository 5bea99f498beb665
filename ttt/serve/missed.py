"""Turns that were to be learnt after their answers and were not: what their users can read about them."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from ttt.serve.errors import RequestError, kinds

log = logging.getLogger("ttt.serve")
FORGOTTEN = "forgotten"
"""Code of errors of lessons that ended because their user was forgotten, which the user knows."""


@dataclasses.dataclass(frozen=True)
class Missed:
    """What one user said that was not learnt.

    Attributes:
        turns: how many answers had promised to learn, and nothing was.
        why: the reason for the last one.
        at: when that was, in seconds since 1970.
    """

    turns: int
    why: str
    at: float


class MissedTurns:
    """Keeps what was missed of the users of one server, from any thread.

    It is kept until the server ends, the user is forgotten, or ``most`` other users have missed turns later.

    Args:
        counted: called once for each turn.
        log: gets a line about each.
        most: largest number of users of whom something is kept.
    """

    def __init__(
        self, counted: Callable[[], None] = lambda: None, log: logging.Logger = log, most: int = 10_000
    ) -> None:
        self._counted, self._log, self._most = counted, log, most
        self._lock = threading.Lock()
        self._users: OrderedDict[str, Missed] = OrderedDict()

    def note(self, user: str, error: BaseException) -> None:
        """Note that a turn of ``user`` was not learnt, because of ``error``: in the log without the user's name."""
        if getattr(error, "code", None) == FORGOTTEN:
            return
        why = error.message if isinstance(error, RequestError) else f"the server failed: {kinds(error)}"
        with self._lock:
            before = self._users.pop(user, None)
            self._users[user] = Missed(1 if before is None else before.turns + 1, why, time.time())
            if len(self._users) > self._most:
                self._users.popitem(last=False)
        self._counted()
        self._log.warning("a turn that was to be learnt after its answer was not: %s", why)

    def of(self, user: str) -> Missed | None:
        """What was missed of ``user``; None for nothing."""
        with self._lock:
            return self._users.get(user)

    def forget(self, user: str) -> None:
        """Keep nothing of ``user``."""
        with self._lock:
            self._users.pop(user, None)
