"""Turns that were to be learnt after their answers and were not: what their users can read about them."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from ttt.serve.errors import Conflict, RequestError, kinds

log = logging.getLogger("ttt.serve")
FORGOTTEN = "forgotten"
"""Code of errors of lessons that ended because their user is being forgotten."""


def forgotten() -> Conflict:
    """The error of a lesson that ended so, and was not learnt."""
    return Conflict("nothing was learnt: the user was forgotten meanwhile", code=FORGOTTEN)


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

    It is kept until the server ends, the user is forgotten, or ``most`` other users have missed turns later. Turns that
    are dropped because a user is being forgotten count only if that fails in the end: between `forgetting` and
    `forget`, or `not_forgotten`, they are set aside.

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
        self._dropped: dict[str, int] = {}  # by user who is being forgotten, how many turns that has dropped
        self._kept: OrderedDict[str, str] = OrderedDict()  # by user who could not be forgotten, why

    def note(self, user: str, error: BaseException) -> None:
        """Note that a turn of ``user`` was not learnt, because of ``error``: in the log without the user's name."""
        why = error.message if isinstance(error, RequestError) else f"the server failed: {kinds(error)}"
        if getattr(error, "code", None) == FORGOTTEN:
            with self._lock:
                if user in self._dropped:
                    self._dropped[user] += 1
                    return
                if user not in self._kept:
                    return
                why = self._kept[user]  # a write that was going on has ended only now
        self._count(user, 1, why)

    def forgetting(self, user: str) -> None:
        """Set the turns aside that are dropped because ``user`` is being forgotten, from now on."""
        with self._lock:
            self._dropped.setdefault(user, 0)

    def not_forgotten(self, user: str, error: BaseException, dropped: int = 0) -> None:
        """Note the turns that were set aside, and ``dropped`` others: forgetting ``user`` has failed with ``error``."""
        told = error.message if isinstance(error, RequestError) else f"the server failed: {kinds(error)}"
        why = f"dropped in order to forget the user, which failed: {told}"
        with self._lock:
            dropped += self._dropped.pop(user, 0)
            self._kept[user] = why
            self._kept.move_to_end(user)
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        self._count(user, dropped, why)

    def _count(self, user: str, turns: int, why: str) -> None:
        if not turns:
            return
        with self._lock:
            before = self._users.pop(user, None)
            self._users[user] = Missed(turns if before is None else before.turns + turns, why, time.time())
            if len(self._users) > self._most:
                self._users.popitem(last=False)
        for _ in range(turns):
            self._counted()
            self._log.warning("a turn that was to be learnt after its answer was not: %s", why)

    def of(self, user: str) -> Missed | None:
        """What was missed of ``user``; None for nothing."""
        with self._lock:
            return self._users.get(user)

    def forget(self, user: str) -> None:
        """Keep nothing of ``user``, who was forgotten."""
        with self._lock:
            self._users.pop(user, None)
            self._dropped.pop(user, None)
            self._kept.pop(user, None)
