"""The index in a SQLite file, for the processes of one machine: write-ahead log, flushed at every commit.

The clock of leases is the machine's. The file and its log must lie on a disk of the machine, not on a network share.
"""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

from ttt.store.errors import StorageFailure
from ttt.store.index import Index, Run

SCHEMA_VERSION = 1

_PRAGMAS = (
    "journal_mode = WAL",
    "synchronous = FULL",  # flushed at every commit: NORMAL would lose the last ones with the power
    "secure_delete = ON",  # deleted rows are overwritten
    "temp_store = MEMORY",  # or VACUUM would write all ids to a file elsewhere
    "foreign_keys = ON",
)
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


class SqliteIndex(Index):
    """An `Index` in the file ``path``, made if need be.

    Args:
        timeout: seconds to wait for another process's transaction.
    """

    error = sqlite3.Error

    def __init__(self, path: Path, timeout: float = 30.0) -> None:
        super().__init__()
        self.path, self.timeout = path, timeout
        with self._failures():
            self.connection()

    def connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, self.timeout, isolation_level=None, check_same_thread=False)
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
        found = self._schema_of(connection)
        if found == 0:  # look again, alone: a store that is there already is opened without waiting for its writers
            connection.execute("BEGIN IMMEDIATE")
            found = self._schema_of(connection) or self._make_schema(connection)
            connection.execute("COMMIT")
        if found != SCHEMA_VERSION:
            connection.close()
            raise StorageFailure(f"{self.path} has schema version {found}; this release reads {SCHEMA_VERSION}")
        return connection

    @staticmethod
    def _schema_of(connection: sqlite3.Connection) -> int:
        return connection.execute("PRAGMA user_version").fetchone()[0]

    @staticmethod
    def _make_schema(connection: sqlite3.Connection) -> int:
        for statement in _SCHEMA.split(";\n"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        return SCHEMA_VERSION

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
            StorageFailure: if other processes' transactions kept it from that for ``timeout`` seconds.
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
