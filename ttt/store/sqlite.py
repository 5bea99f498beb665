"""The index in a SQLite file, for the processes of one machine; flushed to the disk at every commit.

The clock of leases is the machine's. The file has a write-ahead log, which processes share through memory: on a
network file system that would corrupt it silently, so there it has a rollback journal. A file keeps a rollback journal
once it has one, because processes of other machines may have it open.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from ttt.files import file_identity
from ttt.store import filesystems
from ttt.store.database import Run
from ttt.store.errors import StorageFailure, StoreReplaced
from ttt.store.index import Index

RESERVE_BYTES = 1 << 20
"""Size of the file beside the index that maintenance deletes on a full disk, for the room that deleting takes."""

_PRAGMAS = (
    "secure_delete = ON",  # deleted rows are overwritten
    "temp_store = MEMORY",  # or VACUUM would write all ids to a file elsewhere
    "foreign_keys = ON",
)
_SYNCHRONOUS = {
    "wal": "FULL",  # flushed at every commit: NORMAL would lose the last commits at a loss of power
    "delete": "EXTRA",  # FULL would not flush the deletion of the journal, which is the commit
}
_SCHEMA = """
CREATE TABLE ttt_users (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT UNIQUE,
    shelf TEXT NOT NULL,
    token INTEGER NOT NULL DEFAULT 0,
    expires REAL NOT NULL DEFAULT 0,
    head INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE ttt_versions (
    user_row INTEGER NOT NULL REFERENCES ttt_users (id),
    number INTEGER NOT NULL,
    created REAL NOT NULL,
    size INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    key TEXT NOT NULL,
    source INTEGER,
    PRIMARY KEY (user_row, number)
) WITHOUT ROWID;
CREATE TABLE ttt_tokens (latest INTEGER NOT NULL);
INSERT INTO ttt_tokens VALUES (0);
"""
# Renaming the columns makes processes of an older release fail that still have the file open: their garbage
# collection ignores ttt_deletions.
_SCHEMA_2 = """
ALTER TABLE ttt_users RENAME COLUMN shelf TO folder;
ALTER TABLE ttt_versions RENAME COLUMN key TO blob;
ALTER TABLE ttt_users ADD COLUMN seconds REAL NOT NULL DEFAULT 0;
ALTER TABLE ttt_users ADD COLUMN sweeps INTEGER NOT NULL DEFAULT 0;
CREATE TABLE ttt_deletions (blob TEXT PRIMARY KEY, user_row INTEGER NOT NULL REFERENCES ttt_users (id)) WITHOUT ROWID;
CREATE TABLE ttt_store (id TEXT NOT NULL);
"""
_MIGRATIONS = (_SCHEMA, _SCHEMA_2)
SCHEMA_VERSION = len(_MIGRATIONS)


class SqliteIndex(Index):
    """An `Index` in the file ``path``.

    Args:
        timeout: seconds to wait for another process's transaction.
        network_filesystem: returns the name of the network file system that a folder is on, or None; by default
            `ttt.store.filesystems.network_filesystem`.
        create: make the file if it does not exist.

    Raises:
        StorageFailure: if the file cannot be opened, or is no index and ``create`` is False; or if it is on a network
            file system and its write-ahead log is in use.
    """

    error = sqlite3.Error

    def __init__(
        self,
        path: Path,
        timeout: float = 30.0,
        network_filesystem: Callable[[Path], str | None] | None = None,
        create: bool = True,
    ) -> None:
        super().__init__()
        self._create = create
        self.path, self.timeout = path.absolute(), timeout
        self._reserve = self.path.with_name(f"{self.path.name}-reserve")
        find = network_filesystem or filesystems.network_filesystem
        self.network_filesystem = find(self.path.parent)
        self._journal = ""
        self._file: tuple[int, int] | None = None
        self._id: str | None = None
        try:
            with self._failures():
                self.connection()
        except StorageFailure as error:
            # On a full disk not even a reader can open a write-ahead log; maintenance can, and the rest fails later.
            if not (self._reserve.exists() and _may_be_full(error)):
                raise

    @property
    def journal(self) -> str:
        with self._mutex, self._failures():
            self.connection()
        return self._journal

    def identity(self) -> tuple:
        with self._mutex, self._failures():
            self.connection()
        return self._id, self._file

    # -- connecting -------------------------------------------------------------------------------------------

    def connect(self) -> sqlite3.Connection:
        # Once it was open, a file that is missing must not be made anew: its blobs would all be garbage.
        mode = "rwc" if self._create and self._id is None else "rw"
        uri = f"{self.path.as_uri()}?mode={mode}"
        try:
            connection = sqlite3.connect(uri, self.timeout, isolation_level=None, check_same_thread=False, uri=True)
        except sqlite3.OperationalError as error:
            raise sqlite3.OperationalError(f"{self.path}: {error}") from error
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Set the journal and the options, bring the schema up to date, and note which file this is."""
        if not self._create and _schema_version(connection) == 0:
            raise StorageFailure(f"there is no store at {self.path.parent}: {self.path} is no index")
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
        self._journal = self._choose_journal(connection)
        connection.execute(f"PRAGMA synchronous = {_SYNCHRONOUS[self._journal]}")
        found = _schema_version(connection)
        if found < SCHEMA_VERSION:  # look again, alone: a file that is up to date is opened without waiting for writers
            connection.execute("BEGIN IMMEDIATE")
            found = _schema_version(connection)
            if found < SCHEMA_VERSION:
                found = _migrate(connection, found)
            connection.execute("COMMIT")
            self.reserve_room()
        if found != SCHEMA_VERSION:
            raise StorageFailure(f"{self.path} has schema version {found}; this release reads {SCHEMA_VERSION}")
        (store_id,) = connection.execute("SELECT id FROM ttt_store").fetchone()
        if self._id not in (None, store_id):
            raise StoreReplaced(f"{self.path} was replaced by another store since this one was opened")
        self._id, self._file = store_id, file_identity(self.path)

    def _choose_journal(self, connection: sqlite3.Connection) -> str:
        """The journal of the file: set for a new file, and changed where a write-ahead log is not safe."""
        if self.network_filesystem is None:
            if _schema_version(connection) == 0:
                connection.execute("PRAGMA journal_mode = WAL")
        else:
            in_use = f"{self.path} is on {self.network_filesystem}, where a write-ahead log would corrupt it"
            try:
                if _has_write_ahead_log(self.path):
                    connection.execute(
                        "PRAGMA locking_mode = EXCLUSIVE"
                    )  # then the log's index is not in shared memory
                connection.execute("PRAGMA journal_mode = DELETE")
                connection.execute("PRAGMA locking_mode = NORMAL")
                _schema_version(connection)  # the lock is released by the next access
            except sqlite3.OperationalError as error:
                raise StorageFailure(f"{in_use}, and its log cannot be replaced now: {error}") from error
        (journal,) = connection.execute("PRAGMA journal_mode").fetchone()
        if journal not in (_SYNCHRONOUS if self.network_filesystem is None else ("delete",)):
            raise StorageFailure(f"{self.path} has the journal mode {journal!r}, which is not safe here")
        return journal

    def require_in_place(self) -> None:
        if self._file is None or file_identity(self.path) != self._file:
            raise StoreReplaced(f"{self.path} was removed or replaced since it was opened; open the store anew")
        if self._journal == "wal" and not os.path.exists(f"{self.path}-wal"):
            raise StoreReplaced(f"the write-ahead log of {self.path} was removed; open the store anew")

    # -- what Index asks for ----------------------------------------------------------------------------------

    def begin(self) -> sqlite3.Connection:
        connection = self.connection()
        connection.execute("BEGIN IMMEDIATE")
        return connection

    def sql(self, statement: str) -> str:
        return statement

    def now(self, run: Run) -> float:
        return time.time()

    def next_token(self, run: Run) -> int:
        run("UPDATE ttt_tokens SET latest = latest + 1")
        return run("SELECT latest FROM ttt_tokens").fetchone()[0]

    def scrub(self) -> None:
        """Rewrite the file without free pages, and empty the log: deleted ids are in neither.

        Raises:
            StorageFailure: if other processes' transactions prevented it for ``timeout`` seconds.
        """
        with self._mutex, self._failures():
            connection = self.connection()
            self._empty_log(connection)
            connection.execute("VACUUM")
            self._empty_log(connection)

    def _empty_log(self, connection: sqlite3.Connection) -> None:
        (busy, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise StorageFailure(f"{self.path}: the log is in use; it still holds deleted ids until scrubbed")

    # -- a full disk ------------------------------------------------------------------------------------------

    def make_room(self, error: Exception) -> bool:
        if not _may_be_full(error):
            return False
        try:
            self._reserve.unlink()
        except OSError:
            return False
        return True

    def reserve_room(self) -> None:
        with contextlib.suppress(OSError):  # the store works without, except on a full disk
            if self._reserve.exists():
                return
            try:
                # Random, because a file system that compresses would set nothing aside for zeros.
                with open(self._reserve, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                    file.write(secrets.token_bytes(RESERVE_BYTES))
            except OSError:
                self._reserve.unlink(missing_ok=True)


def _may_be_full(error: Exception) -> bool:
    """Whether SQLite failed for want of space: it reports a full disk, or an I/O error if a quota is exhausted."""
    cause = str(error.__cause__)
    return isinstance(error.__cause__, sqlite3.Error) and ("is full" in cause or "disk I/O error" in cause)


def _has_write_ahead_log(path: Path) -> bool:
    """Whether the file's header says so (bytes 18 and 19, the versions for writing and reading)."""
    with open(path, "rb") as file:
        return file.read(20)[18:] == b"\x02\x02"


def _schema_version(connection: sqlite3.Connection) -> int:
    return connection.execute("PRAGMA user_version").fetchone()[0]


def _migrate(connection: sqlite3.Connection, found: int) -> int:
    """Bring the schema from version ``found`` up to date, within a transaction; the new version."""
    for schema in _MIGRATIONS[found:]:
        for statement in schema.split(";\n"):
            connection.execute(statement)
    connection.execute("INSERT INTO ttt_store VALUES (?)", (secrets.token_hex(16),))
    now = time.time()
    connection.execute("UPDATE ttt_users SET seconds = expires - ? WHERE expires > ?", (now, now))
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    return SCHEMA_VERSION
