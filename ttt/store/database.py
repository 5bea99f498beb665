"""Connections and transactions of a database, safe for threads and across forks."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from ttt.store.errors import CommitUncertain, StorageFailure

Run = Callable[..., Any]
"""``run(statement, *parameters)`` within a transaction; returns a cursor."""


class Database(ABC):
    """One connection for each process, shared by its threads.

    All methods raise `StorageFailure` if the database fails before its commit, and `CommitUncertain` if it fails
    during it.
    """

    error: type[Exception]
    """Base class of the exceptions that the database's package raises."""

    def __init__(self) -> None:
        self._mutex = threading.RLock()
        # By process: a connection must be neither used nor closed by a fork of the process that opened it.
        self._connections: dict[int, Any] = {}
        _open_databases.add(self)

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
    def require_in_place(self) -> None:
        """Raise `StoreReplaced` if what is written over the open connection is lost, its file having been removed."""

    def connection(self) -> Any:
        """The open connection of this process; a new one if there is none, or the server has closed it."""
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
        """A transaction that writes; yields a `Run`. It must end in the process that began it."""
        with self._mutex:
            pid = os.getpid()
            with self._failures():
                connection = self.begin()

            def run(statement: str, *values: Any) -> Any:
                _require_process(pid)
                return connection.execute(self.sql(statement), values)

            try:
                with self._failures():
                    yield run
                _require_process(pid)
                self.require_in_place()
            except BaseException:
                if os.getpid() == pid:
                    self._undo(connection)
                raise
            try:
                connection.execute("COMMIT")
            except self.error as error:
                self._undo(connection)
                raise CommitUncertain(f"the index failed in its commit, which may stand or not: {error}") from error
            try:
                self.require_in_place()
            except StorageFailure as error:
                raise CommitUncertain(f"the commit may be lost: {error}") from error

    def query(self, statement: str, *values: Any) -> list[tuple]:
        """All rows of one statement that only reads."""
        with self._mutex, self._failures():
            found = self.connection().execute(self.sql(statement), values).fetchall()
            self.require_in_place()  # a file that was removed is read as it was
            return found

    def check_in_place(self) -> None:
        """`require_in_place`, over an open connection."""
        with self._mutex, self._failures():
            self.connection()
            self.require_in_place()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except self.error as error:
            raise StorageFailure(f"the index failed: {error}") from error

    def _undo(self, connection: Any) -> None:
        with contextlib.suppress(self.error):  # it may have rolled back by itself, or be gone
            connection.execute("ROLLBACK")

    def _reset_after_fork(self) -> None:
        """Give the child of a fork a lock of its own, and leave the parent's connections open for good."""
        self._mutex = threading.RLock()  # at the fork, a thread that the child does not have may have held it
        for connection in self._connections.values():
            # Even freeing it would roll back the parent's transaction in files that both processes share.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
        self._connections.clear()


_open_databases: weakref.WeakSet[Database] = weakref.WeakSet()


def _reset_open_databases() -> None:
    for database in list(_open_databases):
        database._reset_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_open_databases)


def _require_process(pid: int) -> None:
    if os.getpid() != pid:
        message = f"a transaction of process {pid} cannot go on in process {os.getpid()}, a fork of it"
        raise StorageFailure(f"{message}; this process wrote nothing")
