"""`Store`: versions of users' states that survive crashes, roll back and can be forgotten."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import random
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ttt.checks import check_bool, check_number, check_type, check_whole
from ttt.store.blobs import Blobs, new_folder_name, new_key
from ttt.store.errors import (
    DamagedState,
    DamagedStateWarning,
    LeaseHeld,
    StaleLease,
    StorageFailure,
    blobs_failure,
)
from ttt.store.index import Index
from ttt.store.lease import Lease
from ttt.store.maintenance import Collected, collect, forget
from ttt.store.records import User, Version
from ttt.store.serialization import encode
from ttt.store.urls import FORMS, open_url, without_password
from ttt.store.verification import Damage, Report, read_version, verify
from ttt.user_name import check_user_name

_PROBE_BYTES = 1 << 16  # of the file that `Store.check_writes` writes: a block or two would fit on a disk that is full


@dataclasses.dataclass(frozen=True)
class State:
    """A version of a user's state, as `Store.get` returns it.

    Attributes:
        user, version: the user's id, and the version's number.
        tensors: name -> tensor, with the dtype, shape and bits that were put, on the CPU.
        meta: the JSON that was put with them.
        created: seconds since 1970.
        damaged: (version, reason) of newer versions that could not be served; empty if the newest was served.
    """

    user: str
    version: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    created: float
    damaged: tuple[tuple[int, str], ...] = ()


class Store:
    """Versions of users' states, each immutable, checksummed and flushed to the disk before it is acknowledged.

    A state is a dict of tensors with a little JSON. Its bytes, a safetensors file, are a blob; the index names it, and
    the index's commit is what makes it a version. A crash at any moment leaves the last acknowledged version, and at
    most a blob that no version names, which `gc` removes. Safe for threads, processes and forks.

    Once the files of a store in folders are removed or replaced while it is open, reading and writing raise
    `StoreReplaced`, a `StorageFailure`, until they are back. The processes that have a store open must be of one
    release.

    Args:
        url: one of

            - a path or ``file:///path``: a folder with ``index.db`` (SQLite) and ``blobs``;
            - ``sqlite:///index.db?blobs=URL``: the index in that file (relative; absolute with four slashes, as
              ``sqlite:////var/index.db``), the blobs in a folder (``file:///path`` or a path) or on any fsspec target
              (``s3://bucket/prefix``); without ``blobs``, in the folder ``blobs`` beside the index;
            - ``postgresql://user@host/database?blobs=URL``: the index in PostgreSQL; blobs must be named. More
              parameters go to libpq.
        timeout: seconds to wait for another process's transaction.
        create: make index and blobs if they do not exist; False refuses then, and creates nothing.

    Raises:
        TypeError: if ``url`` is neither a string nor a path, or ``create`` no bool.
        ValueError: if ``url`` is none of these.
        StorageFailure: if the index cannot be opened, or there is no store and ``create`` is False.
        ImportError: if the URL needs a package that is not installed.
    """

    def __init__(self, url: str | os.PathLike[str], timeout: float = 30.0, *, create: bool = True) -> None:
        check_type("url", url, (str, os.PathLike), FORMS)
        text = check_type("url", os.fspath(url), str, FORMS)  # a PathLike may give bytes
        check_number("timeout", timeout, 0, above=True)
        self.index: Index
        self.blobs: Blobs
        self.index, self.blobs = open_url(text, timeout, check_bool("create", create))
        self._name = without_password(text)

    @property
    def journal(self) -> str:
        """How the index makes its commits durable.

        ``"wal"``: the write-ahead log of SQLite; ``"delete"``: its rollback journal, on network file systems;
        ``"server"``: whatever the PostgreSQL server does. Raises `StorageFailure`.
        """
        return self.index.journal

    # -- writing ----------------------------------------------------------------------------------------------

    def lease(self, user: str, seconds: float = 30, *, wait: float = 0, steal: bool = False) -> Lease:
        """Take the right to write ``user``'s versions, for ``seconds`` unless renewed.

        Times are by the index's clock: the machine's with SQLite, the server's with PostgreSQL. They only decide when
        another holder may take over. If the clock is set back, a lease still ends within the time it was taken for.

        Args:
            user: any text of 1 to 512 bytes in UTF-8, without NUL. It is never part of a path.
            wait: seconds to wait for another holder's lease to end.
            steal: take over from a live holder, whose next write then raises `StaleLease`.

        Raises:
            LeaseHeld: if another's lease has not expired.
            TypeError, ValueError: if an argument is not as described.
            StorageFailure, CommitUncertain: if the index failed.
        """
        check_user_name(user)
        check_bool("steal", steal)
        check_number("seconds", seconds, 0, above=True)
        deadline = time.monotonic() + check_number("wait", wait, 0)
        while True:
            try:
                return Lease(self.index, self._name, self.index.acquire(user, seconds, steal), seconds)
            except LeaseHeld:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(random.uniform(0.005, 0.05))

    def put(self, lease: Lease, tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> int:
        """Store a state; on return it is on the disk. The lease is extended.

        Args:
            lease: of the user to write, taken from this store.
            tensors: name -> tensor, of any shape, device, and dtype that safetensors knows.
            meta: a dict of JSON, 64 KiB at most.

        Returns:
            The number of its version: one more than the last.

        Raises:
            StaleLease: if the lease is no longer the latest; nothing was written.
            StorageFailure: if disk, network or database failed; nothing was written.
            CommitUncertain: if the database failed during the commit.
            TypeError, ValueError: if ``tensors`` or ``meta`` cannot be stored, or ``lease`` is not one of this store.
        """
        check_type("lease", lease, Lease, "what Store.lease returns")
        grant = lease.grant
        lease.require_store(self.index, self._name)
        data = encode(tensors, meta)
        key = new_key(grant.folder)
        blob = key, len(data), hashlib.sha256(data).hexdigest()
        try:
            try:
                self.blobs.write(key, data)
                return self._commit(lease, blob)
            except OSError as error:
                raise blobs_failure(f"the state of {lease.user!r} could not be written", error) from error
        except (StaleLease, StorageFailure):
            # Raised before the commit only. After other errors, such as an interrupt, the version may need its blob.
            with contextlib.suppress(OSError):  # a blob that cannot be removed now is garbage
                self.blobs.remove(key)
            raise

    def rollback(self, user: str, version: int, *, lease: Lease | None = None) -> int:
        """Make a new version that equals ``version``, bit for bit. The versions in between remain.

        Args:
            lease: of this user; by default one is taken and released.

        Returns:
            The new version's number.

        Raises:
            UnknownUser, UnknownVersion: if there is no such version.
            DamagedState: if that version's blob is damaged.
            LeaseHeld, StaleLease, StorageFailure, CommitUncertain, TypeError, ValueError: as `lease` and `put`.
        """
        check_user_name(user)
        _check_version(version)
        if lease is not None:
            check_type("lease", lease, Lease, "what Store.lease returns, or None")
        if lease is not None and lease.user != user:
            raise ValueError(f"lease must be one of {user!r}, got one of {lease.user!r}")
        if lease is None:
            self.index.find(user, version)  # a lease would add an unknown user to the index
            with self.lease(user) as lease:
                return self.rollback(user, version, lease=lease)
        lease.require_store(self.index, self._name)
        found = self.index.find(user, version)
        try:
            read_version(self.blobs, found)
        except Damage as error:
            raise DamagedState(f"version {version} of {user!r} is damaged: {error}") from error
        return self._commit(lease, (found.key, found.size, found.sha256), source=found.number)

    def _commit(self, lease: Lease, blob: tuple[str, int, str], source: int | None = None) -> int:
        key, size, _ = blob
        while True:
            # A request to the target, made before the transaction: the index notices if garbage is collected between.
            if self.blobs.size(key) != size:
                raise StorageFailure(f"the blob of {lease.user!r} is gone or cut short; nothing was committed")
            if (version := lease.commit(blob, source)) is not None:
                return version

    # -- reading ----------------------------------------------------------------------------------------------

    def get(self, user: str, version: int | None = None, *, strict: bool = False) -> State:
        """Read a user's state.

        If the newest version's blob is missing, torn or altered, the last good version is served, with a
        `DamagedStateWarning`, and `State.damaged` says what happened. A target that is out of reach is not taken for
        damage: such errors are raised.

        Args:
            version: this version and no other; the newest by default.
            strict: raise `DamagedState` if the newest is damaged, instead of serving an older one.

        Raises:
            UnknownUser, UnknownVersion: if there is no such version.
            DamagedState: if ``version``, or with ``strict`` the newest, or each version, is damaged.
            StorageFailure: if index or target cannot be read.
            TypeError, ValueError: if an argument is of a wrong type, or ``user`` can be no user's id.
        """
        check_user_name(user)
        check_bool("strict", strict)
        if version is not None:
            _check_version(version)
        while True:
            state, damaged = self._first_sound(user, version, version is None and not strict)
            if not damaged or set(damaged) <= set(self.index.versions(user)):
                break
            # Otherwise garbage collection removed versions while they were read, which is not damage.
        reasons = tuple((v.number, reason) for v, reason in damaged.items())
        if state is None:
            why = "; ".join(f"version {number}: {reason}" for number, reason in reasons)
            raise DamagedState(f"no sound state of {user!r} can be served; {why}")
        if reasons:
            lost = f"version {reasons[0][0]} of {user!r} is damaged: {reasons[0][1]}"
            warnings.warn(f"{lost}; version {state.version} is served", DamagedStateWarning, stacklevel=2)
        return dataclasses.replace(state, damaged=reasons)

    def _first_sound(self, user: str, version: int | None, or_older: bool) -> tuple[State | None, dict[Version, str]]:
        """The state of a version, or of the newest sound one below it; and what is wrong with those before it."""
        damaged: dict[Version, str] = {}
        for found in self._candidates(user, version, or_older):
            try:
                tensors, meta = read_version(self.blobs, found)
            except Damage as damage:
                damaged[found] = str(damage)
            else:
                return State(user, found.number, tensors, meta, found.created), damaged
        return None, damaged

    def _candidates(self, user: str, version: int | None, or_older: bool) -> Iterator[Version]:
        """A version, by default the newest, then those below it if ``or_older``."""
        first = self.index.find(user, version)
        yield first
        if or_older:
            yield from (v for v in self.index.versions(user) if v.number < first.number)

    def history(self, user: str) -> list[Version]:
        """A user's stored versions, newest first.

        Raises:
            UnknownUser: if the store holds nothing of the user. StorageFailure: if the index cannot be read.
            TypeError, ValueError: if ``user`` can be no user's id.
        """
        check_user_name(user)
        return self.index.versions(user)

    def users(self) -> list[User]:
        """All users that have a version, sorted by id. Raises `StorageFailure`."""
        return self.index.users()

    # -- maintenance ------------------------------------------------------------------------------------------

    def gc(self, *, keep_last: int = 10, keep_days: float = 7, grace: float = 3600) -> Collected:
        """Remove versions past retention, and blobs that no version names. Others may read and write meanwhile.

        It also completes a `forget` that was interrupted, the rewriting of the index included. It goes on past what
        cannot be removed, and works on a full disk.

        Args:
            keep_last: a user's newest versions, kept at any age; at least 1.
            keep_days: versions younger than this are kept, too.
            grace: seconds that an unnamed blob is left to those who may be reading it. A write that takes longer is
                refused at its commit, not lost. Files of forgotten users have no grace.

        Returns:
            What was removed.

        Raises:
            StorageFailure: if something could not be removed yet, after all else was; call again.
            CommitUncertain: if the index failed during a commit; call again.
            ValueError: if an argument is out of range.
        """
        check_whole("keep_last", keep_last, 1)
        check_number("keep_days", keep_days, 0)
        check_number("grace", grace, 0)
        with _target_failures():
            return collect(self.index, self.blobs, keep_last, 86400 * keep_days, grace)

    def forget(self, user: str) -> None:
        """Remove a user for good: id, versions and blobs, also those of interrupted writes. Leases become stale.

        The database is rewritten and its log emptied, so that no byte is left in the files of a store in a folder (with
        SQLite). Out of the store's reach are sectors of the disk, backups, old versions of a bucket's objects, and the
        log of a PostgreSQL server. If a crash or an error interrupts it, another call or `gc` completes it. A later
        `put` begins again at version 1.

        Raises:
            UnknownUser: if the store holds nothing of the user; what an interrupted call left is removed all the same.
            StorageFailure: if something could not be removed yet, of this user or of one forgotten before, after all
                else was; call again.
            CommitUncertain: if the index failed during a commit; call again.
            TypeError, ValueError: if ``user`` can be no user's id.
        """
        check_user_name(user)
        with _target_failures():
            forget(self.index, self.blobs, user)

    def verify(self) -> Report:
        """Read every blob, check its checksum and that it can be decoded, and list files that no version names.

        Blobs that cannot be read are reported, and the rest is read all the same.

        Raises:
            StorageFailure: if the index cannot be read, or the blobs not even be listed.
        """
        with _target_failures():
            return verify(self.index, self.blobs)

    def check_in_place(self) -> None:
        """Raise `StoreReplaced` once the files of a store in folders were removed or replaced; it reads two names.

        Raises:
            StorageFailure: if the index, or the folder of the blobs, is out of reach.
        """
        with _target_failures():
            self.index.check_in_place()
            self.blobs.check_in_place()

    def check_writes(self, size: int = 0) -> None:
        """Write a number into the index and a file beside the blobs, and remove the file, to see whether that works.

        Args:
            size: bytes that the file has at least.

        Raises:
            StorageFailure: if disk, network or database failed. CommitUncertain: if the index failed during the commit.
        """
        self.index.check_writes()
        folder = new_folder_name()
        with _target_failures():
            try:
                self.blobs.write(new_key(folder), bytes(max(size, _PROBE_BYTES)))
            finally:
                self.blobs.remove_folder(folder)

    def close(self) -> None:
        """Close the index's connection and the folder of the blobs; the next call opens them again."""
        self.index.close()
        self.blobs.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


@contextlib.contextmanager
def _target_failures():
    try:
        yield
    except OSError as error:
        raise blobs_failure("the blobs are out of reach", error) from error


def _check_version(version: int) -> None:
    if not isinstance(version, int) or isinstance(version, bool):
        raise TypeError(f"version must be a whole number, got {version!r:.80}")
