"""Users who are served: their slots in the pool, their leases on the store, and the writing of what they learnt.

Learning must not wait for a disk, so a thread of its own writes. A user's newest state is written; states that were
replaced before their turn are skipped. What was learnt is *stored* once its version is acknowledged by the store, and
`Session.stored` says up to which update that is so.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ttt.per_user.pool import Pool
from ttt.serve.errors import Conflict, NotFound, Unavailable
from ttt.store import LeaseHeld, StaleLease, Store, StoreError, UnknownUser, UnknownVersion
from ttt.store.lease import Lease

log = logging.getLogger("ttt.serve")
State = dict[str, Tensor]
_RETRY = 0.5  # seconds between attempts to write to a store that fails


@dataclasses.dataclass
class Session:
    """A user who has a slot.

    Attributes:
        user: their id.
        lease: the right to write their versions; None if the user can only be read.
        read_only: why nothing can be learnt; empty if it can.
        updates: rises with every change of the user's weights while the user has a slot. What the weights
            computed may be kept under the user's id and this number.
        tokens: number of tokens learnt so far.
        stored: value of ``updates`` in the newest version that the store has acknowledged.
        version: the number of that version; None if there is none.
        opened: when, by `time.monotonic`.
        writes: one for each update that is to be stored.
        left: set once the lease was given up.
    """

    user: str
    lease: Lease | None
    read_only: str = ""
    updates: int = 0
    tokens: int = 0
    stored: int = 0
    version: int | None = None
    opened: float = dataclasses.field(default_factory=time.monotonic)
    writes: list[concurrent.futures.Future[int]] = dataclasses.field(default_factory=list)
    left: threading.Event = dataclasses.field(default_factory=threading.Event)


@dataclasses.dataclass(frozen=True)
class Fetched:
    """What `Sessions.fetch` has read: a session that is not yet in a slot, and its state; None for a new user."""

    session: Session
    state: State | None


class Sessions:
    """Keeps the users of one ``pool`` in step with a ``store``.

    `fetch`, `rolled_back` and `erase` wait for the store, and may be called from any thread. All other methods are for
    the thread that uses the pool.

    Args:
        pool: of the model's users. Its hooks are not used: the caller makes room with `evict`.
        store: keeps versions.
        model: a short name of the model's weights, kept with each version: a user of another model is refused.
        lease_seconds: of a lease, which is renewed while the user has a slot. If this process is killed, others can
            write for the user after that time.
        most_unsaved: largest number of updates of a user that the store has not acknowledged; see `has_room`.
        on_stored: called in the writer's thread after each write with its seconds.
    """

    def __init__(
        self,
        pool: Pool,
        store: Store,
        model: str,
        *,
        lease_seconds: float = 30.0,
        most_unsaved: int = 8,
        on_stored: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.pool, self.store, self.model = pool, store, model
        self.lease_seconds, self.most_unsaved, self.on_stored = lease_seconds, most_unsaved, on_stored
        self._sessions: OrderedDict[str, Session] = OrderedDict()  # in the order in which they were last used
        self._writer = _Writer(self)

    # -- opening ----------------------------------------------------------------------------------------------------

    def fetch(self, user: str) -> Fetched:
        """Take the lease of ``user`` and read their newest version; without the lease, for reading only.

        Raises:
            Conflict: if the version is of another model. Unavailable: if the store failed.
        """
        leaving = self._writer.leaving.get(user)
        if leaving is not None:  # the user was evicted a moment ago: the lease may still be ours
            leaving.left.wait(self.lease_seconds)
        try:
            lease, why = self.store.lease(user, self.lease_seconds), ""
        except LeaseHeld:
            lease, why = None, "another server holds the lease of this user, and is the one that learns"
        except StoreError as error:
            raise Unavailable(f"the store is out of reach: {error}") from error
        try:
            return self._read(user, lease, why)
        except BaseException:
            if lease is not None:
                with contextlib.suppress(StoreError):
                    lease.release()
            raise

    def _read(self, user: str, lease: Lease | None, why: str = "") -> Fetched:
        session = Session(user, lease, why)
        try:
            found = self.store.get(user)
        except UnknownUser:
            return Fetched(session, None)
        except StoreError as error:
            raise Unavailable(f"the store cannot serve this user: {error}") from error
        if (of := found.meta.get("model", self.model)) != self.model:
            raise Conflict(f"this user's weights are of another model: {of!r:.80}, and {self.model!r} is served")
        session.updates = session.stored = int(found.meta.get("updates", found.version))
        session.tokens, session.version = int(found.meta.get("tokens", 0)), found.version
        return Fetched(session, found.tensors)

    def install(self, fetched: Fetched) -> Session:
        """Give the user of ``fetched`` a slot with their state; a slot must be free, or theirs already.

        Raises:
            Conflict: if the state does not fit the model's layers; the lease is released then.
        """
        session = fetched.session
        before = self._sessions.get(session.user)
        try:
            if fetched.state is not None:
                self.pool.load(session.user, fetched.state)
            else:
                if session.user in self.pool.users:
                    self.pool.forget(session.user)
                self.pool.open(session.user)
        except (ValueError, TypeError) as error:
            self._writer.release(session)
            raise Conflict(f"this user's weights do not fit the model that is served: {error}") from error
        if before is not None:
            session.updates = max(session.updates, before.updates + 1)  # never falls while the user has a slot
            session.stored = session.updates
        self._sessions[session.user] = session
        self._sessions.move_to_end(session.user)
        return session

    def discard(self, fetched: Fetched) -> None:
        """Release the lease of a user who was fetched and is not to be installed."""
        self._writer.release(fetched.session)

    def get(self, user: str) -> Session | None:
        """The session of a user who has a slot, or None."""
        return self._sessions.get(user)

    def use(self, user: str) -> Session:
        """The session of a user who has a slot, who counts as used now. Raises KeyError if there is none."""
        self._sessions.move_to_end(user)
        return self._sessions[user]

    @property
    def users(self) -> tuple[str, ...]:
        """The users with a slot, in the order in which they were last used."""
        return tuple(self._sessions)

    # -- learning ---------------------------------------------------------------------------------------------------

    def require_writable(self, user: str) -> Session:
        """The session of ``user``. Raises Conflict if nothing can be learnt from this user here."""
        session = self._sessions[user]
        if session.lease is None:
            raise Conflict(f"nothing was learnt: {session.read_only}", code="read_only")
        return session

    def has_room(self, user: str) -> bool:
        """Whether fewer than ``most_unsaved`` updates of ``user`` wait to be stored."""
        session = self._sessions[user]
        return session.updates - session.stored < self.most_unsaved

    def learnt(self, user: str, tokens: int) -> concurrent.futures.Future[int]:
        """Count an update of ``user``, whose weights have learnt ``tokens`` tokens, and have it written.

        Returns:
            The number of the version, once it or a later state of the user is stored.
        """
        session = self.require_writable(user)
        session.updates += 1
        session.tokens += tokens
        meta = {"updates": session.updates, "tokens": session.tokens, "model": self.model}
        future = self._writer.write(session, self.pool.export(user), meta)
        session.writes = [each for each in session.writes if not each.done()] + [future]
        return future

    def oldest_write(self, user: str) -> concurrent.futures.Future[int] | None:
        """Of the updates of ``user`` that are to be stored, the first one; None if there is none."""
        return next((each for each in self._sessions[user].writes if not each.done()), None)

    def saved(self, user: str) -> bool:
        """Whether the store has everything that ``user`` has learnt."""
        session = self._sessions[user]
        return session.stored >= session.updates

    def lost(self) -> list[str]:
        """Users whose lease was taken over, so that what they learnt last was refused; they must be opened again."""
        return [user for user, session in self._sessions.items() if session.lease is None and not self.saved(user)]

    # -- leaving ----------------------------------------------------------------------------------------------------

    def evict(self, user: str) -> None:
        """Free the slot of a user of whom everything is stored, and release the lease soon."""
        assert self.saved(user) or self._sessions[user].lease is None
        session = self._sessions.pop(user)
        self.pool.forget(user)
        self._writer.release(session)

    def rolled_back(self, session: Session, version: int) -> Fetched:
        """Make ``version`` of a user the newest in the store, and read it. `install` puts it in effect.

        Raises:
            NotFound: if there is no such version. Unavailable: if the store failed. Conflict: without the lease.
        """
        if session.lease is None:
            raise Conflict(f"nothing was rolled back: {session.read_only}", code="read_only")
        try:
            self.store.rollback(session.user, version, lease=session.lease)
        except (UnknownUser, UnknownVersion) as error:
            raise NotFound(str(error), param="version") from None
        except StaleLease as error:
            raise Conflict(f"nothing was rolled back: {error}", code="read_only") from error
        except StoreError as error:
            raise Unavailable(f"nothing was rolled back: {error}") from error
        return self._read(session.user, session.lease)

    def erase(self, user: str) -> None:
        """Remove everything that the store has of ``user``, for good; for a user whose slot was freed by `drop`.

        Raises:
            Unavailable: if something could not be removed yet.
        """
        try:
            self.store.forget(user)
        except UnknownUser:
            pass
        except StoreError as error:
            raise Unavailable(f"not everything could be removed yet, ask again: {error}") from error

    def drop(self, user: str) -> None:
        """Free the slot of ``user``, if there is one, without storing anything; what waits to be written is dropped."""
        session = self._sessions.pop(user, None)
        if session is not None:
            self.pool.forget(user)
            self._writer.drop(session)

    def close(self, timeout: float | None = None) -> list[str]:
        """Store what waits to be stored, release all leases and end the writer: users of whom something is unsaved.

        Args:
            timeout: seconds to wait for the store; None for as long as it takes.
        """
        self._writer.close(list(self._sessions.values()), timeout)
        return [user for user, session in self._sessions.items() if session.stored < session.updates]


@dataclasses.dataclass
class _Waiting:
    """The newest state of a user that is not yet stored, and who waits for it."""

    session: Session
    state: State
    meta: dict[str, Any]
    futures: list[concurrent.futures.Future[int]]


class _Writer:
    """The thread that writes states, and renews and releases leases."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions
        self._changed = threading.Condition()
        self._waiting: OrderedDict[str, _Waiting] = OrderedDict()
        self._writing: _Waiting | None = None
        self.leaving: dict[str, Session] = {}  # by user, whose leases are to be released; the latest of each
        self._released: list[Session] = []
        self._renewed = time.monotonic()
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="ttt-store", daemon=True)
        self._thread.start()

    def write(self, session: Session, state: State, meta: dict[str, Any]) -> concurrent.futures.Future[int]:
        future: concurrent.futures.Future[int] = concurrent.futures.Future()
        with self._changed:
            older = self._waiting.get(session.user)
            futures = [*(older.futures if older is not None else []), future]
            self._waiting[session.user] = _Waiting(session, state, meta, futures)
            self._changed.notify()
        return future

    def drop(self, session: Session) -> None:
        """Forget what waits to be written of a user, and wait for a write that is going on."""
        with self._changed:
            waiting = self._waiting.pop(session.user, None)
            while self._writing is not None and self._writing.session is session:
                self._changed.wait()
            waiting = self._waiting.pop(session.user, waiting)
            self._leave(session)
        for future in [] if waiting is None else waiting.futures:
            future.set_exception(Conflict("nothing was stored: the user was forgotten meanwhile"))

    def release(self, session: Session) -> None:
        with self._changed:
            self._leave(session)

    def _leave(self, session: Session) -> None:
        self.leaving[session.user] = session
        self._released.append(session)
        self._changed.notify()

    def close(self, sessions: list[Session], timeout: float | None) -> None:
        with self._changed:
            for session in sessions:
                self._leave(session)
            self._stop = True
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._waiting and not self._released and not self._stop:
                    self._changed.wait(self.sessions.lease_seconds / 4)
                work = next(iter(self._waiting.values()), None)
                if work is not None:
                    del self._waiting[work.session.user]
                    self._writing = work
                busy = set(self._waiting) | ({work.session.user} if work is not None else set())
                released = [session for session in self._released if session.user not in busy]
                self._released = [session for session in self._released if session.user in busy]
                if work is None and not released and self._stop:
                    return
            try:
                if work is not None:
                    self._put(work)
            finally:
                with self._changed:
                    self._writing = None
                    self._changed.notify_all()
            self._release(released)
            self._renew()

    def _put(self, work: _Waiting) -> None:
        """Write, and tell those who wait. If the store fails, the state waits again, unless there is a newer one."""
        session, lease = work.session, work.session.lease
        began = time.perf_counter()
        try:
            if lease is None:
                raise StaleLease(session.read_only or "the lease was lost")
            version = self.sessions.store.put(lease, work.state, work.meta)
        except StaleLease as error:
            session.lease, session.read_only = None, f"another server has taken over this user ({error})"
            failure = Conflict(f"what was learnt was not stored: {session.read_only}", code="read_only")
            for future in work.futures:
                future.set_exception(failure)
        except Exception as error:  # whatever it was, the writer goes on
            log.warning("a version could not be stored; trying again: %s", type(error).__name__)
            with self._changed:
                newer = self._waiting.get(session.user)
                if newer is not None:
                    newer.futures[:0] = work.futures
                elif not self._stop:
                    self._waiting[session.user] = work
                else:
                    for future in work.futures:
                        future.set_exception(Unavailable(f"what was learnt was not stored: {error}"))
                self._changed.wait(_RETRY)
        else:
            session.version = version
            session.stored = max(session.stored, int(work.meta["updates"]))
            self.sessions.on_stored(time.perf_counter() - began)
            for future in work.futures:
                future.set_result(version)

    def _release(self, sessions: list[Session]) -> None:
        for session in sessions:
            if session.lease is not None:
                with contextlib.suppress(Exception):  # it expires by itself
                    session.lease.release()
            session.left.set()
            with self._changed:
                if self.leaving.get(session.user) is session:
                    del self.leaving[session.user]

    def _renew(self) -> None:
        """Extend the leases of all users with a slot, a few times in the time of a lease."""
        if time.monotonic() - self._renewed < self.sessions.lease_seconds / 4:
            return
        self._renewed = time.monotonic()
        for session in list(self.sessions._sessions.values()):
            if session.lease is None:
                continue
            try:
                session.lease.renew(self.sessions.lease_seconds)
            except StaleLease as error:
                session.lease, session.read_only = None, f"another server has taken over this user ({error})"
            except Exception as error:  # the store may be back before the lease ends
                log.warning("a lease could not be renewed: %s", type(error).__name__)
