"""The index in PostgreSQL, for the processes of many machines. Needs the extra ``postgres``.

The clock of leases is the server's.
"""

from __future__ import annotations

import os
import secrets
from typing import Any

from ttt.installing import how_to_install
from ttt.store.database import Run
from ttt.store.errors import StorageFailure
from ttt.store.index import Index

_SCHEMA = """
CREATE TABLE IF NOT EXISTS ttt_users (
    id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name TEXT COLLATE "C" UNIQUE,
    shelf TEXT NOT NULL,
    token BIGINT NOT NULL DEFAULT 0,
    expires DOUBLE PRECISION NOT NULL DEFAULT 0,
    head BIGINT NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS ttt_versions (
    user_row BIGINT NOT NULL REFERENCES ttt_users (id),
    number BIGINT NOT NULL,
    created DOUBLE PRECISION NOT NULL,
    size BIGINT NOT NULL,
    sha256 TEXT NOT NULL,
    key TEXT NOT NULL,
    source BIGINT,
    PRIMARY KEY (user_row, number)
);
CREATE SEQUENCE IF NOT EXISTS ttt_tokens;
"""
# Renaming the columns makes processes of an older release fail: their garbage collection ignores ttt_deletions.
_SCHEMA_2 = """
ALTER TABLE ttt_users RENAME COLUMN shelf TO folder;
ALTER TABLE ttt_versions RENAME COLUMN key TO blob;
ALTER TABLE ttt_users ADD COLUMN seconds DOUBLE PRECISION NOT NULL DEFAULT 0;
ALTER TABLE ttt_users ADD COLUMN sweeps BIGINT NOT NULL DEFAULT 0;
CREATE TABLE ttt_deletions (blob TEXT PRIMARY KEY, user_row BIGINT NOT NULL REFERENCES ttt_users (id));
CREATE TABLE ttt_store (id TEXT NOT NULL, version INTEGER NOT NULL);
"""
SCHEMA_VERSION = 2
_SCHEMA_LOCK = 0x747474  # two processes that make the tables at the same time would collide in the catalogue


class PostgresIndex(Index):
    """An `Index` in the database that ``conninfo`` names (a URL or libpq's keywords).

    Args:
        timeout: seconds to wait for a connection, and for another transaction's lock.
        create: make the tables if they do not exist.

    Raises:
        ImportError: without psycopg.
        StorageFailure: if the server cannot be reached, the tables are of a later release, or they do not exist and
            ``create`` is False.
    """

    row_lock = " FOR UPDATE"
    journal = "server"

    def __init__(self, conninfo: str, timeout: float = 30.0, create: bool = True) -> None:
        super().__init__()
        try:
            import psycopg
        except ImportError as error:
            raise ImportError(f"PostgreSQL needs psycopg ({how_to_install('postgres')}): {error}") from error
        self._psycopg, self.error = psycopg, psycopg.Error
        self.conninfo, self.timeout = conninfo, timeout
        if not self._has_table("ttt_store"):
            if not create:
                # Not the conninfo, which may hold a password.
                raise StorageFailure("there is no store in the database: it has no table ttt_store")
            self._make_schema()
        found = self.query("SELECT version FROM ttt_store")[0][0]
        if found != SCHEMA_VERSION:
            raise StorageFailure(f"the index has schema version {found}; this release reads {SCHEMA_VERSION}")

    def _has_table(self, name: str) -> bool:
        # Not by to_regclass, which may repeat an answer from before another transaction's commit.
        found = "SELECT 1 FROM pg_tables WHERE schemaname = current_schema() AND tablename = ?"
        return bool(self.query(found, name))

    def _make_schema(self) -> None:
        with self.transaction() as run:
            run("SELECT pg_advisory_xact_lock(?)", _SCHEMA_LOCK)
            if self._has_table("ttt_store"):  # another process was first
                return
            for statement in (_SCHEMA + _SCHEMA_2).split(";\n"):
                if statement.strip():
                    run(statement)
            run("INSERT INTO ttt_store VALUES (?, ?)", secrets.token_hex(16), SCHEMA_VERSION)
            now = self.now(run)
            run("UPDATE ttt_users SET seconds = expires - ? WHERE expires > ?", now, now)

    def connect(self) -> Any:
        wait = max(1, round(self.timeout))
        connection = self._psycopg.connect(self.conninfo, autocommit=True, connect_timeout=wait)
        connection.execute(f"SET lock_timeout = {round(1000 * self.timeout)}")
        connection.execute("SET synchronous_commit = on")
        return connection

    def require_in_place(self) -> None:
        """Does nothing: a server does not lose its tables unnoticed."""

    def begin(self) -> Any:
        try:
            self.connection().execute("BEGIN")
        except self._psycopg.OperationalError:  # the server closed the connection meanwhile; nothing has begun
            self.connection().execute("BEGIN")
        return self.connection()

    def query(self, statement: str, *values: Any) -> list[tuple]:
        try:
            return super().query(statement, *values)
        except StorageFailure:
            if not getattr(self._connections.get(os.getpid()), "closed", True):
                raise
            return super().query(statement, *values)  # it only reads: repeated over a new connection

    def sql(self, statement: str) -> str:
        return statement.replace("?", "%s")

    def now(self, run: Run) -> float:
        return float(run("SELECT extract(epoch FROM clock_timestamp())").fetchone()[0])

    def next_token(self, run: Run) -> int:
        return run("SELECT nextval('ttt_tokens')").fetchone()[0]

    def identity(self) -> tuple:
        """The store's id, and the table that holds it: a copy of the database has the id, too."""
        database = "SELECT oid::bigint FROM pg_database WHERE datname = current_database()"
        return self.query(f"SELECT id, ({database}), 'ttt_store'::regclass::oid::bigint FROM ttt_store")[0]

    def scrub(self) -> None:
        """Rewrite the tables without dead rows. The server's own log and backups keep ids until they are recycled."""
        with self._mutex, self._failures():
            for table in ("ttt_users", "ttt_versions"):
                self.connection().execute(f"VACUUM FULL {table}")
