"""The threads between `ttt.serve.sessions.Sessions` and the store: one writes, one renews leases.

Learning must not wait for a disk. A user's newest state is written; states that were replaced before their turn are
skipped.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from ttt.serve.errors import Conflict, Unavailable, kinds
from ttt.serve.missed import FORGOTTEN
from ttt.serve.session import Session, State, settle
from ttt.serve.store_health import StoreHealth
from ttt.store import StaleLease, Store, StoreReplaced

log = logging.getLogger("ttt.serve")
_RETRY = 0.5  # seconds between attempts to write to a store that fails
_LOOK = 5.0  # seconds between two looks at whether the store works, at most
_QUIET = 30.0  # seconds between two lines of the log that say the same of a store that fails


@dataclasses.dataclass
class _Waiting:
    """The newest state of a user that is not yet stored, and who waits for it."""

    session: Session
    state: State
    meta: dict[str, Any]
    futures: list[concurrent.futures.Future[int]]

    def fail(self, error: Exception) -> None:
        for future in self.futures:
            settle(future, error)


class _Warnings:
    """Writes warnings to the log, of those with the same text at most one in `_QUIET` seconds."""

    def __init__(self) -> None:
        self._written: dict[str, tuple[float, int]] = {}  # by text: when last, and how many were left out since then

    def note(self, text: str) -> None:
        """Write ``text``, with how many like it were left out before, or leave it out."""
        now = time.monotonic()
        last, left_out = self._written.get(text, (-math.inf, 0))
        if now - last < _QUIET:
            self._written[text] = last, left_out + 1
            return
        self._written[text] = now, 0
        log.warning("%s%s", text, f" (and {left_out} times more since the last such line)" if left_out else "")


class Writer:
    """Writes users' states to ``store``, and renews and releases their leases, each in a thread of its own.

    No method but `close` and `release_now` waits for the store.

    Args:
        store: keeps versions.
        sessions: returns the sessions whose leases are to be renewed; called in the renewing thread.
        lease_seconds: of a lease.
        on_stored: called in the writing thread after each write with its seconds.

    Attributes:
        health: whether the store takes what is written. While writing fails, the store is tried every few seconds with
            a file of no use that is as large as the state that failed last: the states of one user may fail alone.
    """

    def __init__(
        self,
        store: Store,
        sessions: Callable[[], list[Session]],
        lease_seconds: float,
        on_stored: Callable[[float], None],
    ) -> None:
        self.store, self.sessions, self.lease_seconds, self.on_stored = store, sessions, lease_seconds, on_stored
        self.leaving: dict[str, Session] = {}  # by user, whose leases are to be released; the latest of each
        self.health = StoreHealth()
        self._changed = threading.Condition()
        self._not_stored, self._not_renewed = _Warnings(), _Warnings()  # one for each thread
        self._waiting: OrderedDict[str, _Waiting] = OrderedDict()
        self._size = 0  # bytes of the state that could not be written last
        self._released: list[Session] = []
        self._stop = False
        self._until = math.inf  # when nobody waits for the store any more, by `time.monotonic`
        self._finished = False  # nothing more will be written
        self._ended = threading.Event()  # no lease needs renewing any more
        self._thread = threading.Thread(target=self._run, name="ttt-store", daemon=True)
        self._thread.start()
        self._renewing = threading.Thread(target=self._renew, name="ttt-leases", daemon=True)
        self._renewing.start()

    @property
    def alive(self) -> bool:
        """Whether both threads run."""
        return self._thread.is_alive() and self._renewing.is_alive()

    def write(self, session: Session, state: State, meta: dict[str, Any]) -> concurrent.futures.Future[int]:
        """Have ``state`` written; the number of the version, once it or a later state of the session is stored."""
        future: concurrent.futures.Future[int] = concurrent.futures.Future()
        with self._changed:
            older = self._waiting.get(session.user)
            futures = [*(older.futures if older is not None else []), future]
            self._waiting[session.user] = _Waiting(session, state, meta, futures)
            self._changed.notify_all()
        return future

    def drop(self, session: Session) -> None:
        """Store nothing more of a session, and release its lease once a write that is going on has ended."""
        with self._changed:
            session.dropped = True
            waiting = self._waiting.pop(session.user, None)
            self._leave(session)
        if waiting is not None:
            waiting.fail(_dropped(session))

    def release(self, session: Session) -> None:
        """Release the lease of a session, once all that waits to be written of it is."""
        with self._changed:
            self._leave(session)

    def release_now(self, session: Session) -> None:
        """Release the lease of a session of which nothing waits to be written, also after `close`; waits for the
        store."""
        self._release([session])

    def _leave(self, session: Session) -> None:
        self.leaving[session.user] = session
        self._released.append(session)
        self._changed.notify_all()

    def close(self, sessions: list[Session], timeout: float | None) -> None:
        """Write what waits, release the leases of ``sessions``, and end.

        Args:
            timeout: seconds to wait for the store; None for as long as it takes. Of several calls, also at the same
                time, none waits longer than until the earliest of their ends.
        """
        with self._changed:
            for session in sessions:
                self._leave(session)
            self._stop = True
            if timeout is not None:
                self._until = min(self._until, time.monotonic() + timeout)
            self._changed.notify_all()  # to the writer, and to calls that wait already, whose end may be earlier now
            # A process that was forked has no such thread, and nobody would wake it.
            while not self._finished and self._thread.is_alive() and (left := self._until - time.monotonic()) > 0:
                self._changed.wait(None if left == math.inf else left)
            finished = self._finished
        if finished:
            self._thread.join()
        self._ended.set()

    def _run(self) -> None:
        try:
            while self._step():
                pass
        finally:
            with self._changed:
                self._finished = True
                self._changed.notify_all()

    def _step(self) -> bool:
        """`_turn`, which may fail: whatever it was, the writer goes on; False at the end."""
        try:
            return self._turn()
        except Exception:
            log.exception("a step of the writer failed")
            time.sleep(_RETRY)
            return True

    def _turn(self) -> bool:
        """Write the state that has waited longest, and release leases; False at the end."""
        with self._changed:
            if not self._waiting and not self._released and not self._stop:
                self._changed.wait()
            work = next(iter(self._waiting.values()), None)
            if work is not None:
                del self._waiting[work.session.user]
            busy = set(self._waiting) | ({work.session.user} if work is not None else set())
            released = [session for session in self._released if session.user not in busy]
            self._released = [session for session in self._released if session.user in busy]
            if work is None and not released and self._stop:
                return False
        if work is not None:
            self._put(work)
        self._release(released)
        return True

    def _put(self, work: _Waiting) -> None:
        """Write, and tell those who wait. If the store fails, the state waits again, unless there is a newer one."""
        session, lease = work.session, work.session.lease
        began = time.perf_counter()
        try:
            if lease is None:
                raise StaleLease(session.read_only or "the lease was lost")
            with self.health.watched("version"):
                version = self.store.put(lease, work.state, work.meta)
        except StaleLease:
            session.lose()
            work.fail(Conflict(f"what was learnt was not stored: {session.read_only}", code="read_only"))
        except Exception as error:
            if session.put_failed_since is None:
                session.put_failed_since = time.monotonic()
            self._size = sum(each.nbytes for each in work.state.values())
            self._not_stored.note(f"a version could not be stored; trying again: {kinds(error)}")
            self._put_back(work)
        else:
            session.version, session.put_failed_since = version, None
            session.stored = max(session.stored, int(work.meta["updates"]))
            session.owed_since = time.monotonic()
            seconds = time.perf_counter() - began
            # Of a user who was forgotten while it was written, it is erased with all other versions.
            told = _dropped(session) if session.dropped else version
            for future in work.futures:
                settle(future, told)
            self.on_stored(seconds)

    def _put_back(self, work: _Waiting) -> None:
        """Let a state wait that could not be written, for a moment before the next attempt."""
        failure: Exception | None = None
        with self._changed:
            newer = self._waiting.get(work.session.user)
            if work.session.dropped:
                failure = _dropped(work.session)
            elif newer is not None:
                newer.futures[:0] = work.futures
            elif self._stop:
                failure = Unavailable("what was learnt was not stored: the store fails, and the server is stopping")
            else:
                self._waiting[work.session.user] = work
            self._changed.wait(_RETRY)
        if failure is not None:
            work.fail(failure)

    def _release(self, sessions: list[Session]) -> None:
        for session in sessions:
            if session.lease is not None:
                with contextlib.suppress(Exception), self.health.watched("index"):  # it expires by itself
                    session.lease.release()
            session.left.set()
            with self._changed:
                if self.leaving.get(session.user) is session:
                    del self.leaving[session.user]

    def _renew(self) -> None:
        """Extend the leases of all users with a slot, a few times in the time of a lease, and look at the store."""
        every = self.lease_seconds / 4
        due = time.monotonic() + every
        while not self._ended.wait(max(0.0, min(_LOOK, due - time.monotonic()))):
            self._look()
            if time.monotonic() < due:
                continue
            due = time.monotonic() + every
            for session in self.sessions():
                lease = session.lease
                if lease is None or session.dropped or session.left.is_set():
                    continue
                try:
                    with self.health.watched("index"):
                        lease.renew(self.lease_seconds)
                except StaleLease:
                    if not session.left.is_set():
                        session.lose()
                except Exception as error:  # the store may be back before the lease ends
                    self._not_renewed.note(f"a lease could not be renewed: {kinds(error)}")

    def _look(self) -> None:
        """Notice that the store was replaced; and that one works to which nothing else is written that could be."""
        try:
            if self.health.failing:
                with self.health.watched("version"):
                    self.store.check_writes(self._size)
            else:
                self.store.check_in_place()
        except StoreReplaced as error:
            self.health.failed("index", error)
        except Exception as error:
            self._not_renewed.note(f"the store does not work: {kinds(error)}")


def _dropped(session: Session) -> Conflict:
    code = FORGOTTEN if session.forgotten else None
    return Conflict("nothing was stored: the user was forgotten meanwhile, or opened anew", code=code)
