"""What waits for one user of a `ttt.serve.service.Service`, and what is going on for them."""

from __future__ import annotations

import concurrent.futures
import itertools
import time
from collections import deque

from ttt.serve.jobs import Job
from ttt.serve.request import Request
from ttt.serve.sessions import Fetched


class UserQueue:
    """What waits for one user, oldest first, and what is going on."""

    def __init__(self) -> None:
        self.waiting: deque[Request | Job] = deque()
        self.active = 0  # requests that are being served
        self.job: Job | None = None  # that changes the user's weights
        self.reads = 0  # jobs that only read them
        self.opening: concurrent.futures.Future[Fetched] | None = None
        self.fetched: Fetched | None = None
        self.forgetting = False
        self.last = time.monotonic()
        self.to_study = False

    @property
    def idle(self) -> bool:
        """Whether nothing waits or is going on."""
        return (
            not self.waiting and not self.active and not self.reads and self.job is None and self.opening is None
            and not self.fetched
        )  # fmt: skip

    def put_lesson(self, job: Job) -> None:
        """Let ``job``, which learns from an answer, wait before the requests, and after lessons that wait already."""
        at = sum(1 for item in itertools.takewhile(is_lesson, self.waiting))
        self.waiting.insert(at, job)


def is_lesson(item: Request | Job) -> bool:
    """Whether ``item`` is to be learnt."""
    return isinstance(item, Job) and item.kind == "learn"
