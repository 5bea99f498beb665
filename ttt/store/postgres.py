"""The index in PostgreSQL, for the processes of many machines. Needs ``pip install 'ttt[postgres]'``.

The clock of leases is the server's.
"""

from __future__ import annotations

import os
from typing import Any

from ttt.store.errors import StorageFailure
from ttt.store.index import Index, Run

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
_SCHEMA_LOCK = 0x747474  # two processes that make the tables at once would collide in the catalogue


class PostgresIndex(Index):
    """An `Index` in the database that ``conninfo`` names (a URL or libpq's keywords); tables are made if need be.

    Args:
        timeout: seconds to wait for a connection, and for another transaction's lock.

    Raises:
        ImportError: without psycopg.
    """

    row_lock = " FOR UPDATE"

    def __init__(self, conninfo: str, timeout: float = 30.0) -> None:
        super().__init__()
        try:
            import psycopg
        except ImportError as error:
            raise ImportError(f"PostgreSQL needs psycopg (pip install 'ttt[postgres]'): {error}") from error
        self._psycopg, self.error = psycopg, psycopg.Error
        self.conninfo, self.timeout = conninfo, timeout
        with self.transaction() as run:
            run("SELECT pg_advisory_xact_lock(?)", _SCHEMA_LOCK)
            for statement in _SCHEMA.split(";\n"):
                if statement.strip():
                    run(statement)

    def connect(self) -> Any:
        wait = max(1, round(self.timeout))
        connection = self._psycopg.connect(self.conninfo, autocommit=True, connect_timeout=wait)
        connection.execute(f"SET lock_timeout = {round(1000 * self.timeout)}")
        connection.execute("SET synchronous_commit = on")
        return connection

    def begin(self) -> Any:
        try:
            self.connection().execute("BEGIN")
        except self._psycopg.OperationalError:  # the server closed it meanwhile; nothing has begun
            self.connection().execute("BEGIN")
        return self.connection()

    def query(self, statement: str, *values: Any) -> list[tuple]:
        try:
            return super().query(statement, *values)
        except StorageFailure:
            if not getattr(self._connections.get(os.getpid()), "closed", True):
                raise
            return super().query(statement, *values)  # it only reads: once more, over a new connection

    def sql(self, statement: str) -> str:
        return statement.replace("?", "%s")

    def now(self, run: Run) -> float:
        return float(run("SELECT extract(epoch FROM clock_timestamp())").fetchone()[0])

    def next_token(self, run: Run) -> int:
        return run("SELECT nextval('ttt_tokens')").fetchone()[0]

    def scrub(self) -> None:
        """Rewrite the tables without dead rows. The server's own log and backups keep ids until they are recycled."""
        with self._mutex, self._failures():
            for table in ("ttt_users", "ttt_versions"):
                self.connection().execute(f"VACUUM FULL {table}")
