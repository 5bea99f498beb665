"""Work on one user's weights between requests, in steps: learning, study, going back, forgetting, and reading.

A job is a generator. It yields None after each step that used the model, or a future to be continued when that is done.
Jobs run in the thread that uses the model, while no request of their user is being served.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator
from typing import Any

import torch

from ttt.conversation import Telling
from ttt.learn.learner import Learner
from ttt.learn.study import StudyOutput
from ttt.nn.budget import low_rank_square
from ttt.per_user.pacing import GuardTripped
from ttt.serve.daemon_threads import DaemonThreads
from ttt.serve.errors import Conflict, ServerFailure, Tripped, Unavailable
from ttt.serve.session import State, settle
from ttt.serve.sessions import LEARNT, ROLLED_BACK, STUDIED, Sessions
from ttt.serve.state_reader import StateReader
from ttt.serve.teaching import Lesson

LONGEST_WAIT = 10.0
"""Seconds that a job waits for the store; the user's requests wait as long."""
Steps = Generator["concurrent.futures.Future[Any] | None", None, Any]


@dataclasses.dataclass(eq=False)
class Job:
    """Work on the weights of one user.

    Attributes:
        user: whose.
        kind: "learn", "study", "rollback", "forget", "export", "taught" or "drift".
        steps: makes the generator.
        result: for who waits: what the generator returned, or its error. Cancelled by who waits no more.
        needs_slot: whether the user must have a slot.
        counted: whether it takes one of the places for what waits.
        yields_to_requests: give up when a request of the user comes in.
        tokens: number of tokens that are to be learnt.
        cost: number of tokens that are to be read for that, with context, in all passes.
        seconds: how long its steps have taken so far.
        value, error: as ``result``, whether or not that was cancelled.
        on_end: called with its error, or None, when it has ended in any way, before ``result`` is given.
        running, waits_for, until: the generator, the future that it waits for, and until when.
    """

    user: str
    kind: str
    steps: Callable[[], Steps]
    result: concurrent.futures.Future[Any] = dataclasses.field(default_factory=concurrent.futures.Future)
    needs_slot: bool = True
    counted: bool = True
    yields_to_requests: bool = False
    tokens: int = 0
    cost: int = 0
    arrival: int = 0
    seconds: float = 0.0
    value: Any = None
    error: Exception | None = None
    on_end: Callable[[Exception | None], None] = lambda error: None
    running: Steps | None = None
    waits_for: concurrent.futures.Future[Any] | None = None
    until: float = 0.0

    @property
    def reads(self) -> bool:
        """Whether it changes nothing."""
        return self.kind in ("export", "taught", "drift")

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more, so that it need not be done: what goes back or forgets is done."""
        return self.result.cancelled() and self.kind not in ("rollback", "forget")

    @property
    def ready(self) -> bool:
        """Whether the next step can be taken."""
        return self.waits_for is None or self.waits_for.done() or time.monotonic() > self.until

    def step(self) -> bool:
        """Take a step; True when there are no more: then `settle` is to be called."""
        began = time.perf_counter()
        if self.running is None:
            self.running = self.steps()
        try:
            self.waits_for = next(self.running)
            self.until = time.monotonic() + LONGEST_WAIT
            return False
        except StopIteration as done:
            self.value = done.value
        except Exception as error:
            self.error = error
        finally:
            self.seconds += time.perf_counter() - began
        return True

    def give_up(self, error: Exception) -> None:
        """End without the remaining steps."""
        self.error = error
        if self.running is not None:
            self.running.close()
        self.settle()

    def settle(self) -> None:
        """Tell who waits how it ended."""
        self.on_end(self.error)
        settle(self.result, self.value if self.error is None else self.error)


@dataclasses.dataclass(frozen=True)
class Learnt:
    """What a lesson did.

    Attributes:
        tokens: number of tokens that were learnt.
        nll: their mean loss in nats, before they were learnt; None if nothing stands before the only one that is read.
        updates: of the user's `Session` afterwards.
        stored: the number of the version that has it, once the store has acknowledged it.
    """

    tokens: int
    nll: float | None
    updates: int
    stored: concurrent.futures.Future[int]


@contextlib.contextmanager
def _all_or_nothing(sessions: Sessions, user: str):
    """Put the user's state back if the block fails or is given up."""
    before = sessions.pool.export(user)
    try:
        yield
    except BaseException:
        sessions.pool.load(user, before)
        raise


def learn(learner: Learner, sessions: Sessions, user: str, lesson: Lesson, telling: Telling) -> Steps:
    """Learn ``lesson``, read as ``telling`` says; returns `Learnt`. All of it, or nothing.

    Raises:
        Conflict: if this server cannot write for the user. Tripped: if the user's guard does not let it stand.
    """
    yield from _room(sessions, user)
    sessions.require_writable(user)
    ids, mask = lesson.tensors(next(learner.model.parameters()).device)
    with _all_or_nothing(sessions, user):
        output = yield from learner.observe_in_steps(ids, learn_mask=mask, users=[user], **telling.options)
        if output.rejected:
            raise ServerFailure("nothing was learnt: a loss or gradient was not finite")
        drift = yield from _guarded(learner, user)
        stored = sessions.learnt(user, lesson.tokens)
        sessions.use(user).drift = drift
    nll = float(output.nll[mask[:, 1:]].double().mean())
    return Learnt(lesson.tokens, nll, sessions.use(user).updates, stored)


