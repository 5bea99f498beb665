"""Waiting until what was learnt is stored, for as long as the store takes anything."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable

from ttt.serve.errors import RequestError
from ttt.serve.session import settle


@dataclasses.dataclass(frozen=True)
class _Waiting:
    user: str
    told: concurrent.futures.Future[int]
    began: float


class Acknowledgements:
    """Futures of versions that are to be stored, which end with an error if the store does not take them.

    Args:
        longest: returns the seconds that somebody waits for that.
        failure: returns the error of what the store does not take of a user; None if it does.
        missed: called with a user and an error if nobody waits any more and the version is not stored in the end.
    """

    def __init__(
        self,
        longest: Callable[[], float],
        failure: Callable[[str], RequestError | None],
        missed: Callable[[str, BaseException], None],
    ) -> None:
        self._longest, self._failure, self._missed = longest, failure, missed
        self._lock = threading.Lock()
        self._waiting: list[_Waiting] = []

    def wait(self, user: str, stored: concurrent.futures.Future[int]) -> concurrent.futures.Future[int]:
        """A future that ends as ``stored`` does, or with an error before; who waits no more may cancel it."""
        told: concurrent.futures.Future[int] = concurrent.futures.Future()
        with self._lock:
            self._waiting.append(_Waiting(user, told, time.monotonic()))

        def ended(stored: concurrent.futures.Future[int]) -> None:
            error = stored.exception()
            in_time = settle(told, stored.result() if error is None else error)
            if error is not None and not in_time:
                self._missed(user, error)

        stored.add_done_callback(ended)
        return told

    def look(self) -> None:
        """End what has waited too long; to be called again and again."""
        now = time.monotonic()
        with self._lock:
            self._waiting = [each for each in self._waiting if not each.told.done()]
            late = [each for each in self._waiting if now - each.began >= self._longest()]
        for each in late:
            if (error := self._failure(each.user)) is not None:
                settle(each.told, error)
