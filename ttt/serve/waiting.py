"""What waits in a `ttt.serve.service.Service`: the queues of its users, in the order in which it came."""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable

from ttt.serve.errors import RequestError
from ttt.serve.jobs import Job
from ttt.serve.places import Places
from ttt.serve.request import Request
from ttt.serve.user_queue import UserQueue


class Waiting:
    """The queues of a service's users; only the service's own thread uses it.

    Args:
        places: what counts how much waits.
        cost: how many tokens are to be read to learn from a request.

    Attributes:
        queues: by user; None for the base model.
    """

    def __init__(self, places: Places, cost: Callable[[Request], int]) -> None:
        self.places, self.cost = places, cost
        self.queues: OrderedDict[str | None, UserQueue] = OrderedDict()
        self._count = itertools.count()

    @property
    def idle(self) -> bool:
        """Whether nothing waits or is going on for any user."""
        return all(each.idle for each in self.queues.values())

    @property
    def can_start(self) -> bool:
        """Whether there is something that may start as soon as something else ends."""
        return any(each.waiting or each.fetched for each in self.queues.values())

    def is_idle(self, user: str) -> bool:
        """Whether nothing waits or is going on for ``user``."""
        return user not in self.queues or self.queues[user].idle

    def add(self, item: Request | Job) -> UserQueue:
        """Put ``item``, which has just come, at the end of its user's queue, which is returned."""
        item.arrival = next(self._count)
        waits = self.queues.setdefault(item.user, UserQueue())
        waits.waiting.append(item)
        if not (isinstance(item, Job) and item.reads):
            waits.last = time.monotonic()
        return waits

    def in_order(self) -> list[tuple[str | None, UserQueue]]:
        """Users for whom something waits or whose state is being read, with their queues: the oldest item first."""
        return sorted(
            ((user, waits) for user, waits in self.queues.items() if waits.waiting or waits.opening or waits.fetched),
            key=lambda pair: pair[1].waiting[0].arrival if pair[1].waiting else -1,
        )

    def end(self, waits: UserQueue, which: Callable[[Request | Job], bool], error: RequestError) -> None:
        """End what waits in ``waits``, if ``which`` says so, with ``error``."""
        for item in [item for item in waits.waiting if which(item)]:
            waits.waiting.remove(item)
            if isinstance(item, Job):
                item.give_up(error)
                if item.kind == "forget":
                    waits.forgetting = False  # it had not begun
                self.leave(item)
            else:
                self.places.leave(item.user)
                self.places.learnt(self.cost(item))
                if not item.cancelled:
                    item.deliver(error)

    def leave(self, job: Job) -> None:
        """Give back the places of ``job``, which has ended."""
        self.places.learnt(job.cost)
        if job.counted:
            self.places.leave(job.user)

    def tidy(self, has_slot: Callable[[str], bool]) -> None:
        """Drop the queues of users for whom nothing is to be done and who have no slot."""
        for user in [user for user, waits in self.queues.items() if waits.idle]:
            if user is None or not has_slot(user):
                del self.queues[user]
