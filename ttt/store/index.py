"""The index: which versions each user has, and who may write them. Its commit is what makes a version exist.

`Index` holds the SQL that SQLite and PostgreSQL both speak; `ttt.store.sqlite` and `ttt.store.postgres` connect.
All values, user ids above all, reach the database as parameters.

=================  ==========================================================================================
``ttt_store``      one row: the random ``id`` of this store
``ttt_users``      a row for each user. ``name`` is the id, NULL once forgotten; ``folder`` the folder of the user's
                   blobs; ``token`` the latest lease, ``expires`` when it ends, ``seconds`` for how long it was last
                   extended; ``head`` the newest version, 0 if none; ``sweeps`` counts collections of garbage
``ttt_versions``   a row for each version: ``blob`` is the key, with ``size`` and ``sha256``; ``created``; ``source``
                   is the version that it repeats (a rollback) or NULL
``ttt_deletions``  a row for each blob that garbage collection is about to delete; no version may name it any more
=================  ==========================================================================================

Garbage collection must not delete a blob that a concurrent commit names, and neither may hold a lock during requests
to the blobs' target. Garbage collection marks blobs that no version names (`Index.mark_for_deletion`), deletes them
outside of a transaction, then removes the marks and adds one to ``sweeps`` (`Index.unmark_deleted`). A commit of a
marked blob is refused. For the blobs that were deleted already, a writer reads ``sweeps``, then asks the target whether
its blob exists, then commits; the commit succeeds only if ``sweeps`` is still the same.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from ttt.store.blobs import new_folder_name
from ttt.store.database import Database, Run
from ttt.store.errors import LeaseHeld, StaleLease, StorageFailure, UnknownUser, UnknownVersion
from ttt.store.records import Grant, User, UserRow, Version

CLOCK_TOLERANCE = 1.0
"""Seconds that a lease may last longer than it was taken for, before the clock is taken to have been set back."""

_VERSION = "number, created, size, sha256, blob, source"
_OF_NAMED_USERS = "ttt_versions JOIN ttt_users ON id = user_row WHERE name"


class Index(Database):
    """Leases and versions in a database. Errors are those of `Database`, where nothing else is said."""

    row_lock = ""
    """Appended to a SELECT of the rows that a transaction bases its changes on."""

    @abstractmethod
    def now(self, run: Run) -> float:
        """Seconds since 1970, by the one clock that all users of this index share."""

    @abstractmethod
    def next_token(self, run: Run) -> int:
        """A number greater than any that it returned before."""

    @abstractmethod
    def identity(self) -> tuple:
        """Equal for two indexes if they are the same database, a copy of one excluded."""

    @property
    @abstractmethod
    def journal(self) -> str:
        """How the database makes its commits durable: ``"wal"``, ``"delete"`` (rollback journal) or ``"server"``."""

    @abstractmethod
    def scrub(self) -> None:
        """Remove what deleted rows left behind in the database's files, as far as it can."""

    def make_room(self, error: Exception) -> bool:
        """Free space that is reserved for maintenance, if ``error`` may come from a full disk; whether it did."""
        return False

    def reserve_room(self) -> None:
        """Reserve that space again, if the disk has room for it."""

    # -- leases -----------------------------------------------------------------------------------------------

    def acquire(self, user: str, seconds: float, steal: bool) -> Grant:
        """A grant with a new token; the user's row is made if it does not exist.

        Raises:
            LeaseHeld: if another's lease has not expired, unless ``steal``. A lease that would last longer than it
                was taken for (the clock was set back since) is shortened to that.
        """
        with self.transaction() as run:
            insert = "INSERT INTO ttt_users (name, folder) VALUES (?, ?) ON CONFLICT (name) DO NOTHING"
            run(insert, user, new_folder_name())
            columns = "SELECT id, folder, sweeps, expires, seconds FROM ttt_users WHERE name = ?"
            row, folder, sweeps, held_until, length = run(columns + self.row_lock, user).fetchone()
            now = self.now(run)
            too_long = held_until > now + length + CLOCK_TOLERANCE
            if too_long:
                held_until = now + length
                run("UPDATE ttt_users SET expires = ? WHERE id = ?", held_until, row)
            held = None
            if held_until > now and not steal:
                held = LeaseHeld(f"{user!r} is leased for another {held_until - now:.1f} s")
                if not too_long:
                    raise held
            else:
                token, expires = self.next_token(run), now + seconds
                update = "UPDATE ttt_users SET token = ?, expires = ?, seconds = ? WHERE id = ?"
                run(update, token, expires, seconds, row)
        if held is not None:  # raised here, so that the lease is shortened for good
            raise held
        return Grant(user, row, folder, token, sweeps, expires)

    def extend(self, grant: Grant, seconds: float) -> Grant:
        """``grant`` until ``seconds`` from now; 0 ends it. Raises `StaleLease`."""
        with self.transaction() as run:
            self._require_latest(run, grant)
            expires = self.now(run) + seconds
            run("UPDATE ttt_users SET expires = ?, seconds = ? WHERE id = ?", expires, seconds, grant.row)
        return grant._replace(expires=expires)

    def commit(
        self, grant: Grant, seconds: float, blob: tuple[str, int, str], source: int | None = None
    ) -> tuple[int | None, Grant]:
        """Add a version that names ``blob`` (key, size, sha256), and extend the lease.

        The token and the marks for deletion are checked in the transaction that adds the version: nothing can come
        between, however long the process slept before.

        Returns:
            The version's number and the extended grant. Or None and a grant with the present ``sweeps``, if garbage
            of the user was collected since the grant learnt of it: the caller must look whether the blob still
            exists, and call again.

        Raises:
            StaleLease: if the token is not the latest.
            StorageFailure: if the blob is being deleted.
        """
        key, size, sha256 = blob
        with self.transaction() as run:
            head, sweeps = self._require_latest(run, grant)
            if run("SELECT 1 FROM ttt_deletions WHERE blob = ?", key).fetchone():
                raise StorageFailure(f"the blob of {grant.user!r} is gone or cut short; nothing was committed")
            if sweeps != grant.sweeps:
                return None, grant._replace(sweeps=sweeps)
            now = self.now(run)
            insert = f"INSERT INTO ttt_versions (user_row, {_VERSION}) VALUES (?, ?, ?, ?, ?, ?, ?)"
            run(insert, grant.row, head + 1, now, size, sha256, key, source)
            expires = now + seconds
            update = "UPDATE ttt_users SET head = ?, expires = ?, seconds = ? WHERE id = ?"
            run(update, head + 1, expires, seconds, grant.row)
        return head + 1, grant._replace(expires=expires)

    def _require_latest(self, run: Run, grant: Grant) -> tuple[int, int]:
        """The user's (head, sweeps), with the row locked. Raises `StaleLease`."""
        found = run("SELECT token, head, sweeps FROM ttt_users WHERE id = ?" + self.row_lock, grant.row).fetchone()
        if found is None or found[0] != grant.token:
            raise StaleLease(f"the lease on {grant.user!r} (token {grant.token}) is no longer the latest")
        return found[1], found[2]

    def check_writes(self) -> None:
        """Write a number that is of no use, to see whether that works."""
        with self.transaction() as run:
            self.next_token(run)

    # -- reading ----------------------------------------------------------------------------------------------

    def find(self, user: str, version: int | None = None) -> Version:
        """One version, the newest by default. Raises `UnknownUser` and `UnknownVersion`."""
        which = "number = head" if version is None else "number = ?"
        values = (user,) if version is None else (user, version)
        found = self.query(f"SELECT {_VERSION} FROM {_OF_NAMED_USERS} = ? AND {which}", *values)
        if found:
            return Version(*found[0])
        numbers = [v.number for v in self.versions(user)]
        raise UnknownVersion(f"{user!r} has no version {version}; it has {_spans(numbers)}")

    def versions(self, user: str, missing_ok: bool = False) -> list[Version]:
        """All versions of a user, newest first. Raises `UnknownUser`, unless ``missing_ok``."""
        found = self.query(f"SELECT {_VERSION} FROM {_OF_NAMED_USERS} = ? ORDER BY number DESC", user)
        if not found and not missing_ok:
            raise UnknownUser(f"the store holds nothing of {user!r}")
        return [Version(*row) for row in found]

    def users(self) -> list[User]:
        """All users that have a version, by name."""
        columns = "name, head, COUNT(*), SUM(size), MAX(created), MAX(expires)"
        found = self.query(f"SELECT {columns} FROM {_OF_NAMED_USERS} IS NOT NULL GROUP BY id, name, head ORDER BY name")
        return [User(name, head, count, int(size), *rest) for name, head, count, size, *rest in found]

    def knows(self, user: str) -> bool:
        """Whether there is a row for the user, with or without versions."""
        return bool(self.query("SELECT 1 FROM ttt_users WHERE name = ?", user))

    def all_versions(self) -> list[tuple[str, Version]]:
        """(user, version) of all versions, by user, oldest first."""
        found = self.query(f"SELECT name, {_VERSION} FROM {_OF_NAMED_USERS} IS NOT NULL ORDER BY name, number")
        return [(name, Version(*row)) for name, *row in found]

    # -- retention, garbage, forgetting -----------------------------------------------------------------------

    def user_rows(self) -> list[UserRow]:
        """All users, those without a version and those being forgotten too."""
        return [UserRow(*row) for row in self.query("SELECT id, name, folder, head FROM ttt_users ORDER BY id")]

    def prune(self, rows: Sequence[int], keep_last: int, keep_seconds: float) -> int:
        """Delete versions of the users ``rows`` that are past retention; how many.

        Past retention are versions that are neither among their user's last ``keep_last`` nor so young.
        """
        with self.transaction() as run:
            head = "(SELECT head FROM ttt_users WHERE id = user_row)"
            condition = f"user_row IN ({_marks(rows)}) AND created < ? AND number <= {head} - ?"
            oldest = self.now(run) - keep_seconds
            return run(f"DELETE FROM ttt_versions WHERE {condition}", *rows, oldest, keep_last).rowcount

    def mark_for_deletion(self, blobs: Sequence[tuple[int, str]]) -> set[str]:
        """Mark those of ``blobs``, (row, key) each, that no version names; their keys. From then on no version may.

        Blobs of users that have been forgotten meanwhile are left to `ttt.store.maintenance.forget`.
        """
        rows = list({row for row, _ in blobs})
        with self.transaction() as run:
            existing = self._lock(run, rows)
            named = run(f"SELECT blob FROM ttt_versions WHERE user_row IN ({_marks(rows)})", *rows).fetchall()
            kept = {key for (key,) in named}
            marked = [(row, key) for row, key in blobs if row in existing and key not in kept]
            for row, key in marked:
                run("INSERT INTO ttt_deletions VALUES (?, ?) ON CONFLICT (blob) DO NOTHING", key, row)
        return {key for _, key in marked}

    def marked_for_deletion(self) -> list[tuple[int, str]]:
        """(row, key) of the marked blobs: those being deleted, and those that an interrupted collection left."""
        return [(row, key) for row, key in self.query("SELECT user_row, blob FROM ttt_deletions")]

    def unmark_deleted(self, blobs: Sequence[tuple[int, str]]) -> None:
        """Remove the marks of deleted blobs, and add one to their users' ``sweeps``."""
        with self.transaction() as run:
            rows = list({row for row, _ in blobs})
            self._lock(run, rows)
            for _, key in blobs:
                run("DELETE FROM ttt_deletions WHERE blob = ?", key)
            for row in rows:
                run("UPDATE ttt_users SET sweeps = sweeps + 1 WHERE id = ?", row)

    def _lock(self, run: Run, rows: Sequence[int]) -> set[int]:
        """Prevent commits of versions of these users for the rest of the transaction; those rows that exist."""
        lock = f"SELECT id FROM ttt_users WHERE id IN ({_marks(rows)}) ORDER BY id{self.row_lock}"
        return {row for (row,) in run(lock, *rows).fetchall()}

    def shorten_leases(self) -> None:
        """Shorten leases that would last longer than they were taken for, because the clock was set back since."""
        with self.transaction() as run:
            now = self.now(run)
            late = "UPDATE ttt_users SET expires = ? + seconds WHERE expires > ? + seconds"
            run(late, now, now + CLOCK_TOLERANCE)

    def detach(self, user: str, idle: float | None = None) -> bool:
        """Delete a user's id and versions; its folder stays listed, under no name, until `drop`. False if unknown.

        Any lease becomes stale.

        Args:
            idle: only if the user has no version, and has had no lease for so many seconds.
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
            detached = "(SELECT id FROM ttt_users WHERE id = ? AND name IS NULL)"
            run(f"DELETE FROM ttt_deletions WHERE user_row IN {detached}", row)
            run(f"DELETE FROM ttt_users WHERE id IN {detached}", row)


def _marks(values: Sequence[Any]) -> str:
    """Placeholders for a list of parameters."""
    return ", ".join("?" * len(values))


def _spans(numbers: list[int]) -> str:
    """The numbers in order, as "1, 4-7"."""
    spans: list[list[int]] = []
    for n in sorted(numbers):
        if spans and spans[-1][-1] == n - 1:
            spans[-1] = [spans[-1][0], n]
        else:
            spans.append([n])
    return ", ".join("-".join(map(str, span)) for span in spans)
