"""The exceptions and the warning of the store."""

from __future__ import annotations

import errno


class StoreError(Exception):
    """Base class of the store's errors. No acknowledged version is lost when one is raised."""


class UnknownUser(StoreError, LookupError):
    """The store holds nothing of this user: never stored, or forgotten."""


class UnknownVersion(StoreError, LookupError):
    """The user has no such version: never stored, or removed by garbage collection."""


class LeaseHeld(StoreError):
    """Another holder's lease on the user has not expired yet."""


class StaleLease(StoreError):
    """The lease no longer permits writing, and nothing was written.

    It was released, another holder took the user over, the user was forgotten, or the lease was taken by another
    process, of which this one is a fork.
    """


class DamagedState(StoreError):
    """A stored state is missing, torn or altered, and no other version could be served in its place."""


class StorageFailure(StoreError):
    """Disk, network or database failed before the commit: no version was written.

    `Store.gc` and `Store.forget` raise it after they have removed everything else, with what they could not remove.
    """


class StoreReplaced(StorageFailure):
    """The store's files were removed or replaced since it was opened: what is in their place is another store, or none.

    It is not used instead, because nobody could tell it from the folder below a disk that is not mounted. The store
    works again once its own files are back; one that was made anew has to be opened anew.
    """


class CommitUncertain(StoreError):
    """The database failed during the commit: the version may exist or not; `Store.history` tells later."""


class DamagedStateWarning(UserWarning):
    """The newest state is damaged, and an older version was served."""


def blobs_failure(what: str, error: OSError, shown: str | None = None) -> StorageFailure:
    """The error of a store whose blobs have failed with ``error``.

    Args:
        what: says what could not be done.
        shown: follows it, by default the text of ``error``.
    """
    kind = StoreReplaced if error.errno == errno.ESTALE else StorageFailure
    return kind(f"{what}: {error if shown is None else shown}")
