"""`Session`: a user who has a slot, and the right to store what is learnt from them."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
import time
from typing import Any

from torch import Tensor

from ttt.store.lease import Lease

State = dict[str, Tensor]
"""A user's state, as `ttt.Pool.export` returns it."""
TAKEN_OVER = "another server has taken over this user"


@dataclasses.dataclass
class Session:
    """A user who has a slot.

    Attributes:
        user: their id.
        lease: the right to write their versions; None if the user can only be read.
        read_only: why nothing can be learnt; empty if it can.
        updates: rises with every change of the user's weights while the user has a slot. What the weights
            computed may be kept under the user's id and this number.
        tokens: number of tokens learnt so far.
        stored: value of ``updates`` in the newest version that the store has acknowledged.
        version: the number of that version; None if there is none.
        owed_since: where updates wait to be stored, since when the store has acknowledged none, by `time.monotonic`.
        put_failed_since: since when attempts to store it fail, by `time.monotonic`; None if the last one did not.
        opened: when, by `time.monotonic`.
        writes: one for each update that is to be stored.
        dropped: whether nothing more of it is to be stored.
        forgotten: whether that is because the user is being forgotten.
        left: set once the lease was given up.
        trips: how often the user's guard has undone a change, since the user was opened.
        drift: what the guard measured after the last change that it let stand; None before the first one.
        study_failed: whether a study that nobody asked for has failed, and none has stood since then.
    """

    user: str
    lease: Lease | None
    read_only: str = ""
    updates: int = 0
    tokens: int = 0
    stored: int = 0
    version: int | None = None
    owed_since: float = 0.0
    put_failed_since: float | None = None
    opened: float = dataclasses.field(default_factory=time.monotonic)
    writes: list[concurrent.futures.Future[int]] = dataclasses.field(default_factory=list)
    dropped: bool = False
    forgotten: bool = False
    left: threading.Event = dataclasses.field(default_factory=threading.Event)
    trips: int = 0
    drift: float | None = None
    study_failed: bool = False

    @property
    def taken_over(self) -> bool:
        """Whether the lease was lost. What the store has of the user now is not known here: it may be nothing."""
        return self.read_only == TAKEN_OVER

    def lose(self) -> None:
        """Note that another server holds the lease now."""
        self.lease, self.read_only = None, TAKEN_OVER


def settle(future: concurrent.futures.Future[Any], result: Any) -> bool:
    """Give ``future`` its ``result``, an exception or a value; False if it has ended or was cancelled before."""
    try:
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)
    except concurrent.futures.InvalidStateError:
        return False
    return True
