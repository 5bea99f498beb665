"""The exceptions and the warning of the store."""

from __future__ import annotations


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


class CommitUncertain(StoreError):
    """The database failed during the commit: the version may exist or not; `Store.history` tells later."""


class DamagedStateWarning(UserWarning):
    """The newest state is damaged, and an older version was served."""
