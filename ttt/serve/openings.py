"""Giving users slots: their states are read in other threads, and idle users make room."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable, Mapping
from typing import Any

from ttt.serve.daemon_threads import DaemonThreads
from ttt.serve.sessions import Fetched, Sessions
from ttt.serve.user_queue import UserQueue

LONGEST = 10.0
"""Seconds that requests wait for the store to say what it has of their user."""
_REOPEN = 5.0  # seconds after which a user who can only be read is opened again, or sooner with short leases


class Openings:
    """Opens users of a `ttt.serve.service.Service`; for its thread.

    Args:
        sessions: get the users.
        queues: of the users, by id.
        io: reads from the store.
        observer: is told what happens.
        wake: called in a thread of ``io`` when a state has been read.
    """

    def __init__(
        self,
        sessions: Sessions,
        queues: Mapping[str | None, UserQueue],
        io: DaemonThreads,
        observer: Any,
        wake: Callable[[], None],
    ) -> None:
        self.sessions, self.queues, self.io, self.observer, self.wake = sessions, queues, io, observer, wake
        self.reopen_after = min(_REOPEN, sessions.lease_seconds / 8)

    def has_session(self, user: str | None, waits: UserQueue) -> bool:
        """Whether ``user`` has a slot, or needs none; otherwise the store is asked for their state."""
        if user is None:
            return True
        session = self.sessions.get(user)
        if session is not None and session.read_only:
            busy = waits.active or waits.reads or waits.job is not None
            if not busy and time.monotonic() - session.opened > self.reopen_after:
                self.sessions.drop(user)
                session = None
        if session is not None:
            self.sessions.use(user)
            return True
        if waits.opening is None and waits.fetched is None:
            waits.asked = time.monotonic()
            waits.opening = self.io.submit(self._timed_fetch, user)
            waits.opening.add_done_callback(lambda _: self.wake())
        return False

    def _timed_fetch(self, user: str) -> Fetched:
        began = time.perf_counter()
        fetched = self.sessions.fetch(user)
        self.observer.opened(time.perf_counter() - began)
        return fetched

    def late(self, waits: UserQueue) -> bool:
        """Whether the store was asked for the state of the user of ``waits`` more than `LONGEST` seconds ago.

        The answer is waited for all the same: who asks then for the user finds it.
        """
        return waits.opening is not None and time.monotonic() - waits.asked > LONGEST

    def install(self, waits: UserQueue) -> bool:
        """Give the user of ``waits`` a slot if their state has been read and a slot is free; whether they got one.

        Raises:
            RequestError: as `Sessions.fetch` and `Sessions.install`.
        """
        if waits.opening is not None and waits.opening.done():
            future, waits.opening = waits.opening, None
            waits.fetched = future.result()
        fetched = waits.fetched
        if fetched is None:
            return False
        # A lease is not renewed before its user has a slot, and another server may take the user over.
        too_old = time.monotonic() - fetched.session.opened > self.sessions.lease_seconds / 2
        if too_old or not waits.waiting:
            waits.fetched = None
            self.sessions.discard(fetched)
            return False
        if not self._free_slot():
            return False
        waits.fetched = None
        self.sessions.install(fetched)
        return True

    def abandon(self, waits: UserQueue) -> None:
        """Wait no longer for the state of the user of ``waits``; a lease that comes with it later is released."""
        assert waits.opening is not None
        waits.opening.add_done_callback(self._discard)
        waits.opening = None

    def _discard(self, opening: concurrent.futures.Future[Fetched]) -> None:
        # In the thread that has read the state: the writer's may have ended by then.
        if not opening.cancelled() and opening.exception() is None:
            self.sessions.give_back(opening.result())

    def _free_slot(self) -> bool:
        """Whether a slot is free, after the eviction of an idle user if necessary."""
        sessions = self.sessions
        if len(sessions.users) < sessions.pool.slots:
            return True
        for user in sessions.users:
            waits, session = self.queues.get(user), sessions.get(user)
            if (waits is None or waits.idle) and session is not None and (sessions.saved(user) or not session.lease):
                sessions.evict(user)
                self.observer.evicted()
                return True
        return False
