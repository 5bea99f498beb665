"""The index: who has which versions, and who may write. Its commit is what makes a version exist.

`Index` holds the SQL that SQLite and PostgreSQL both speak; `ttt.store.sqlite` and `ttt.store.postgres` connect.
Values, user ids above all, reach the database as parameters only.

=================  ==========================================================================================
``ttt_users``      a row for each user. ``name`` the id, NULL once forgotten; ``shelf`` the folder of its blobs;
                   ``token`` of the latest lease; ``expires`` of that lease; ``head`` the newest version, 0 if none
``ttt_versions``   a row for each version: blob ``key``, ``size``, ``sha256``, ``created``, and ``source``, the
                   version that it repeats (a rollback) or NULL
=================  ==========================================================================================
"""

from __future__ import annotations

import contextlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ttt.store.blobs import new_shelf
from ttt.store.errors import CommitUncertain, LeaseHeld, StaleLease, StorageFailure, UnknownUser, UnknownVersion

Run = Callable[..., Any]
"""``run(statement, *parameters)`` within a transaction; returns a cursor."""


class Grant(NamedTuple):
    """The right to write a user's versions: good while ``token`` is the latest. ``expires`` by the index's clock."""

    user: str
    row: int
    shelf: str
    token: int
    expires: float


class Version(NamedTuple):
    """A version: its ``number``, when it was ``created`` (seconds since 1970), bytes and checksum of its blob.

    ``source`` is the version that a rollback repeated, else None.
    """

    number: int
    created: float
    size: int
    sha256: str
    key: str
    source: int | None


class User(NamedTuple):
    """A user's ``head``, the newest version; how many ``versions`` are kept, and the ``bytes`` of their blobs."""

    name: str
    head: int
    versions: int
    bytes: int
    updated: float
    lease_expires: float


class Row(NamedTuple):
    """A user as upkeep sees it; ``name`` is None while being forgotten."""

    row: int
    name: str | None
    shelf: str
    head: int


_VERSION = "number, created, size, sha256, key, source"


