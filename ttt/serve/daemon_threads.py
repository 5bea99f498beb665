"""`DaemonThreads`: does work in threads that do not keep the process from ending."""

from __future__ import annotations

import concurrent.futures
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from ttt.serve.session import settle

R = TypeVar("R")


class DaemonThreads:
    """Does work in a few threads, which end with the process even if a store never answers.

    Python waits for those of `concurrent.futures.ThreadPoolExecutor` when it ends.

    Args:
        count: how many threads.
        name: of the threads.
    """

    def __init__(self, count: int, name: str) -> None:
        self._work: queue.SimpleQueue[tuple[concurrent.futures.Future[Any], Callable[[], Any]] | None]
        self._work = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()  # no work is put after what ends the threads
        self._threads = [threading.Thread(target=self._run, name=f"{name}-{at}", daemon=True) for at in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[R]:
        """A future of ``fn(*args, **kwargs)``. Raises RuntimeError after `shutdown`."""
        future: concurrent.futures.Future[R] = concurrent.futures.Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("no work is taken after shutdown")
            self._work.put((future, lambda: fn(*args, **kwargs)))
        return future

    def shutdown(self) -> None:
        """Take no more work, and let the threads end when what was taken is done. Does not wait for that."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for _ in self._threads:
                self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            future, call = work
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = call()
            except BaseException as error:
                settle(future, error)
            else:
                settle(future, result)
            del work, future, call
