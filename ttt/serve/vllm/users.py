"""The users in vLLM's worker: opening, learning, forgetting. All of it runs between two steps of the model.

What takes longer than a step may is a generator, which is taken on by further calls: learning, and waiting for the
store.
"""

from __future__ import annotations

import atexit
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import torch

import ttt
from ttt.config import TTTConfig
from ttt.conversation import CONVERSATION
from ttt.defences import LowRank
from ttt.learn.learner import Learner
from ttt.serve import jobs
from ttt.serve.daemon_threads import DaemonThreads
from ttt.serve.errors import Conflict, RequestError, ServerFailure, TooBusy
from ttt.serve.session import Session
from ttt.serve.sessions import ROLLED_BACK, Sessions
from ttt.serve.vllm import calibration
from ttt.serve.vllm.adapters import Adapters
from ttt.serve.vllm.blocks import TopBlocks
from ttt.serve.vllm.capture import Capture
from ttt.serve.vllm.lessons import learn_in_slices
from ttt.serve.vllm.options import STORING, Options
from ttt.serve.vllm.top_blocks import top_blocks
from ttt.store import Store

log = logging.getLogger("vllm.ttt")
T = TypeVar("T")
Steps = Generator[float, None, T]
"""Yields how many seconds may pass before it is taken on; 0 for none."""
_IO_WAIT = 0.002
ALONE = 100.0
"""Milliseconds of learning at a time while the engine answers nobody; a request that comes then waits for them."""
OPERATIONS = ("open", "learn", "stored", "unsaved", "forget", "rollback", "status", "drop", "end")


