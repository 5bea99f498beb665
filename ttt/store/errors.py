"""What the store raises and warns of."""

from __future__ import annotations


class StoreError(Exception):
    """Base of the store's errors. Nothing that was acknowledged is lost when one is raised."""


class UnknownUser(StoreError, LookupError):
    """The store holds nothing of this user: never stored, or forgotten."""


class UnknownVersion(StoreError, LookupError):
    """The user has no such version: never stored, or past its retention."""


class LeaseHeld(StoreError):
    """Another holder's lease on the user has not expired yet."""


class StaleLease(StoreError):
    """The lease was released, or another took the user over, or the user was forgotten: nothing was written."""


class DamagedState(StoreError):
    """A stored state is missing, torn or altered, and no other was to be served in its place."""


class StorageFailure(StoreError):
    """Disk, network or database failed before the commit: nothing was written."""


class CommitUncertain(StoreError):
    """The database failed in the commit itself: the version may stand or not, which `Store.history` tells later."""


class DamagedStateWarning(UserWarning):
    """The newest state is damaged, and an older version was served."""
