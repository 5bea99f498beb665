"""`Store`: versions of users' states that survive crashes, roll back and can be forgotten."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import random
import time
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torch import Tensor

from ttt.checks import check_number, check_whole
from ttt.store.blobs import Blobs, new_key
from ttt.store.errors import (
    CommitUncertain,
    DamagedState,
    DamagedStateWarning,
    LeaseHeld,
    StaleLease,
    StorageFailure,
)
from ttt.store.fetch import Damage, fetch
from ttt.store.index import Grant, Index, User, Version
from ttt.store.state import encode
from ttt.store.upkeep import Collected, Report, collect, forget, verify
from ttt.store.urls import open_url

USER_BYTES = 512
"""The longest user id, in UTF-8."""


@dataclasses.dataclass(frozen=True)
class State:
    """What `Store.get` returns.

    Attributes:
        user, version: whose it is, and which.
        tensors: as they were put, on the CPU.
        meta: the JSON that was put with them.
        created: seconds since 1970.
        damaged: (version, why) of newer versions that could not be served; empty if all is well.
    """

    user: str
    version: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    created: float
    damaged: tuple[tuple[int, str], ...] = ()


class Lease:
    """The right to write one user's versions. A context manager that gives it back.

    What makes two writers impossible is ``token``: each lease of the store has a greater one than all before it, and
    a version is committed in the transaction that finds its lease's token to be the latest. Expiry only decides when
    another may take over; a lease that expired and was not taken over still writes.
    """

    def __init__(self, store: Store, grant: Grant, seconds: float) -> None:
        self._store, self._seconds = store, seconds
        self._grant: Grant | None = grant
        self.user, self.token = grant.user, grant.token

    @property
    def expires(self) -> float:
        """When others may take over: seconds since 1970, by the index's clock. `StaleLease` once released."""
        return self.grant.expires

    @property
    def grant(self) -> Grant:
        """What the index knows it by. `StaleLease` once released."""
        if self._grant is None:
            raise StaleLease(f"the lease on {self.user!r} (token {self.token}) was released")
        return self._grant

    def renew(self, seconds: float | None = None) -> None:
        """Hold it for ``seconds`` from now (default: as long as when it was taken). `put` does so, too.

        Raises:
            StaleLease: if it was released, or another has taken over.
        """
        seconds = self._seconds if seconds is None else check_number("seconds", seconds, 0, above=True)
        self._grant = self._store.index.extend(self.grant, seconds)

    def release(self) -> None:
        """Give it back; does nothing if that was done before, or another has taken over."""
        if self._grant is not None:
            with contextlib.suppress(StaleLease):
                self._store.index.extend(self._grant, 0)
            self._grant = None

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        # It expires by itself: a failure to release must not hide the error that leaves the block.
        with contextlib.suppress(*(() if error is None else (StorageFailure, CommitUncertain))):
            self.release()


