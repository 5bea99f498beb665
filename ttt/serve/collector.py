"""The thread of a server that removes old versions from the store, as `ttt gc` does."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable

from ttt.checks import check_real, check_whole
from ttt.store import Store, StoreError

log = logging.getLogger("ttt.serve")


class Collector:
    """Removes versions past retention every ``hours`` hours, beginning some random time after the start.

    The random time keeps replicas that were started together from collecting at the same moment. A collection that
    fails is logged, and the next one does what it left.

    Args:
        store: keeps versions.
        hours: between two collections, at most a year's; 0 for none.
        keep_last, keep_days: as in `ttt.Store.gc`.
        failed: called with a kind, "collect", after a collection that failed.
    """

    def __init__(
        self, store: Store, *, hours: float, keep_last: int, keep_days: float, failed: Callable[[str], None]
    ) -> None:
        self.store, self.failed = store, failed
        self.seconds = 3600 * check_real("collect_hours", hours, low=0.0, high=8760.0)
        self.keep_last = check_whole("keep_last", keep_last, 1)
        self.keep_days = check_real("keep_days", keep_days, low=0.0)
        self._stop = threading.Event()
        if self.seconds:
            threading.Thread(target=self._run, name="ttt-collect", daemon=True).start()

    def close(self) -> None:
        """Begin no other collection. One that is going on may be cut off: the next one completes it."""
        self._stop.set()

    def _run(self) -> None:
        wait = random.uniform(0, self.seconds)
        while not self._stop.wait(wait):
            self._collect()
            wait = self.seconds

    def _collect(self) -> None:
        try:
            removed = self.store.gc(keep_last=self.keep_last, keep_days=self.keep_days)
        except StoreError as error:
            # The text of the error names files of users.
            log.warning("removing old versions failed: %s; tried again later", type(error).__name__)
            self.failed("collect")
        except Exception:
            log.exception("removing old versions failed; tried again later")
            self.failed("collect")
        else:
            log.info("removed %d versions and %d bytes from the store", removed.versions, removed.bytes)
