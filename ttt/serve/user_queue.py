"""What waits for one user of a `ttt.serve.service.Service`, and what is going on for them."""

from __future__ import annotations

import concurrent.futures
import itertools
import time
from collections import deque
from typing import TypeGuard

from ttt.serve.jobs import Job
from ttt.serve.request import Request
from ttt.serve.sessions import Fetched


class UserQueue:
    """What waits for one user, oldest first, and what is going on."""

    def __init__(self) -> None:
        self.waiting: deque[Request | Job] = deque()
        self.active = 0  # requests that are being served
        self.promised = 0  # lessons of these, and of those that were answered, which are not learnt yet
        self.job: Job | None = None  # that changes the user's weights
        self.reads = 0  # jobs that only read them
        self.opening: concurrent.futures.Future[Fetched] | None = None
        self.asked = 0.0  # when the store was asked for the user's state, by time.monotonic
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
        """Let ``job``, which learns from an answer, wait before all else but the lessons of earlier answers.

        For these there is room among what waits to be stored. Another lesson could take it, and then waits for the
        store itself.
        """
        at = sum(1 for item in itertools.takewhile(lambda item: is_lesson(item) and not item.counted, self.waiting))
        self.waiting.insert(at, job)

    def lesson_ended(self) -> None:
        """Note that a lesson that was `promised` was learnt, or will not be."""
        self.promised -= 1


def teaches(item: Request | Job) -> bool:
    """Whether ``item`` is a request that is to be learnt from once it is answered."""
    return isinstance(item, Request) and item.lesson is not None


def is_lesson(item: Request | Job) -> TypeGuard[Job]:
    """Whether ``item`` is to be learnt."""
    return isinstance(item, Job) and item.kind == "learn"
