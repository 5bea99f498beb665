"""`DaemonThreads`: an executor whose threads do not keep the process from ending."""

from __future__ import annotations

import concurrent.futures
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from ttt.serve.session import settle

R = TypeVar("R")


class DaemonThreads(concurrent.futures.Executor):
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
        self._threads = [threading.Thread(target=self._run, name=f"{name}-{at}", daemon=True) for at in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[R]:
        """A future of ``fn(*args, **kwargs)``. Raises RuntimeError after `shutdown`."""
        if self._closed:
            raise RuntimeError("no work is taken after shutdown")
        future: concurrent.futures.Future[R] = concurrent.futures.Future()
        self._work.put((future, lambda: fn(*args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work, and end when what was taken is done, or where ``cancel_futures``, cancelled."""
        self._closed = True
        while cancel_futures:
            try:
                work = self._work.get_nowait()
            except queue.Empty:
                break
            if work is not None:
                work[0].cancel()
        for _ in self._threads:
            self._work.put(None)
        if wait:
            for thread in self._threads:
                thread.join()

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
