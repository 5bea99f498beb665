"""Whether a server's store takes what is written to it, as the threads find out that write."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Iterator

from ttt.serve.errors import NotStored, Unavailable, kinds
from ttt.store import CommitUncertain, StorageFailure, StoreReplaced

REPLACED = "the store was removed or replaced while the server was running; the server must be started anew"


@dataclasses.dataclass(frozen=True)
class Stalled:
    """A store that takes nothing.

    Attributes:
        seconds: for how long.
        why: the kinds of its last error, without what could name a user; empty if it does not answer.
        replaced: whether its files were removed or replaced.
    """

    seconds: float
    why: str
    replaced: bool

    @property
    def reason(self) -> str:
        """What operators and clients are told."""
        if self.replaced:
            return REPLACED
        return f"the store has taken nothing for {self.seconds:.0f} s ({self.why or 'it does not answer'})"

    def refused(self, what: str) -> Unavailable:
        """The error of a request that was not begun; ``what`` says what was not done."""
        return Unavailable(f"{what}: {self.reason}", code="store", retry_after=None if self.replaced else 10)

    def not_stored(self) -> NotStored:
        """The error of a request that was learnt and whose version the store does not take."""
        return NotStored(
            f"what was sent is learnt and is not stored yet: {self.reason}. It is stored once the store takes it: do "
            "not send it again"
        )


class StoreHealth:
    """Notes how calls that write to a store end, in any thread.

    What writes versions may fail while the index works, as where only the disk of the blobs is full: a call that
    succeeds ends failures of its own kind, and a version that was written ends all.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failing: dict[str, tuple[float, str, bool]] = {}  # by kind: since when, why, and whether it was replaced
        self._going: dict[object, float] = {}  # calls that have not ended, since when
        self._took = -math.inf  # when the last call that wrote a version began

    @contextlib.contextmanager
    def watched(self, kind: str) -> Iterator[None]:
        """Around a call that writes a version (``kind`` "version"), or to the index only ("index")."""
        call, began = object(), time.monotonic()
        with self._lock:
            self._going[call] = began
        try:
            yield
        except (StorageFailure, CommitUncertain, OSError) as error:
            self.failed(kind, error)
            raise
        except Exception:  # the index has answered: the lease is another's, or there is no such user
            self._worked("index", began)
            raise
        else:
            self._worked(kind, began)
        finally:
            with self._lock:
                del self._going[call]

    def stalled(self, after: float) -> Stalled | None:
        """What is known of a store that has taken nothing for ``after`` seconds, or was replaced; None if it works."""
        now = time.monotonic()
        with self._lock:
            since, why, _ = min(self._failing.values(), default=(now, "", False))
            replaced = any(each for _, _, each in self._failing.values())
            seconds = now - min(since, *self._going.values(), now)
        return Stalled(seconds, why, replaced) if replaced or seconds >= after else None

    def took_since(self, moment: float) -> bool:
        """Whether a version has been written by a call that began after ``moment``, by `time.monotonic`."""
        return self._took > moment

    @property
    def failing(self) -> bool:
        """Whether the last call of a kind has failed."""
        return bool(self._failing)

    def failed(self, kind: str, error: BaseException) -> None:
        """Note that a call of ``kind`` has failed with ``error``."""
        with self._lock:
            since = self._failing[kind][0] if kind in self._failing else time.monotonic()
            self._failing[kind] = since, kinds(error), was_replaced(error)

    def _worked(self, kind: str, began: float) -> None:
        with self._lock:
            if kind == "version":
                self._failing.clear()
                self._took = max(self._took, began)
            else:
                self._failing.pop(kind, None)


def was_replaced(error: BaseException | None) -> bool:
    """Whether ``error``, or what caused it, is that the store's files were removed or replaced."""
    while error is not None:
        if isinstance(error, StoreReplaced):
            return True
        error = error.__cause__
    return False
