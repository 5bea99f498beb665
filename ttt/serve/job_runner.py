"""`JobRunner`: the work on users' weights that is going on in a service, a step at a time."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from ttt.serve.errors import RequestError, Tripped, Unavailable, as_request_error
from ttt.serve.jobs import Job
from ttt.serve.limits import Limits
from ttt.serve.observer import Observer
from ttt.serve.sessions import Sessions
from ttt.serve.user_queue import UserQueue
from ttt.serve.waiting import Waiting
from ttt.serve.work import Work

log = logging.getLogger("ttt.serve")


class JobRunner:
    """The jobs of a `ttt.serve.service.Service` that have begun; only the service's own thread uses it.

    Args:
        limits: of the time that jobs may take.
        work: makes the studies that nobody asked for.
        sessions: of the users.
        waiting: the users' queues.
        observer: is told how jobs ended.
        wake: called, in any thread, when what a job has waited for is there.
    """

    def __init__(
        self,
        limits: Limits,
        work: Work,
        sessions: Sessions,
        waiting: Waiting,
        observer: Observer,
        wake: Callable[[], None],
    ) -> None:
        self.limits, self.work, self.sessions, self.waiting = limits, work, sessions, waiting
        self.observer, self.wake = observer, wake
        self._jobs: deque[Job] = deque()  # the next one to take a step first
        self._owed = 0.0  # seconds of generating that must pass before the next step of a job

    @property
    def idle(self) -> bool:
        """Whether no job is going on."""
        return not self._jobs

    @property
    def ready(self) -> bool:
        """Whether a job can take a step."""
        return any(job.ready for job in self._jobs)

    def begin(self, job: Job, waits: UserQueue) -> None:
        """Let ``job``, of the user of ``waits``, take steps from now on."""
        if job.reads:
            waits.reads += 1
        else:
            waits.job = job
        self._jobs.append(job)

    def give_up(self, job: Job, error: RequestError) -> None:
        """End ``job``, which has begun, without its remaining steps."""
        job.give_up(error)
        self._end(job)

    def give_up_cancelled(self, error: RequestError) -> None:
        """End the jobs that nobody waits for any more."""
        for job in [job for job in self._jobs if job.cancelled]:
            self.give_up(job, error)

    def turn(self, generating: float, *, alone: bool) -> None:
        """Take a step of one job, if the time of the answers lets it.

        Args:
            generating: seconds that the last step of the answers took.
            alone: whether no answer is being generated.
        """
        began = time.perf_counter()
        if alone:
            self._owed = 0.0
        if self._owed <= 0:
            self._step()
        # What a step of a job takes is owed to the answers, which pay it back with their share of the time.
        share = self.limits.learning_share
        self._owed += (time.perf_counter() - began) * (1 - share) / share - generating
        self._owed = max(self._owed, 0.0)

    def is_to_study(self, user: str | None) -> bool:
        """Whether ``user`` said something that is to be studied when there is nothing else to do.

        Nothing is after such a study has failed, as one does that the guard refuses: each further lesson would cost a
        whole study.
        """
        session = None if user is None else self.sessions.get(user)
        return session is not None and not session.study_failed and self.work.unstudied(user)

    def look_for_study(self) -> None:
        """Where nothing else is to be done, let a user's words be studied who has said nothing for a while."""
        if not self.limits.study_after or self._jobs:
            return
        now = time.monotonic()
        for user, waits in self.waiting.queues.items():
            if user is None or not waits.to_study or not waits.idle or now - waits.last < self.limits.study_after:
                continue
            session = self.sessions.get(user)
            if session is None or session.read_only:
                waits.to_study = False
                continue
            job = self.work.study(user)
            job.yields_to_requests, job.counted = True, False
            return self.begin(job, waits)

    def _step(self) -> None:
        """Take a step of the next job that can take one."""
        for _ in range(len(self._jobs)):
            self._jobs.rotate(-1)
            job = self._jobs[-1]
            if not job.ready:
                continue
            if job.step():
                try:
                    self._ended(job)
                finally:
                    job.settle()  # who waits finds everything counted
            elif job.waits_for is not None:
                job.waits_for.add_done_callback(lambda _: self.wake())
            return

    def _end(self, job: Job) -> None:
        """Take a job that has ended out of what goes on."""
        self._jobs.remove(job)
        waits = self.waiting.queues[job.user]
        if job.reads:
            waits.reads -= 1
        else:
            waits.job, waits.last = None, time.monotonic()
        self.waiting.leave(job)

    def _ended(self, job: Job) -> None:
        self._end(job)
        waits, failed = self.waiting.queues[job.user], job.error is not None
        if isinstance(job.error, Tripped):
            self.observer.tripped()
            if (session := self.sessions.get(job.user)) is not None:
                session.trips += 1
        elif job.error is not None and as_request_error(job.error).status >= 500:
            # Below that, who asked is told what was wrong, and nothing failed here.
            self.observer.failed(job.kind)
            if not isinstance(job.error, RequestError):
                log.error("work on a user's weights failed: %s", job.kind, exc_info=job.error)
        if job.kind == "learn" and not failed:
            waits.to_study = self.is_to_study(job.user)
            self.observer.learnt(job.tokens, job.seconds)
        elif job.kind == "study":
            waits.to_study = False
            session = self.sessions.get(job.user)
            if session is not None and (
                not failed or (job.yields_to_requests and not isinstance(job.error, Unavailable))
            ):
                session.study_failed = failed
            if not failed:
                self.observer.studied(job.value[0].episodes, job.seconds)
        elif job.kind == "forget":
            waits.forgetting = waits.to_study = False
        elif job.kind == "rollback" and not failed:
            waits.to_study = self.is_to_study(job.user)
