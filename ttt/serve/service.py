"""`Service`: one thread that answers requests of many users and learns from them between its steps."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from ttt.conversation import Telling
from ttt.learn.learner import Learner
from ttt.per_user.pool import Pool
from ttt.serve import jobs
from ttt.serve.acknowledgements import Acknowledgements
from ttt.serve.batch import Batch
from ttt.serve.daemon_threads import DaemonThreads
from ttt.serve.errors import Conflict, HungUp, NotStored, RequestError, Unavailable, as_request_error
from ttt.serve.job_runner import JobRunner
from ttt.serve.jobs import Job, Learnt
from ttt.serve.limits import Limits
from ttt.serve.missed import MissedTurns, forgotten
from ttt.serve.observer import Observer, Silent
from ttt.serve.openings import Openings
from ttt.serve.places import Places
from ttt.serve.prefixes import Prefixes
from ttt.serve.request import Outcome, Request
from ttt.serve.row_cache import RowCache
from ttt.serve.sessions import LEARNT, ROLLED_BACK, STUDIED, Sessions
from ttt.serve.state_reader import StatePool, StateReader
from ttt.serve.state_rows import StateRows
from ttt.serve.store_health import Stalled
from ttt.serve.teaching import Lesson
from ttt.serve.user_queue import UserQueue, is_lesson, teaches
from ttt.serve.waiting import Waiting
from ttt.serve.work import StatesWork, WeightsWork, Work
from ttt.store import Store

log = logging.getLogger("ttt.serve")
NOBODY = "nobody waits for the answer any more"


class Service:
    """Serves a language model whose users have weights, or a state, of their own, and learns from them.

    Requests of one user and work on that user's weights take turns: a request is answered with one state of the
    weights from its first token to its last, and the next request waits until what was to be learnt from the one before
    is learnt. Nobody waits for another user's learning for longer than one step of it.

    Args:
        learner: of a model that was adapted with ``TTTConfig(per_user=...)``, with an `ttt.EpisodeLog`, calibrated; or
            a `StateReader`, whose users have states that read what they say.
        tokenizer: of the model.
        store: keeps users' versions.
        model_id: a short name of the weights, see `Sessions`.
        limits: bounds on what is taken.
        telling: how what users say is read, where they have weights.
        lease_seconds: see `Sessions`.
        observer: is told what happens.

    Raises:
        ValueError: if the model has no users or an attention that `RowCache` cannot keep, or the learner no log.
    """

    def __init__(
        self,
        learner: Learner | StateReader,
        tokenizer: Any,
        store: Store,
        model_id: str,
        *,
        limits: Limits | None = None,
        telling: Telling | None = None,
        lease_seconds: float = 30.0,
        observer: Observer | None = None,
    ) -> None:
        self.limits, self.telling, self.observer = limits or Limits(), telling or Telling(), observer or Silent()
        self.context = min(self.limits.context, learner.context)
        self.reads = isinstance(learner, StateReader)  # whether users have states, not weights
        cache: RowCache | StateRows
        if isinstance(learner, StateReader):
            cache = StateRows(learner.pool, self.limits.rows)
        elif learner.pool is None or learner.episodes is None:
            raise ValueError("learner must be one of a model adapted with per_user, with an ttt.EpisodeLog")
        else:
            cache = RowCache(learner.model, learner.pool, self.limits.rows, self.context)
        self.learner, self.tokenizer, self.store = learner, tokenizer, store
        self.pool: Pool | StatePool = cache.pool
        self.sessions = Sessions(
            self.pool, store, model_id, lease_seconds=lease_seconds, on_stored=self.observer.stored
        )  # fmt: skip
        self._work: Work = (
            StatesWork(learner, self.sessions)
            if isinstance(learner, StateReader)
            else WeightsWork(learner, self.sessions, self.telling)
        )
        prefixes = Prefixes.of(cache, self.limits.prefix_cache, self.sessions.get, self.observer)
        self.batch = Batch(cache, tokenizer, prefill=self.limits.prefill, ended=self._ended, prefixes=prefixes)
        self._io = DaemonThreads(4, "ttt-io")
        self._inbox: queue.SimpleQueue[Request | Job | None] = queue.SimpleQueue()
        self._places = Places(self.limits)
        self._waiting = Waiting(self._places, self._cost)
        self._openings = Openings(
            self.sessions, self._waiting.queues, self._io, self.observer, lambda: self._inbox.put(None)
        )  # fmt: skip
        self.missed = MissedTurns(self.observer.missed)
        self._acknowledgements = Acknowledgements(
            lambda: jobs.LONGEST_WAIT,
            lambda user: self.sessions.not_stored(user, jobs.LONGEST_WAIT),
            self.missed.note,
        )  # fmt: skip
        self._jobs = JobRunner(
            self.limits, self._work, self.sessions, self._waiting, self.observer, lambda: self._inbox.put(None)
        )  # fmt: skip
        self._lock = threading.Lock()  # what comes in is taken before the service drains, or refused
        self._draining = False
        self._drain_until: float | None = None
        self._thread = threading.Thread(target=self._run, name="ttt-model", daemon=True)
        self._thread.start()

    # -- from any thread ----------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Serve ``request`` when its turn comes.

        Raises:
            BadRequest: if it asks for more sequences than are generated at a time. TooBusy: if too much waits already.
            Unavailable: if the service is ending, or the store does not take what the user has taught before, or, where
                the answer is to wait for it, takes nothing.
        """
        self.limits.check_n(request.n)
        with self._lock:
            self._require_open()
            if request.lesson is not None and request.user is not None:
                self._require_store(wait=request.wait)
            if request.lesson is not None and (error := self._stalled(request.user)) is not None:
                raise error
            self._places.take(request.user, self._cost(request))
            self._inbox.put(request)

    def learn(self, user: str, lesson: Lesson, telling: Telling | None = None) -> concurrent.futures.Future[Learnt]:
        """Learn ``lesson`` when the user's turn comes, read as ``telling`` says; see `ttt.serve.jobs.learn`.

        Raises:
            Unavailable: if the store takes nothing, as for `study` and `rollback`.
        """
        self._require_store()
        return self._enter(self._work.lesson(user, lesson, telling))

    def stored(self, user: str, version: concurrent.futures.Future[int]) -> concurrent.futures.Future[int]:
        """The number of a version of ``user`` that is being stored; who waits no more may cancel it.

        It ends with `NotStored` if the store takes nothing for `ttt.serve.jobs.LONGEST_WAIT` seconds. Then, too, the
        version is stored once the store takes it, and counts as missed if it never does.
        """
        return self._acknowledgements.wait(user, version)

    @property
    def stalled(self) -> Stalled | None:
        """What is known of a store that takes nothing; None if it works."""
        return self.sessions.health.stalled(jobs.LONGEST_WAIT)

    def study(self, user: str, **options: Any) -> concurrent.futures.Future[Any]:
        """See `ttt.serve.jobs.study`; ``options`` are those of `ttt.Learner.study`.

        Raises:
            BadRequest: if users have states, as for `export`, `drift` and `taught`.
        """
        job = self._work.study(user, **options)
        self._require_store(STUDIED)
        return self._enter(job)

    def rollback(self, user: str, version: int) -> concurrent.futures.Future[Any]:
        """See `ttt.serve.jobs.rollback`."""
        self._require_store(ROLLED_BACK)
        return self._enter(Job(user, "rollback", lambda: jobs.rollback(self.sessions, self._io, user, version)))

    def forget(self, user: str) -> concurrent.futures.Future[None]:
        """See `ttt.serve.jobs.forget`."""

        def ended(error: Exception | None) -> None:
            if error is None:
                self.missed.forget(user)
            else:
                self.missed.not_forgotten(user, error)

        steps = functools.partial(jobs.forget, self.sessions, self._io, user)
        return self._enter(Job(user, "forget", steps, needs_slot=False, on_end=ended))

    def export(self, user: str) -> concurrent.futures.Future[Any]:
        """A copy of the user's weights, see `ttt.Pool.export`."""
        return self._enter(self._work.export(user))

    def drift(self, user: str) -> concurrent.futures.Future[float]:
        """See `ttt.serve.jobs.drift`."""
        return self._enter(self._work.drift(user))

    def taught(self, user: str, most: int) -> concurrent.futures.Future[Any]:
        """See `ttt.serve.jobs.taught`."""
        return self._enter(self._work.taught(user, most))

    def io(self, work: Callable[..., Any], *args: Any) -> concurrent.futures.Future[Any]:
        """Do ``work``, which waits for the store, in a thread of its own."""
        return self._io.submit(work, *args)

    @property
    def waiting(self) -> int:
        """Number of requests and jobs that wait for their turn."""
        return self._places.waiting

    @property
    def learning_tokens(self) -> int:
        """Number of tokens that are to be read, to learn from them, with context, in all passes."""
        return self._places.tokens

    @property
    def alive(self) -> bool:
        """Whether requests are served, and what they teach is stored."""
        return self._thread.is_alive() and self.sessions.alive and not self._draining

    def drain(self, timeout: float | None = None, *, storing: float | None = None) -> list[str]:
        """Take no more requests, serve and learn what has come in, store it, and end.

        Args:
            timeout: seconds after which requests and jobs that are not done yet are refused. What was served is learnt
                however long that takes. What waits for an answer of the store is given up
                `ttt.serve.jobs.LONGEST_WAIT` seconds later.
            storing: seconds that the store then has to take what was learnt; None for ``timeout``.

        Returns:
            The users of whom something was not stored in that time.
        """
        with self._lock:
            self._draining = True
            self._drain_until = None if timeout is None else time.monotonic() + timeout
        self._inbox.put(None)
        self._thread.join()
        unsaved = self.sessions.close(timeout if storing is None else storing)
        self._io.shutdown()
        return unsaved

    def _require_open(self) -> None:
        if self._draining or not self._thread.is_alive():
            raise Unavailable("the server is stopping", retry_after=10)

    def _require_store(self, what: str = LEARNT, *, wait: bool = True) -> None:
        """Raise Unavailable if the store takes nothing.

        Args:
            what: says what was not done.
            wait: whether somebody waits for it; otherwise only a store that was replaced, which never will, is refused.
        """
        if (stalled := self.stalled) is not None and (wait or stalled.replaced):
            raise stalled.refused(what)

    def _enter(self, job: Job) -> concurrent.futures.Future[Any]:
        with self._lock:
            self._require_open()
            self._places.take(job.user, job.cost)
            self._inbox.put(job)
        return job.result

    # -- the service's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                if not self._turn():
                    return
            except Exception as error:
                log.exception("a step of the service failed")
                with contextlib.suppress(Exception):
                    self.observer.failed("step")
                    self.batch.fail_all(as_request_error(error))
                time.sleep(0.01)  # if it fails again and again, other threads must still run

    def _turn(self) -> bool:
        """Take in what has come, and take a step of everything that can; False at the end."""
        self._acknowledgements.look()
        nothing_to_do = self.batch.idle and not self._jobs.ready
        self._receive(block=nothing_to_do)
        if self._draining and self._drain_until is not None and time.monotonic() > self._drain_until:
            error = Unavailable("the server is stopping", retry_after=10)
            self._refuse_all(error)
            self._give_up_waiting(error, late=time.monotonic() > self._drain_until + jobs.LONGEST_WAIT)
        self._start()
        began = time.perf_counter()
        self.batch.read_step()
        self.batch.decode_step()
        self._jobs.turn(time.perf_counter() - began, alone=self.batch.idle)
        if self.batch.idle and not self._draining:
            self._jobs.look_for_study()
        if self._draining and self._inbox.empty():
            return not (self.batch.idle and self._jobs.idle and self._waiting.idle)
        return True

    def _receive(self, block: bool) -> None:
        """Put what has come into the queues of its users. ``block``: wait a little if nothing has."""
        waits = not self._jobs.idle or self._draining or self._waiting.can_start
        with contextlib.suppress(queue.Empty):
            item = self._inbox.get(timeout=0.005 if waits else 0.1) if block else self._inbox.get_nowait()
            while True:
                if item is not None:
                    self._add(item)
                item = self._inbox.get_nowait()

    def _add(self, item: Request | Job) -> None:
        job = self._waiting.add(item).job
        if isinstance(item, Job) and item.reads:
            return  # goes on beside a study
        if job is not None and job.yields_to_requests:
            self._jobs.give_up(job, Conflict("the study was given up for a request; it begins anew later"))

    def _start(self) -> None:
        """Start what waits at the head of the queues, oldest first."""
        full = False  # or reserved for a request that needs more rows than are free
        self._jobs.give_up_cancelled(HungUp(NOBODY))
        for user, waits in self._waiting.in_order():
            self._waiting.end(waits, lambda item: item.cancelled, HungUp(NOBODY))
            try:
                if self._openings.install(waits):
                    waits.to_study = self._jobs.is_to_study(user)
            except Exception as error:
                self._waiting.end(waits, lambda item: True, as_request_error(error))
            if self._openings.late(waits):
                late = Unavailable(
                    "the store does not answer, so that nothing can be done; try again later", retry_after=2
                )
                self._waiting.end(waits, lambda item: True, late)
            elif waits.fetched is not None and (stalled := self.stalled) is not None:
                # Users whose weights are not stored keep their slots.
                self._waiting.end(waits, lambda item: True, stalled.refused("no slot is free for this user"))
            if (full_store := self._stalled(user)) is not None:
                self._waiting.end(waits, teaches, full_store)
            while waits.waiting:
                item = waits.waiting[0]
                if isinstance(item, Job):
                    if not self._start_job(item, waits):
                        break
                elif not self._may_begin(item, waits):
                    break
                elif full or not self.batch.fits(item):
                    full = True
                    break
                else:
                    waits.waiting.popleft()
                    self._places.leave(item.user)
                    waits.active += 1
                    waits.promised += teaches(item)
                    self.batch.begin(item)
        self._waiting.tidy(lambda user: self.sessions.get(user) is not None)
        for user in self.sessions.lost():  # what they learnt last was refused: they begin with what is stored
            if self._waiting.is_idle(user):
                self.sessions.drop(user)

    def _may_begin(self, request: Request, waits: UserQueue) -> bool:
        """Whether the user's weights are there and stay as they are, and what is taught has room; rows apart."""
        if waits.job is not None or not self._openings.has_session(request.user, waits):
            return False
        return not teaches(request) or self._has_room(request.user)

    def _start_job(self, job: Job, waits: UserQueue) -> bool:
        """Start the first item that waits, a job, if it can be; whether the next one may be looked at."""
        if job.reads:
            # Until a study ends it writes nothing.
            if (waits.job is not None and waits.job.kind != "study") or not self._openings.has_session(job.user, waits):
                return False
            waits.waiting.popleft()
            self._jobs.begin(job, waits)
            return True
        if waits.active or waits.reads or waits.job is not None:
            return False
        if job.needs_slot and not self._openings.has_session(job.user, waits):
            return False
        if job.kind == "forget":
            waits.forgetting = True
            self.missed.forgetting(job.user)
            self._waiting.end(waits, is_lesson, forgotten())
            if waits.opening is not None:
                return False
            if waits.fetched is not None:
                self.sessions.discard(waits.fetched)
                waits.fetched = None
        waits.waiting.remove(job)
        self._jobs.begin(job, waits)
        return False

    # -- refusing -----------------------------------------------------------------------------------------------------

    def _refuse_all(self, error: RequestError) -> None:
        """End everything but lessons that answers have promised, and what has begun to change a user's versions."""
        for waits in self._waiting.queues.values():
            self._waiting.end(waits, lambda item: not isinstance(item, Job) or item.counted, error)
            if waits.job is not None and waits.job.kind == "study":
                self._jobs.give_up(waits.job, error)
        for request in self.batch.requests:
            if not request.cancelled:
                request.cancelled = True
                request.deliver(error)

    def _give_up_waiting(self, error: RequestError, late: bool) -> None:
        """End waiting for reads of the store that nothing needs any more; ``late``: for all answers of the store."""
        for waits in self._waiting.queues.values():
            if waits.opening is not None and not waits.opening.done() and (late or not waits.waiting):
                self._waiting.end(waits, lambda item: True, error)
                self._openings.abandon(waits)
            job = waits.job
            if late and job is not None and job.waits_for is not None and not job.waits_for.done():
                self._jobs.give_up(job, error)

    # -- learning -----------------------------------------------------------------------------------------------------

    def _ended(self, request: Request) -> None:
        """All sequences of ``request`` have ended: learn from it, and tell its sender."""
        waits = self._waiting.queues[request.user]
        waits.active -= 1
        waits.last = time.monotonic()
        if request.cancelled or request.failed:
            return self._unlearnt(request, waits)
        self.observer.served(len(request.prompt), request.generated)
        if request.user is None:
            self._unlearnt(request, waits)
            return request.deliver(self._outcome(request, "off"))
        session = self.sessions.use(request.user)
        if request.lesson is None:
            return request.deliver(self._outcome(request, "off"))
        if session.read_only or waits.forgetting:
            why = session.read_only or "the user is being forgotten"
            self._unlearnt(request, waits)
            return request.deliver(self._outcome(request, f"refused: {why}"))
        job = self._work.lesson(request.user, request.lesson)
        job.arrival, job.counted = request.arrival, False
        waits.put_lesson(job)
        job.result.add_done_callback(lambda done: waits.lesson_ended())
        if request.wait:
            job.result.add_done_callback(lambda done: self._tell_when_stored(request, done))
        else:
            self._note_if_missed(request.user, job.result)
            request.deliver(self._outcome(request, "queued"))

    def _unlearnt(self, request: Request, waits: UserQueue) -> None:
        """The lesson of ``request``, if there is one, will not be learnt."""
        self._places.learnt(self._cost(request))
        if teaches(request):
            waits.lesson_ended()

    def _has_room(self, user: str | None) -> bool:
        """Whether ``user`` may be promised to learn one turn more, with those that are promised already.

        What is promised is never given up for want of room: without it the request waits before it is answered.
        """
        session = None if user is None else self.sessions.get(user)
        if user is None or session is None or session.read_only:
            return True  # it will not be learnt, or is not known yet
        waits = self._waiting.queues.get(user)
        return self.sessions.has_room(user, 0 if waits is None else waits.promised)

    def _stalled(self, user: str | None) -> Unavailable | None:
        """The error of requests that teach, where there is no room for what they teach and the store takes nothing."""
        with contextlib.suppress(KeyError):  # another thread may ask while the user leaves
            if user is None or self._has_room(user) or self.sessions.waits_for_store(user) < jobs.LONGEST_WAIT:
                return None
            return Unavailable(
                "the store does not take what this user has taught before, and no more may wait for it; try again "
                "later, or with x-ttt-learn: off", retry_after=10,
            )  # fmt: skip
        return None

    def _note_if_missed(self, user: str, learnt: concurrent.futures.Future[Learnt]) -> None:
        """Let the user read of it if what ``learnt`` stands for is not learnt, or not stored in the end."""

        def note(done: concurrent.futures.Future[Any]) -> None:
            if (error := done.exception()) is not None:
                self.missed.note(user, error)
            elif isinstance(done.result(), Learnt):
                done.result().stored.add_done_callback(note)

        learnt.add_done_callback(note)

    def _cost(self, request: Request) -> int:
        """How many tokens are to be read to learn from ``request``."""
        return 0 if request.lesson is None else self._work.cost(request.lesson)

    def _tell_when_stored(self, request: Request, done: concurrent.futures.Future[Learnt]) -> None:
        if (error := done.exception()) is not None:
            return request.deliver(self._outcome(request, f"refused: {error}"))
        learnt = done.result()
        # By then the user may be another session's, or nobody's.
        counts = len(request.prompt), request.generated

        def tell(stored: concurrent.futures.Future[int]) -> None:
            if (error := stored.exception()) is not None:
                if isinstance(error, NotStored):
                    return request.deliver(error)
                # The store has refused it: another server may have written, or removed, whatever the user had.
                return request.deliver(Outcome(*counts, learning=f"refused: {error}"))
            request.deliver(Outcome(*counts, learnt.updates, stored.result(), "stored"))

        assert request.user is not None
        self.stored(request.user, learnt.stored).add_done_callback(tell)

    def _outcome(self, request: Request, learning: str) -> Outcome:
        session = None if request.user is None else self.sessions.get(request.user)
        outcome = Outcome(len(request.prompt), request.generated, learning=learning)
        return outcome if session is None or session.taken_over else dataclasses.replace(
            outcome, updates=session.updates, version=session.version
        )  # fmt: skip
