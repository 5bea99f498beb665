"""Retention, garbage collection and forgetting. All go on past what cannot be removed, and report it at the end."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, TypeVar

from ttt.store.blobs import BlobFile, Blobs
from ttt.store.errors import CommitUncertain, StorageFailure, UnknownUser, blobs_failure
from ttt.store.index import Index
from ttt.store.records import UserRow

USERS_AT_ONCE = 100
"""Users whose versions are pruned in one transaction: few, so that on a full disk it fits the reserved room."""
BLOBS_AT_ONCE = 200
"""Blobs that are marked for deletion in one transaction, before they are deleted outside of it."""
FUTURE_SECONDS = 86400
"""A file dated this far in the future says nothing of its age (the clock was set back since): it counts as old."""

T = TypeVar("T")


class Collected(NamedTuple):
    """What `Store.gc` removed: ``versions`` past retention, ``users`` that never wrote, ``blobs`` and their bytes."""

    versions: int
    users: int
    blobs: int
    bytes: int


class _Removal:
    """Removes blobs and folders, counts them, and notes what could not be removed."""

    def __init__(self, index: Index, blobs: Blobs) -> None:
        self.index, self.blobs = index, blobs
        self.removed: list[BlobFile] = []
        self.failures: list[str] = []
        self._cause: OSError | None = None  # of one of them; that the blobs were replaced, if that is one
        self._failed_folders: set[str] = set()

    def _failed(self, what: str, error: OSError) -> None:
        self.failures.append(f"{what}: {error}")
        if self._cause is None or error.errno == errno.ESTALE:
            self._cause = error

    def remove_folder(self, folder: str) -> bool:
        """Remove a user's folder; whether that succeeded. One that failed before is not tried again."""
        if folder in self._failed_folders:
            return False
        try:
            files = self.blobs.list_files(folder)
            self.blobs.remove_folder(folder)
        except OSError as error:
            self._failed(f"folder {folder}", error)
            self._failed_folders.add(folder)
            return False
        self.removed += files
        return True

    def list_folders(self) -> list[str]:
        """The names of all users' folders; none if they cannot be listed."""
        try:
            return list(self.blobs.list_folders())
        except OSError as error:
            self._failed("the list of folders", error)
            return []

    def erase_detached(self) -> tuple[list[UserRow], bool]:
        """Remove the folders of detached users, but not their rows.

        Returns:
            The users for which that succeeded; and whether there is any detached user, so that a scrub is due.
        """
        rows = [row for row in self.index.user_rows() if row.name is None]
        return [row for row in rows if self.remove_folder(row.folder)], bool(rows)

    def remove_marked(self, files: Sequence[tuple[int, BlobFile]]) -> None:
        """Remove blobs that are marked for deletion in the index, and then the marks."""
        gone = []
        for row, file in files:
            try:
                self.blobs.remove(file.key)
            except OSError as error:  # its mark remains, because the target may have removed it all the same
                self._failed(f"blob {file.key}", error)
                continue
            gone.append((row, file.key))
            self.removed.append(file)
        if gone:
            self.index.unmark_deleted(gone)

    def sweep(self, rows: Iterable[UserRow], oldest: float) -> None:
        """Remove files of these users that no version names and that are not younger than ``oldest``."""
        newest = time.time() + FUTURE_SECONDS
        found = []
        for row in rows:
            try:
                files = self.blobs.list_files(row.folder)
            except OSError as error:
                self._failed(f"folder {row.folder}", error)
                continue
            found += [(row.row, file) for file in files if not oldest < file.modified < newest]
        for batch in _batches(found, BLOBS_AT_ONCE):
            marked = self.index.mark_for_deletion([(row, file.key) for row, file in batch])
            self.remove_marked([(row, file) for row, file in batch if file.key in marked])

    def raise_failures(self, done: str) -> None:
        """Raise `StorageFailure` if something could not be removed."""
        if self._cause is not None:
            shown = "; ".join(self.failures[:10]) + ("; ..." if len(self.failures) > 10 else "")
            what = f"{done}, but {len(self.failures)} could not be removed yet"
            raise blobs_failure(what, self._cause, shown) from self._cause


def collect(index: Index, blobs: Blobs, keep_last: int, keep_seconds: float, grace: float) -> Collected:
    """Remove versions past retention, and what no version names; see `Store.gc`."""
    return _with_room(index, lambda: _collect(index, blobs, keep_last, keep_seconds, grace))


def forget(index: Index, blobs: Blobs, user: str) -> None:
    """Remove a user; see `Store.forget`."""
    known = False

    def erase() -> None:
        nonlocal known
        known = index.detach(user) or known
        removal = _Removal(index, blobs)
        erased, _ = removal.erase_detached()
        _finish(index, erased)
        removal.raise_failures(f"{user!r} is unknown to the index, and everything else is removed")

    _with_room(index, erase)
    if not known:
        raise UnknownUser(f"the store holds nothing of {user!r}")


def _collect(index: Index, blobs: Blobs, keep_last: int, keep_seconds: float, grace: float) -> Collected:
    # What needs no change of the index first comes first: on a full disk it makes room for the rest.
    removal = _Removal(index, blobs)
    forgotten, is_scrub_due = removal.erase_detached()  # left by a `forget` that was interrupted
    left = index.marked_for_deletion()  # of a collection that was interrupted
    removal.remove_marked([(row, BlobFile(key, 0, 0)) for row, key in left])
    # Listed before the index is read: a user made in between has no folder here that could be taken for garbage.
    folders = removal.list_folders()
    rows = index.user_rows()
    known = {row.folder for row in rows}
    for folder in folders:
        if folder not in known:  # of a forgotten user: a write that came too late
            removal.remove_folder(folder)
    index.shorten_leases()
    oldest = time.time() - grace
    versions = 0
    for batch in _batches([row for row in rows if row.name is not None], USERS_AT_ONCE):
        versions += index.prune([row.row for row in batch], keep_last, keep_seconds)
        removal.sweep(batch, oldest)
    if is_scrub_due:
        _finish(index, forgotten)
    idle = [row for row in rows if row.name is not None and not row.head and index.detach(row.name, grace)]
    for row in idle:
        if removal.remove_folder(row.folder):
            index.drop(row.row)
    removal.raise_failures(f"{versions} versions and {len(removal.removed)} blobs are removed")
    return Collected(versions, len(idle), len(removal.removed), sum(file.size for file in removal.removed))


def _finish(index: Index, erased: Sequence[UserRow]) -> None:
    """Scrub the index, then delete the rows of erased users: until then they tell that a scrub is still to be done."""
    index.scrub()
    for row in erased:
        index.drop(row.row)


def _with_room(index: Index, run: Callable[[], T]) -> T:
    """``run()``; if it fails on a full disk, once more with the room that the index has reserved for it."""
    try:
        try:
            return run()
        except (StorageFailure, CommitUncertain) as error:
            if not index.make_room(error):
                raise
        return run()
    finally:
        index.reserve_room()


def _batches(items: Sequence[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
