"""Persistent, versioned, crash-safe storage of per-user weights.

store = ttt.Store("users")  # a folder; or SQLite and S3, or PostgreSQL
with store.lease("ada") as lease:
    version = store.put(lease, tensors, {"tokens": 1200})
state = store.get("ada")  # state.tensors, state.meta, state.version
store.rollback("ada", version - 1); store.history("ada"); store.forget("ada"); store.gc(); store.verify()
"""

from ttt.store.errors import (
    CommitUncertain,
    DamagedState,
    DamagedStateWarning,
    LeaseHeld,
    StaleLease,
    StorageFailure,
    StoreError,
    StoreReplaced,
    UnknownUser,
    UnknownVersion,
)
from ttt.store.lease import Lease
from ttt.store.maintenance import Collected
from ttt.store.records import User, Version
from ttt.store.store import State, Store
from ttt.store.verification import Broken, Report

__all__ = [
    "Broken",
    "Collected",
    "CommitUncertain",
    "DamagedState",
    "DamagedStateWarning",
    "Lease",
    "LeaseHeld",
    "Report",
    "StaleLease",
    "State",
    "StorageFailure",
    "Store",
    "StoreError",
    "StoreReplaced",
    "UnknownUser",
    "UnknownVersion",
    "User",
    "Version",
]