class Users:
    """Everything of the plugin that is in the worker's process.

    Args:
        runner: vLLM's model runner, whose adapters have just been set up.
        model: vLLM's model.
        config: vLLM's ``VllmConfig``.
        options: the plugin's.
    """

    def __init__(self, runner: Any, model: Any, config: Any, options: Options) -> None:
        self.options, self.runner = options, runner
        hf_config = config.model_config.hf_config
        blocks = options.blocks(hf_config.num_hidden_layers)
        with torch.inference_mode(False):
            top = top_blocks(model, hf_config, blocks.start)
            settings = TTTConfig(
                target_modules=["down_proj"], lr=options.lr, chunk=options.chunk, protect=CONVERSATION.protect,
                per_user=LowRank(slots=options.slots, rank=options.rank, window=options.window),
            )  # fmt: skip
            ttt.adapt_(top, settings)
            self.learner = Learner(top)
            self.blocks = TopBlocks(top)
            self.pool = ttt.pool_of(top)
            name = calibration.calibrate(self.pool, settings, config.model_config, options.calibration)
        self.sessions = Sessions(self.pool, Store(options.store), name, lease_seconds=options.lease)
        self.adapters = Adapters(runner.lora_manager._adapter_manager, self.pool, options.adapter_rank)
        self.capture = Capture(runner, options.captured)
        model.model.layers[blocks.start].register_forward_pre_hook(self.capture.before_block)
        self._stamps, self._tickets = itertools.count(1), itertools.count(1)
        self._stamp: dict[str, int] = {}  # by user, another one for each state of their weights
        self._lesson: dict[str, dict[str, float]] = {}  # by user, what the last one took
        self._running: dict[int, Generator[float, None, Any]] = {}
        self._kept: list[str] = []  # users who keep their slots, as the API server said last
        self._threads = DaemonThreads(2, "ttt-io")
        atexit.register(self.close)

    # -- what the API server calls ------------------------------------------------------------------------------------

    def begin(self, operation: str, *arguments: Any) -> tuple[str, Any, Any]:
        """Begin one of `OPERATIONS`; see `proceed`."""
        if operation not in OPERATIONS:
            raise ValueError(f"operation must be one of {OPERATIONS}, got {operation!r}")
        ticket = next(self._tickets)
        self._running[ticket] = getattr(self, operation)(*arguments)
        return self.proceed(ticket)

    def proceed(self, ticket: int) -> tuple[str, Any, Any]:
        """Take an operation on.

        Returns:
            ("later", ticket, seconds): `proceed` is to be called again after so many seconds;
            ("done", what the operation returns, None); or ("error", its class, its arguments by name).
        """
        steps = self._running.pop(ticket)
        try:
            seconds = next(steps)
        except StopIteration as done:
            return "done", done.value, None
        except RequestError as error:
            told = {name: getattr(error, name) for name in ("message", "param", "code", "retry_after")}
            return "error", type(error).__name__, told
        except Exception as error:
            log.exception("an operation of ttt failed")
            return "error", ServerFailure.__name__, {"message": f"{type(error).__name__}: {error}"}
        self._running[ticket] = steps
        return "later", ticket, seconds

    def cancel(self, ticket: int) -> None:
        """End an operation that nobody waits for any more."""
        steps = self._running.pop(ticket, None)
        if steps is not None:
            steps.close()

    def close(self) -> None:
        """Store what waits to be stored, and end."""
        atexit.unregister(self.close)
        for ticket in list(self._running):
            self.cancel(ticket)
        self._leave()

    # -- operations ---------------------------------------------------------------------------------------------------

    def open(self, user: str, key: str, kept: list[str]) -> Steps[dict[str, Any]]:
        """Give ``user`` a slot; users who are not ``kept`` make room. ``key`` is the user's in adapters' paths.

        Of several calls that run at the same time, the newest says who is kept: those who were called for after an
        earlier one stay.
        """
        self._kept = kept
        before = self.sessions.get(user)
        if before is not None and before.lease is not None:  # back before another user needed the slot
            self._remove(user)
            self.adapters.introduce(key, user)
            return self._publish(user)
        fetched = yield from self._in_thread(self.sessions.fetch, user)
        installed = False
        try:
            if self.sessions.get(user) is not None:  # without a lease: nothing here is newer than what was read
                self.sessions.drop(user)
                self._remove(user)
            while user not in self.pool.users and len(self.pool.users) >= self.pool.slots:
                leaving = next((each for each in self.sessions.users if each not in self._kept), None)
                if leaving is None:
                    raise TooBusy("all slots for users are in use, ask again", retry_after=1.0)
                session = self.sessions.get(leaving)
                if session is not None and not self.sessions.saved(leaving) and session.lease is not None:
                    yield _IO_WAIT
                    continue
                self.sessions.evict(leaving)
                self._remove(leaving)
            installed = True  # or the lease was released
            self.sessions.install(fetched)
        finally:
            if not installed:
                self.sessions.discard(fetched)
        self.adapters.introduce(key, user)
        return self._publish(user)

    def learn(self, user: str, captured: str, ids: list[int], taught: list[bool], start: int) -> Steps[dict[str, Any]]:
        """Let ``user`` learn from the tokens ``ids`` of a captured prompt, which stand at ``start`` in it.

        What was learnt is in effect at the end, and is stored soon.
        """
        hidden = self.capture.take(captured, start + len(ids))
        if hidden is None:
            raise ServerFailure("nothing was learnt: the hidden states of the prompt were not kept")
        self.sessions.require_writable(user)
        while not self.sessions.has_room(user):
            yield 10 * _IO_WAIT
        before = self.pool.export(user)
        try:
            telling = self.options.telling.of(sum(taught))
            slices = learn_in_slices(
                self.learner,
                self.blocks,
                user,
                hidden[:, start:],
                ids,
                taught,
                self.options.chunk,
                telling,
                self._slice,
            )
            while True:
                try:
                    next(slices)
                except StopIteration as done:
                    learnt = done.value
                    break
                yield 0.0
            self.sessions.learnt(user, learnt.tokens)
        except BaseException:  # a client that does not wait any more included
            if self.sessions.get(user) is not None:
                self.pool.load(user, before)
            raise
        self._lesson[user] = dataclasses.asdict(learnt)
        return self._publish(user)

    def stored(self, user: str) -> Steps[dict[str, Any]]:
        """Wait until the store has everything that ``user`` has learnt so far.

        Raises:
            NotStored: if the store takes nothing for `ttt.serve.jobs.LONGEST_WAIT` seconds.
        """
        session = self.sessions.require_writable(user, "what was learnt was not stored")
        wanted, began = session.updates, time.monotonic()
        while session.stored < wanted:
            if session.lease is None:
                raise Conflict(f"what was learnt was not stored: {session.read_only}", code="read_only")
            if time.monotonic() - began >= jobs.LONGEST_WAIT:
                error = self.sessions.not_stored(user, jobs.LONGEST_WAIT)
                if error is not None:
                    raise error
            yield _IO_WAIT
        return self._described(user)

    def unsaved(self, user: str) -> Steps[int]:
        """How many changes of ``user`` the store does not have yet; 0 for a user without a slot."""
        session = self.sessions.get(user)
        return 0 if session is None else session.updates - session.stored
        yield 0.0

    def forget(self, user: str) -> Steps[None]:
        """Remove everything of ``user``, here and in the store; from now on their requests get the base model."""
        self.sessions.drop(user)
        self._remove(user)
        yield from self._in_thread(self.sessions.erase, user)

    def rollback(self, user: str, version: int) -> Steps[dict[str, Any]]:
        """Put ``version`` of ``user`` into effect, as the newest."""
        session = self.sessions.require_writable(user, ROLLED_BACK)
        yield from self.stored(user)
        target = yield from self._in_thread(self.sessions.read_version, session, version)
        try:
            self.sessions.install((yield from self._in_thread(self.sessions.rolled_back, session, target)))
        except BaseException:  # the store may have gone back or not: the user is opened again with what it has
            self.sessions.drop(user)
            self._remove(user)
            raise
        return self._publish(user)

    def status(self, user: str) -> Steps[dict[str, Any]]:
        """What is known of ``user``, who has a slot."""
        return self._described(user)
        yield 0.0  # of a generator, as all operations are

    def drop(self, captured: str) -> Steps[None]:
        """Drop what was captured of a request that ended without teaching."""
        self.capture.drop(captured)
        return None
        yield 0.0

    def end(self) -> Steps[None]:
        """Store what waits to be stored, and give all leases back: nothing is learnt any more."""
        yield from self._in_thread(self._leave)

    # -- inner --------------------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        if unsaved := self.sessions.close(STORING):
            log.error("what %d users learnt last was not stored", len(unsaved))

    def _slice(self) -> float:
        """Milliseconds that learning may take until the engine has its next turn."""
        return self.options.slice if self.runner.requests else max(ALONE, self.options.slice)

    def _in_thread(self, function: Callable[..., T], *arguments: Any) -> Steps[T]:
        future = self._threads.submit(function, *arguments)
        while not future.done():
            yield _IO_WAIT
        return future.result()

    def _publish(self, user: str) -> dict[str, Any]:
        """Put what has changed of ``user`` into effect, under a new stamp: the user's counters."""
        self.adapters.publish(user)
        self._stamp[user] = next(self._stamps)
        return self._described(user)

    def _remove(self, user: str) -> None:
        """Take a user who has no slot any more out of vLLM."""
        self.adapters.remove(user)
        self._stamp.pop(user, None)
        self._lesson.pop(user, None)

    def _described(self, user: str) -> dict[str, Any]:
        """A user's counters."""
        session: Session = self.sessions.use(user)
        first = next(iter(self.pool.layers.values()))
        return {
            "stamp": self._stamp[user], "updates": session.updates, "tokens": session.tokens,
            "stored": session.stored, "version": session.version, "read_only": session.read_only,
            "rows": int(first.rows[self.pool.slot(user)]), "lesson": self._lesson.get(user),
        }  # fmt: skip