class Index(ABC):
    """What the store asks of its database. Safe for threads, and across a fork.

    All methods raise `StorageFailure` where the database fails before its commit, and `CommitUncertain` where it fails
    in it.
    """

    error: type[Exception]
    """What the database's package raises."""
    row_lock = ""
    """Appended to a SELECT of a row that the transaction goes on to judge by."""

    def __init__(self) -> None:
        self._mutex = threading.RLock()
        # By process: a connection must not be used, nor closed, by a process forked from the one that opened it.
        self._connections: dict[int, Any] = {}

    # -- what a database provides -----------------------------------------------------------------------------

    @abstractmethod
    def connect(self) -> Any:
        """A new connection, in autocommit mode."""

    @abstractmethod
    def begin(self) -> Any:
        """Begin a transaction that writes; the connection."""

    @abstractmethod
    def sql(self, statement: str) -> str:
        """``statement``, written with ``?`` for parameters, as the database wants it."""

    @abstractmethod
    def now(self, run: Run) -> float:
        """Seconds since 1970, by the one clock that all users of this index share."""

    @abstractmethod
    def next_token(self, run: Run) -> int:
        """A number greater than any that it returned before."""

    @abstractmethod
    def scrub(self) -> None:
        """Remove what deleted rows left behind in the database's files, as far as it can."""

    # -- statements -------------------------------------------------------------------------------------------

    def connection(self) -> Any:
        """The open connection of this process; a new one where there is none, or the server closed it."""
        pid = os.getpid()
        if pid not in self._connections or getattr(self._connections[pid], "closed", False):
            self._connections[pid] = self.connect()
        return self._connections[pid]

    def close(self) -> None:
        """Close the connection; the next call opens another."""
        with self._mutex:
            if (connection := self._connections.pop(os.getpid(), None)) is not None:
                connection.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Run]:
        """A transaction that writes; yields a `Run`."""
        with self._mutex:
            with self._failures():
                connection = self.begin()
            try:
                with self._failures():
                    yield lambda statement, *values: connection.execute(self.sql(statement), values)
            except BaseException:
                self._undo(connection)
                raise
            try:
                connection.execute("COMMIT")
            except self.error as error:
                self._undo(connection)
                raise CommitUncertain(f"the index failed in its commit, which may stand or not: {error}") from error

    def query(self, statement: str, *values: Any) -> list[tuple]:
        """All rows of one statement that only reads."""
        with self._mutex, self._failures():
            return self.connection().execute(self.sql(statement), values).fetchall()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except self.error as error:
            raise StorageFailure(f"the index failed: {error}") from error

    def _undo(self, connection: Any) -> None:
        with contextlib.suppress(self.error):  # it may have rolled back, or be gone
            connection.execute("ROLLBACK")

    # -- leases -----------------------------------------------------------------------------------------------

    def acquire(self, user: str, seconds: float, steal: bool) -> Grant:
        """A grant with a new token; the user's row is made if need be. Raises `LeaseHeld`, unless it may ``steal``."""
        with self.transaction() as run:
            insert = "INSERT INTO ttt_users (name, shelf) VALUES (?, ?) ON CONFLICT (name) DO NOTHING"
            run(insert, user, new_shelf())
            found = run("SELECT id, shelf, expires FROM ttt_users WHERE name = ?" + self.row_lock, user).fetchone()
            row, shelf, held_until = found
            now = self.now(run)
            if held_until > now and not steal:
                raise LeaseHeld(f"{user!r} is leased for another {held_until - now:.1f} s")
            token, expires = self.next_token(run), now + seconds
            run("UPDATE ttt_users SET token = ?, expires = ? WHERE id = ?", token, expires, row)
        return Grant(user, row, shelf, token, expires)

    def extend(self, grant: Grant, seconds: float) -> Grant:
        """``grant`` until ``seconds`` from now; 0 gives it back. Raises `StaleLease`."""
        with self.transaction() as run:
            self._require_latest(run, grant)
            expires = self.now(run) + seconds
            run("UPDATE ttt_users SET expires = ? WHERE id = ?", expires, grant.row)
        return grant._replace(expires=expires)

    def commit(
        self,
        grant: Grant,
        seconds: float,
        blob: tuple[str, int, str],
        present: Callable[[], bool],
        source: int | None = None,
    ) -> tuple[int, Grant]:
        """Add a version that names ``blob`` (key, size, sha256), and extend the lease.

        The token is checked, and the blob looked at once more, under the same lock that garbage collection takes:
        nothing can come between the check and the commit, however long a process slept before.
        """
        with self.transaction() as run:
            head = self._require_latest(run, grant)
            if not present():
                raise StorageFailure(f"the blob of {grant.user!r} is gone or cut short; nothing was committed")
            now = self.now(run)
            columns = f"INSERT INTO ttt_versions (user_row, {_VERSION}) VALUES (?, ?, ?, ?, ?, ?, ?)"
            key, size, sha256 = blob
            run(columns, grant.row, head + 1, now, size, sha256, key, source)
            expires = now + seconds
            run("UPDATE ttt_users SET head = ?, expires = ? WHERE id = ?", head + 1, expires, grant.row)
        return head + 1, grant._replace(expires=expires)

    def _require_latest(self, run: Run, grant: Grant) -> int:
        """The user's head, its row locked."""
        found = run("SELECT token, head FROM ttt_users WHERE id = ?" + self.row_lock, grant.row).fetchone()
        if found is None or found[0] != grant.token:
            raise StaleLease(f"the lease on {grant.user!r} (token {grant.token}) is no longer the latest")
        return found[1]

    # -- reading ----------------------------------------------------------------------------------------------

    def find(self, user: str, version: int | None = None) -> Version:
        """One version, the newest by default. Raises `UnknownUser` and `UnknownVersion`."""
        which = "number = head" if version is None else "number = ?"
        values = (user,) if version is None else (user, version)
        statement = f"SELECT {_VERSION} FROM ttt_versions JOIN ttt_users ON id = user_row WHERE name = ? AND {which}"
        found = self.query(statement, *values)
        if found:
            return Version(*found[0])
        kept = [v.number for v in self.versions(user)]
        raise UnknownVersion(f"{user!r} has no version {version}; it has {_spans(kept)}")

    def versions(self, user: str, missing_ok: bool = False) -> list[Version]:
        """All versions of a user, newest first. Raises `UnknownUser`, unless ``missing_ok``."""
        statement = f"SELECT {_VERSION} FROM ttt_versions JOIN ttt_users ON id = user_row WHERE name = ?"
        found = self.query(statement + " ORDER BY number DESC", user)
        if not found and not missing_ok:
            raise UnknownUser(f"the store holds nothing of {user!r}")
        return [Version(*row) for row in found]

    def users(self) -> list[User]:
        """All users that have a version, by name."""
        columns = "name, head, COUNT(*), SUM(size), MAX(created), MAX(expires)"
        joined = "ttt_users JOIN ttt_versions ON id = user_row WHERE name IS NOT NULL"
        found = self.query(f"SELECT {columns} FROM {joined} GROUP BY id, name, head ORDER BY name")
        return [User(name, head, count, int(size), *rest) for name, head, count, size, *rest in found]

    # -- retention, garbage, forgetting -----------------------------------------------------------------------

    def rows(self) -> list[Row]:
        """All users, those without a version and those being forgotten too."""
        return [Row(*row) for row in self.query("SELECT id, name, shelf, head FROM ttt_users")]

    def everything(self) -> list[tuple[str, Version]]:
        """(user, version) of all versions, by user, oldest first."""
        joined = "ttt_users JOIN ttt_versions ON id = user_row WHERE name IS NOT NULL ORDER BY name, number"
        return [(name, Version(*row)) for name, *row in self.query(f"SELECT name, {_VERSION} FROM {joined}")]

    def prune(self, keep_last: int, keep_seconds: float) -> int:
        """Drop versions that are neither among their user's last ``keep_last`` nor that young; how many."""
        with self.transaction() as run:
            head = "(SELECT head FROM ttt_users WHERE id = user_row)"
            statement = f"DELETE FROM ttt_versions WHERE created < ? AND number <= {head} - ?"
            return run(statement, self.now(run) - keep_seconds, keep_last).rowcount

    @contextlib.contextmanager
    def referenced(self, row: int) -> Iterator[set[str]]:
        """The keys that a user's versions name; no version can be committed for the user within the context."""
        with self.transaction() as run:
            run("SELECT id FROM ttt_users WHERE id = ?" + self.row_lock, row)
            yield {key for (key,) in run("SELECT key FROM ttt_versions WHERE user_row = ?", row).fetchall()}

    def detach(self, user: str, idle: float | None = None) -> bool:
        """Take a user's id and versions out; its shelf stays listed, under no name, until `drop`. False if unknown.

        Any lease becomes stale. ``idle``: only if the user has no version, and no lease for so many seconds.
        """
        with self.transaction() as run:
            found = run("SELECT id, head, expires FROM ttt_users WHERE name = ?" + self.row_lock, user).fetchone()
            if found is None or (idle is not None and (found[1] or found[2] > self.now(run) - idle)):
                return False
            run("DELETE FROM ttt_versions WHERE user_row = ?", found[0])
            token = self.next_token(run)
            run("UPDATE ttt_users SET name = NULL, token = ?, expires = 0 WHERE id = ?", token, found[0])
        return True

    def drop(self, row: int) -> None:
        """Delete the row of a detached user."""
        with self.transaction() as run:
            run("DELETE FROM ttt_users WHERE id = ? AND name IS NULL", row)


def _spans(numbers: list[int]) -> str:
    """ "1, 4-7": the numbers, in order."""
    spans: list[list[int]] = []
    for n in sorted(numbers):
        if spans and spans[-1][-1] == n - 1:
            spans[-1] = [spans[-1][0], n]
        else:
            spans.append([n])
    return ", ".join("-".join(map(str, span)) for span in spans)
