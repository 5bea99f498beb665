"""Users who are served: their slots in the pool, their leases on the store, and the writing of what they learnt.

Learning must not wait for a disk, so `ttt.serve.writer.Writer` writes in a thread of its own. What was learnt is
*stored* once its version is acknowledged by the store, and `Session.stored` says up to which update that is so.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
import time
from collections import OrderedDict
from collections.abc import Callable

from ttt.per_user.pool import Pool
from ttt.serve.errors import Conflict, NotFound, NotStored, Unavailable, kinds
from ttt.serve.session import Session, State
from ttt.serve.state_reader import StatePool
from ttt.serve.store_health import REPLACED, Stalled, StoreHealth, was_replaced
from ttt.serve.writer import Writer
from ttt.store import DamagedState, LeaseHeld, StaleLease, Store, StoreError, UnknownUser, UnknownVersion
from ttt.store import State as StoredState
from ttt.store.lease import Lease

log = logging.getLogger("ttt.serve")
LEARNT, STUDIED, ROLLED_BACK = "nothing was learnt", "nothing was studied", "nothing was rolled back"
"""What errors say of work that was not done."""
_LEAVE = 5.0  # seconds that `Sessions.erase` waits for a write to end


@dataclasses.dataclass(frozen=True)
class Fetched:
    """What `Sessions.fetch` has read: a session that is not yet in a slot, and its state; None for a new user."""

    session: Session
    state: State | None


class Sessions:
    """Keeps the users of one ``pool`` in step with a ``store``.

    `fetch`, `give_back`, `read_version`, `rolled_back` and `erase` wait for the store, and may be called from any
    thread. All other methods are for the thread that uses the pool.

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
        pool: Pool | StatePool,
        store: Store,
        model: str,
        *,
        lease_seconds: float = 30.0,
        most_unsaved: int = 8,
        on_stored: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.pool, self.store, self.model = pool, store, model
        self.lease_seconds, self.most_unsaved = lease_seconds, most_unsaved
        self._sessions: OrderedDict[str, Session] = OrderedDict()  # in the order in which they were last used
        self._writer = Writer(store, lambda: list(self._sessions.values()), lease_seconds, on_stored)

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
            with self.health.watched("index"):
                lease = self.store.lease(user, self.lease_seconds)
            why = ""
        except LeaseHeld:
            lease, why = None, "another server holds the lease of this user, and is the one that learns"
        except StoreError as error:
            raise unavailable("the store is out of reach", error) from error
        try:
            return self._newest(user, lease, why)
        except BaseException:
            if lease is not None:
                with contextlib.suppress(StoreError):
                    lease.release()
            raise

    def _newest(self, user: str, lease: Lease | None, why: str) -> Fetched:
        try:
            found = self.store.get(user)
        except UnknownUser:
            return Fetched(Session(user, lease, why), None)
        except StoreError as error:
            raise unavailable("the store cannot serve this user", error) from error
        self._check_model(found)
        return _fetched(found, Session(user, lease, why), found.version)

    def _check_model(self, found: StoredState) -> None:
        if (of := found.meta.get("model", self.model)) != self.model:
            raise Conflict(f"this user's weights are of another model: {of!r:.80}, and {self.model!r} is served")

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
            session.trips = before.trips
        self._sessions[session.user] = session
        self._sessions.move_to_end(session.user)
        return session

    def discard(self, fetched: Fetched) -> None:
        """Release the lease of a user who was fetched and is not to be installed."""
        self._writer.release(fetched.session)

    def give_back(self, fetched: Fetched) -> None:
        """`discard`, in the thread that calls it, which waits for the store; also after `close`."""
        self._writer.release_now(fetched.session)

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

    def require_writable(self, user: str, what: str = LEARNT) -> Session:
        """The session of ``user``. Raises Conflict if nothing can be written for this user here.

        Args:
            what: says what was not done.
        """
        session = self._sessions[user]
        if session.lease is None:
            raise Conflict(f"{what}: {session.read_only}", code="read_only")
        return session

    def has_room(self, user: str, promised: int = 0) -> bool:
        """Whether fewer than ``most_unsaved`` updates of ``user`` wait to be stored, with so many that are to come."""
        session = self._sessions[user]
        return session.updates - session.stored + promised < self.most_unsaved

    def waits_for_store(self, user: str) -> float:
        """Seconds since the store acknowledged an update of ``user``, where others wait for that; else 0."""
        session = self._sessions[user]
        return 0.0 if self.saved(user) else time.monotonic() - session.owed_since

    @property
    def health(self) -> StoreHealth:
        """Whether the store takes what is written."""
        return self._writer.health

    def not_stored(self, user: str, seconds: float) -> NotStored | None:
        """The error of what ``user`` has learnt, if the store has not taken it for so many ``seconds``; else None."""
        if (stalled := self.health.stalled(seconds)) is not None:
            return stalled.not_stored()
        session = self._sessions.get(user)
        since = session.put_failed_since if session is not None else None
        if since is not None and self.health.took_since(since):  # what other users have learnt
            return Stalled(seconds, "a version of this user cannot be written", False).not_stored()
        return None

    @property
    def alive(self) -> bool:
        """Whether what is learnt is stored, and leases are renewed."""
        return self._writer.alive

    def learnt(self, user: str, tokens: int) -> concurrent.futures.Future[int]:
        """Count an update of ``user``, whose weights have learnt ``tokens`` tokens, and have it written.

        Returns:
            The number of the version, once it or a later state of the user is stored.
        """
        session = self.require_writable(user)
        if self.saved(user):
            session.owed_since = time.monotonic()
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

    def read_version(self, session: Session, version: int) -> StoredState:
        """Read ``version`` of a user from the store, to go back to it with `rolled_back`.

        Raises:
            NotFound: if there is no such version. Unavailable: if the store failed. Conflict: without the lease, and if
                the version is damaged or of another model.
        """
        if session.lease is None:
            raise Conflict(f"{ROLLED_BACK}: {session.read_only}", code="read_only")
        try:
            found = self.store.get(session.user, version, strict=True)
        except (UnknownUser, UnknownVersion):
            raise NotFound(f"user {session.user!r} has no version {version}", param="version") from None
        except DamagedState as error:
            log.warning("a version is damaged: %s", kinds(error))
            raise Conflict(f"{ROLLED_BACK}: version {version} is damaged", code="damaged") from error
        except StoreError as error:
            raise unavailable(f"{ROLLED_BACK}: the store cannot serve this user", error) from error
        self._check_model(found)
        return found

    def rolled_back(self, session: Session, target: StoredState) -> Fetched:
        """Make ``target``, from `read_version`, the user's newest version in the store. `install` puts it in effect.

        If it raises, the store may have gone back or not, and the user is to be opened again, after `drop`.

        Raises:
            Unavailable: if the store failed. Conflict: if the lease was lost.
        """
        lease = session.lease
        try:
            if lease is None:
                raise StaleLease(session.read_only)
            with self.health.watched("index"):
                number = self.store.rollback(session.user, target.version, lease=lease)
        except StaleLease as error:
            session.lose()
            raise Conflict(f"{ROLLED_BACK}: {session.read_only}", code="read_only") from error
        except StoreError as error:
            raise unavailable("it is not known whether the user was rolled back", error) from error
        return _fetched(target, Session(session.user, lease), number)

    def erase(self, user: str) -> None:
        """Remove everything that the store has of ``user``, for good; for a user whose slot was freed by `drop`.

        Raises:
            Unavailable: if something could not be removed yet.
        """
        leaving = self._writer.leaving.get(user)
        if leaving is not None:
            # A write that is going on then leaves nothing behind. If it takes longer, its commit is refused.
            leaving.left.wait(_LEAVE)
        try:
            self.store.forget(user)
        except UnknownUser:
            pass
        except StoreError as error:
            raise unavailable("not everything could be removed yet", error) from error

    def drop(self, user: str, *, forgotten: bool = False) -> None:
        """Free the slot of ``user``, if there is one, without storing anything; what waits to be written is dropped.

        Does not wait: a write that is going on ends by itself.

        Args:
            forgotten: whether the user is being forgotten.
        """
        session = self._sessions.pop(user, None)
        if session is not None:
            self.pool.forget(user)
            session.forgotten = forgotten
            self._writer.drop(session)

    def close(self, timeout: float | None = None) -> list[str]:
        """Store what waits to be stored, release all leases and end the writer: users of whom something is unsaved.

        Args:
            timeout: seconds to wait for the store; None for as long as it takes. Of several calls, also at the same
                time, none waits longer than until the earliest of their ends.
        """
        self._writer.close(list(self._sessions.values()), timeout)
        return [user for user, session in self._sessions.items() if session.stored < session.updates]


def unavailable(what: str, error: Exception) -> Unavailable:
    """The error that a client sees when the store fails; what kind of failure it was is in the log."""
    log.warning("%s: %s", what, kinds(error))
    if was_replaced(error):
        return Unavailable(f"{what}: {REPLACED}", code="store")
    return Unavailable(f"{what}; try again later", retry_after=5)


def _fetched(found: StoredState, session: Session, version: int) -> Fetched:
    session.updates = session.stored = int(found.meta.get("updates", found.version))
    session.tokens, session.version = int(found.meta.get("tokens", 0)), version
    return Fetched(session, found.tensors)
