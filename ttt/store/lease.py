"""`Lease`: the right to write one user's versions."""

from __future__ import annotations

import contextlib
import os
import threading
from types import TracebackType

from ttt.checks import check_number
from ttt.store.errors import CommitUncertain, StaleLease, StorageFailure
from ttt.store.index import Index
from ttt.store.records import Grant


class Lease:
    """The right to write one user's versions in one store. A context manager that releases it at the end.

    ``token`` rules out two writers: each lease of the store has a greater token than all before it, and a version is
    committed in a transaction that finds its lease's token to be the latest. Expiry only decides when another holder
    may take over; a lease that expired and was not taken over still writes. A lease belongs to the process that took
    it: in a fork of that process it is stale. It may be used from several threads at once.

    Attributes:
        user: the user's id.
        token: a whole number.
    """

    def __init__(self, index: Index, store_name: str, grant: Grant, seconds: float) -> None:
        self._index, self._store_name = index, store_name
        self._grant: Grant | None = grant
        self._seconds, self._pid = seconds, os.getpid()
        self._lock = threading.Lock()  # a lease that is renewed while it is released must end released
        self.user, self.token = grant.user, grant.token

    @property
    def expires(self) -> float:
        """When others may take over: seconds since 1970, by the index's clock. Raises `StaleLease` once released."""
        return self.grant.expires

    @property
    def grant(self) -> Grant:
        """The lease as the index knows it. Raises `StaleLease` once released, and in a fork of its process."""
        if self._grant is None:
            raise StaleLease(f"the lease on {self.user!r} (token {self.token}) was released")
        if self._pid != os.getpid():
            owner = f"belongs to process {self._pid}, of which process {os.getpid()} is a fork"
            raise StaleLease(f"the lease on {self.user!r} (token {self.token}) {owner}; take another")
        return self._grant

    def require_store(self, index: Index, store_name: str) -> None:
        """Raise ValueError unless the lease was taken from the store of ``index``."""
        if self._index is not index and self._index.identity() != index.identity():
            raise ValueError(f"lease must be one of the store {store_name}, got one of {self._store_name}")

    def commit(self, blob: tuple[str, int, str], source: int | None = None) -> int | None:
        """Add a version and extend the lease, see `ttt.store.index.Index.commit`; the version's number."""
        version, grant = self._index.commit(self.grant, self._seconds, blob, source)
        with self._lock:
            if self._grant is not None:
                self._grant = grant
        return version

    def renew(self, seconds: float | None = None) -> None:
        """Extend the lease to ``seconds`` from now (default: as long as when it was taken). `Store.put` does so, too.

        Raises:
            StaleLease: if it was released, or another holder has taken over.
        """
        seconds = self._seconds if seconds is None else check_number("seconds", seconds, 0, above=True)
        with self._lock:
            self._grant = self._index.extend(self.grant, seconds)

    def release(self) -> None:
        """End the lease. Does nothing if it was released before, another has taken over, or this is a fork."""
        with self._lock:
            if self._grant is not None and self._pid == os.getpid():
                with contextlib.suppress(StaleLease):
                    self._index.extend(self._grant, 0)
            self._grant = None

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        # It expires by itself: a failure to release must not hide the error that leaves the block.
        with contextlib.suppress(*(() if error is None else (StorageFailure, CommitUncertain))):
            self.release()