class Store:
    """Per-user states, each version immutable, checksummed and flushed to the disk before it is acknowledged.

    A state is a dict of tensors with a little JSON. Its bytes, a safetensors file, are a blob; the index names it, and
    the index's commit is what makes it a version. A crash at any moment leaves the last acknowledged version, and at
    most a blob that nobody names, which `gc` removes. Safe for threads, processes and forks.

    Args:
        url: where. One of

            - a path or ``file:///path``: a folder with ``index.db`` (SQLite) and ``blobs``;
            - ``sqlite:///index.db?blobs=URL``: the index in that file (relative; absolute with four slashes, as
              ``sqlite:////var/index.db``), the blobs in a folder (``file:///path`` or a path) or on any fsspec target
              (``s3://bucket/prefix``); without ``blobs``, in the folder ``blobs`` beside the index;
            - ``postgresql://user@host/database?blobs=URL``: the index in PostgreSQL; blobs must be named. More
              parameters go to libpq.
        timeout: seconds to wait for another process's transaction.

    Raises:
        ValueError: if ``url`` is none of these.
        StorageFailure: if the index cannot be opened.
        ImportError: if the URL needs a package that is not installed.
    """

    def __init__(self, url: str, timeout: float = 30.0) -> None:
        self.index: Index
        self.blobs: Blobs
        self.index, self.blobs = open_url(str(url), check_number("timeout", timeout, 0, above=True))

    # -- writing ----------------------------------------------------------------------------------------------

    def lease(self, user: str, seconds: float = 30, *, wait: float = 0, steal: bool = False) -> Lease:
        """The right to write ``user``'s versions, for ``seconds`` unless renewed.

        Times are the index's: the machine's clock with SQLite, the server's with PostgreSQL. They serve progress only.

        Args:
            user: any text of 1 to 512 bytes in UTF-8, without NUL. It is never part of a path.
            wait: seconds to wait for another's lease to end.
            steal: take it over from a live holder, whose next write then raises `StaleLease`.

        Raises:
            LeaseHeld: if another holds it still.
            ValueError, StorageFailure
        """
        _check_user(user)
        check_number("seconds", seconds, 0, above=True)
        deadline = time.monotonic() + check_number("wait", wait, 0)
        while True:
            try:
                return Lease(self, self.index.acquire(user, seconds, steal), seconds)
            except LeaseHeld:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(random.uniform(0.005, 0.05))

    def put(self, lease: Lease, tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> int:
        """Store a state; on return it is on the disk. The lease is extended.

        Args:
            tensors: name -> tensor, of any dtype that safetensors knows.
            meta: a dict of JSON, 64 KiB at most.

        Returns:
            Its version: one more than the last.

        Raises:
            StaleLease: if the lease is no longer the latest; nothing was written.
            StorageFailure: if disk, network or database failed; nothing was written.
            CommitUncertain: if the database failed in the commit itself.
            ValueError: if ``tensors`` or ``meta`` cannot be stored.
        """
        grant, data = lease.grant, encode(tensors, meta)
        key = new_key(grant.shelf)
        blob = key, len(data), hashlib.sha256(data).hexdigest()
        try:
            try:
                self.blobs.write(key, data)
                return self._commit(lease, blob)
            except OSError as error:
                raise StorageFailure(f"the state of {lease.user!r} could not be written: {error}") from error
        except (StaleLease, StorageFailure):
            # Raised before the commit only. After any other, an interrupt say, the version may stand and need its blob.
            with contextlib.suppress(OSError):  # what cannot be removed now is garbage
                self.blobs.remove(key)
            raise

    def rollback(self, user: str, version: int, *, lease: Lease | None = None) -> int:
        """Make a new version that is ``version``, bit for bit. Those in between stay.

        Args:
            lease: of this user; without, one is taken for the while.

        Returns:
            The new version's number.

        Raises:
            UnknownUser, UnknownVersion, LeaseHeld, StaleLease, StorageFailure
            DamagedState: if that version's blob is damaged.
        """
        if lease is not None and lease.user != user:
            raise ValueError(f"lease must be one of {user!r}, got one of {lease.user!r}")
        if lease is None:
            self.index.find(user, version)  # a lease would make a row for a user that is unknown
            with self.lease(user) as lease:
                return self.rollback(user, version, lease=lease)
        found = self.index.find(user, version)
        try:
            fetch(self.blobs, found)
        except Damage as error:
            raise DamagedState(f"version {version} of {user!r} is damaged: {error}") from error
        return self._commit(lease, (found.key, found.size, found.sha256), source=found.number)

    def _commit(self, lease: Lease, blob: tuple[str, int, str], source: int | None = None) -> int:
        key, size, _ = blob
        version, lease._grant = self.index.commit(
            lease.grant, lease._seconds, blob, lambda: self.blobs.size(key) == size, source
        )
        return version

    # -- reading ----------------------------------------------------------------------------------------------

    def get(self, user: str, version: int | None = None, *, strict: bool = False) -> State:
        """A user's state.

        Where the newest version's blob is missing, torn or altered, the last good version is served, with a
        `DamagedStateWarning`, and `State.damaged` says what happened. A target that is out of reach is no damage:
        such errors are raised.

        Args:
            version: one version, served or refused; the newest by default.
            strict: refuse where the newest is damaged.

        Raises:
            UnknownUser, UnknownVersion
            DamagedState: if ``version``, or with ``strict`` the newest, or each of them, is damaged.
            StorageFailure: if index or target cannot be read.
        """
        damaged: list[tuple[int, str]] = []
        found: Version | None = self.index.find(user, version)
        while found is not None:
            try:
                tensors, meta = fetch(self.blobs, found)
            except Damage as damage:
                kept = self.index.versions(user)
                if found not in kept:  # retention dropped it while it was read
                    damaged, found = [], self.index.find(user, version)
                    continue
                damaged.append((found.number, str(damage)))
                lower = [v for v in kept if v.number < damaged[-1][0]]
                found = lower[0] if lower and not strict and version is None else None
            else:
                if damaged:
                    lost = f"version {damaged[0][0]} of {user!r} is damaged: {damaged[0][1]}"
                    warnings.warn(f"{lost}; version {found.number} is served", DamagedStateWarning, stacklevel=2)
                return State(user, found.number, tensors, meta, found.created, tuple(damaged))
        why = "; ".join(f"version {number}: {reason}" for number, reason in damaged)
        raise DamagedState(f"no sound state of {user!r} can be served; {why}")

    def history(self, user: str) -> list[Version]:
        """The versions that are kept, newest first. Raises `UnknownUser`."""
        return self.index.versions(user)

    def users(self) -> list[User]:
        """All users, by id."""
        return self.index.users()

    # -- upkeep -----------------------------------------------------------------------------------------------

    def gc(self, *, keep_last: int = 10, keep_days: float = 7, grace: float = 3600) -> Collected:
        """Drop versions past retention, and remove blobs that no version names. Others may read and write meanwhile.

        Args:
            keep_last: a user's newest versions, kept at any age; at least 1.
            keep_days: versions younger than this are kept, too.
            grace: seconds that an unnamed blob stays, for who is reading it. A write that takes longer than that is
                refused at its commit, not lost. Files of forgotten users have no grace.

        Raises:
            StorageFailure
        """
        check_whole("keep_last", keep_last, 1)
        check_number("keep_days", keep_days, 0)
        check_number("grace", grace, 0)
        with _target_failures():
            return collect(self.index, self.blobs, keep_last, 86400 * keep_days, grace)

    def forget(self, user: str) -> None:
        """Remove a user for good: id, versions, blobs, also those of interrupted writes. Leases become stale.

        The database is rewritten and its log emptied, so that no byte stays in the files of a store in a folder (with
        SQLite). Beyond them the store cannot reach: sectors of the disk, backups, old versions of a bucket's objects,
        the log of a PostgreSQL server. Interrupted by a crash or an error, it is completed by another call or by `gc`.
        A later `put` begins again at version 1.

        Raises:
            UnknownUser: if the store holds nothing of the user (what an interrupted call left is removed all the same).
            StorageFailure: if something could not be removed yet; call again.
        """
        with _target_failures():
            forget(self.index, self.blobs, user)

    def verify(self) -> Report:
        """Read every blob, check its checksum and that it parses, and list files that no version names.

        Raises:
            StorageFailure: if index or target cannot be read.
        """
        with _target_failures():
            return verify(self.index, self.blobs)

    def close(self) -> None:
        """Close the index's connection."""
        self.index.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


@contextlib.contextmanager
def _target_failures():
    try:
        yield
    except OSError as error:
        raise StorageFailure(f"the blobs are out of reach: {error}") from error


def _check_user(user: str) -> None:
    if not isinstance(user, str):
        raise ValueError(f"user must be a string, got {user!r:.200}")
    try:
        size = len(user.encode())
    except UnicodeEncodeError:
        raise ValueError(f"user must be text that UTF-8 can hold, got {user!r:.200}") from None
    if not 1 <= size <= USER_BYTES or "\0" in user:
        raise ValueError(f"user must take 1 to {USER_BYTES} bytes without NUL, got {user!r:.200} ({size} bytes)")
