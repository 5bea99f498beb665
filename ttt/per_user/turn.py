"""`Turn`: one thread at a time in what changes a pool of users."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

_CHANGES = threading.Condition()  # of all pools; not in a turn, which can be copied with its model


class Turn:
    """A lock which the thread that holds it may take again. Others wait, or are refused where that may take long."""

    def __init__(self) -> None:
        self._thread, self._depth, self._learning = 0, 0, 0

    def __deepcopy__(self, memo: dict) -> Turn:
        return Turn()

    def __reduce__(self):
        return Turn, ()

    @contextlib.contextmanager
    def taken(self, *, learning: bool = False) -> Iterator[None]:
        """Inside, no other thread is. ``learning``: until the block ends, others are refused and do not wait.

        Raises:
            RuntimeError: if another thread learns.
        """
        me = threading.get_ident()
        with _CHANGES:
            while self._depth and self._thread != me:
                if self._learning:
                    raise RuntimeError(
                        "another thread uses this pool of users to learn; one thread at a time may learn, and "
                        "meanwhile no other may name users or change what they learnt: serialise the calls with a lock"
                    )
                _CHANGES.wait()
            self._thread, self._depth, self._learning = me, self._depth + 1, self._learning + learning
        try:
            yield
        finally:
            with _CHANGES:
                self._depth, self._learning = self._depth - 1, self._learning - learning
                _CHANGES.notify_all()