def _guarded(learner: Learner, user: str) -> Steps:
    """Let the user's guard look at what was just learnt; returns the drift, or None without guards.

    Raises:
        Tripped: if it is too much.
    """
    guards = learner.user_guards
    if guards is None:
        return None
    yield None
    check = yield from guards.check_in_steps(user)
    if check.rolled_back:
        raise Tripped(
            f"nothing was learnt: with it the loss on the guard's held-back text would be {check.drift:.2%} above the "
            f"base model's, and {guards.bound:.2%} is allowed; go back to an earlier version, or forget the user, if "
            "every lesson is refused"
        )
    return check.drift


def read(reader: StateReader, sessions: Sessions, user: str, lesson: Lesson) -> Steps:
    """Let the user's state read what teaches in ``lesson``; returns `Learnt`. All of it, or nothing.

    Raises:
        Conflict: if this server cannot write for the user.
    """
    yield from _room(sessions, user)
    sessions.require_writable(user)
    with _all_or_nothing(sessions, user):
        try:
            nll = yield from reader.read_in_steps(user, lesson.taught)
        except FloatingPointError as error:
            raise ServerFailure(f"nothing was learnt: {error}") from error
        stored = sessions.learnt(user, lesson.tokens)
    return Learnt(lesson.tokens, nll, sessions.use(user).updates, stored)


def study(learner: Learner, sessions: Sessions, user: str, **options: Any) -> Steps:
    """Study what the user said since the last study; returns (`StudyOutput`, future of the version or None)."""
    yield from _room(sessions, user, STUDIED)
    sessions.require_writable(user, STUDIED)
    with _all_or_nothing(sessions, user):
        try:
            output: StudyOutput = yield from learner.study_in_steps(user, **options)
        except FloatingPointError as error:
            raise Conflict(str(error), code="study_failed") from error
        except GuardTripped as error:
            raise Tripped(f"the study was refused: {error}") from error
        sessions.require_writable(user, STUDIED)  # the lease may have been lost meanwhile
        stored = sessions.learnt(user, 0) if output.episodes else None
        if output.episodes and learner.user_guards is not None:
            sessions.use(user).drift = learner.user_guards.history[-1].drift
        return output, stored


def rollback(sessions: Sessions, io: DaemonThreads, user: str, version: int) -> Steps:
    """Go back to ``version``, which becomes the newest one; returns the `Session`."""
    yield from _until(sessions, user, sessions.saved, ROLLED_BACK)
    session = sessions.require_writable(user, ROLLED_BACK)
    target = yield from _done(io.submit(sessions.read_version, session, version))
    try:
        fetched = yield from _done(io.submit(sessions.rolled_back, session, target))
        return sessions.install(fetched)
    except BaseException:
        sessions.drop(user)  # the store may have gone back or not: the user is opened again with what it has
        raise


def forget(sessions: Sessions, io: DaemonThreads, user: str) -> Steps:
    """Remove everything that is kept of the user, here and in the store."""
    sessions.drop(user, forgotten=True)
    yield from _done(io.submit(sessions.erase, user))


def export(sessions: Sessions, user: str) -> Steps:
    """A copy of the user's state."""
    state: State = sessions.pool.export(user)
    return state
    yield  # a generator without steps


def taught(learner: Learner, user: str, most: int) -> Steps:
    """The user's newest ``most`` episodes: of each its tokens, which of them teach, and their loss for the base model
    and with the user's weights, in nats per token."""
    assert learner.pool is not None
    assert learner.episodes is not None
    found = []
    for episode in learner.episodes.of(user)[-most:]:
        device = next(learner.model.parameters()).device
        ids = episode.ids.to(device).repeat(2, 1)
        with torch.no_grad(), learner.pool.using([None, user]):
            logits = learner.model(input_ids=ids[:, :-1], use_cache=False).logits.float()
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        wanted = episode.learn[1:].to(device)
        before, now = nll.view(2, -1)[:, wanted].double().mean(1).tolist()
        found.append((episode.ids.tolist(), episode.learn.tolist(), before, now, episode.studied))
        yield None
    return found


def drift(learner: Learner, user: str) -> Steps:
    """How far the user's weights are from the base model's: the norm of the change, relative to that of the weights."""
    assert learner.pool is not None
    change = size = 0.0
    slot = learner.pool.slot(user)
    for layer in learner.pool.layers.values():
        rows = slice(0, int(layer.rows[slot]))
        change += float(low_rank_square(layer.a[slot, rows].double(), layer.b[slot, rows].double()))
        size += float(layer.base_weight.double().square().sum())
    return (change / size) ** 0.5
    yield  # a generator without steps


def _done(future: concurrent.futures.Future[Any]) -> Steps:
    """Wait for ``future``, and return its result."""
    while not future.done():
        yield future
    return future.result()


def _room(sessions: Sessions, user: str, what: str = LEARNT) -> Steps:
    """Wait until the store has acknowledged enough of what the user has learnt; ``what`` says what is not done else."""
    return _until(sessions, user, sessions.has_room, what)


def _until(sessions: Sessions, user: str, condition: Callable[[str], bool], what: str) -> Steps:
    """Wait until the store has acknowledged so much of what the user has learnt that ``condition`` holds."""
    began = time.monotonic()
    while not condition(user):
        sessions.require_writable(user, what)
        if time.monotonic() - began > LONGEST_WAIT:
            raise Unavailable(f"{what}: the store does not take what was learnt before", retry_after=10)
        yield sessions.oldest_write(user)
