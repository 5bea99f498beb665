"""Seats: which users have weights in the engine now, and under which name, number and label vLLM knows them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Any

from ttt.serve.errors import TooBusy, Unavailable
from ttt.serve.missed import MissedTurns
from ttt.serve.vllm.adapters import label
from ttt.serve.vllm.engine import Engine

log = logging.getLogger("vllm.ttt")
_NUMBERS = itertools.count(1_000_001)  # clear of vLLM's own numbers, and below 2^31, as it needs; never used again
_REOPEN = 2.0  # seconds between attempts to get the lease of a user who can only be read


@dataclasses.dataclass(eq=False)
class Seat:
    """A user with weights in the engine.

    Attributes:
        user: their id; vLLM does not get to see it.
        key: random, what stands for the user in vLLM's names, which reach logs and metrics.
        number: vLLM's of the adapter.
        known: what the worker said last of the user (`Users.status`).
        opening: whether the worker is at work on it, so that nobody may use it.
        forgotten: whether the user was erased; then what still runs here teaches nothing.
        pins: requests and lessons that use it; it is not given away meanwhile.
        starting: requests that have a label, but no first token yet.
        lessons: what is being learnt, or waits to be.
        told: how many lessons are learnt and wait to be stored whose clients hear of it.
        order: held by the lesson, or rollback, that changes the weights.
        opened: when, by `time.monotonic`.
    """

    user: str
    key: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))
    number: int = dataclasses.field(default_factory=lambda: next(_NUMBERS))
    known: dict[str, Any] = dataclasses.field(default_factory=dict)
    opening: bool = True
    forgotten: bool = False
    pins: int = 0
    starting: int = 0
    told: int = 0
    lessons: set[asyncio.Task[None]] = dataclasses.field(default_factory=set)
    order: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)
    opened: float = 0.0

    async def settled(self) -> None:
        """Wait until nothing that the user said waits to be learnt."""
        while self.lessons:
            await asyncio.wait(self.lessons)


class Seats:
    """Gives users seats, and takes those of users who were not here for the longest time.

    Args:
        engine: whose worker has the weights.
        count: largest number of users with a seat.
        patience: seconds that a request waits for a seat.

    Attributes:
        ending: whether the server is stopping, and lets nobody in.
        missed: what was not learnt of users, although it was to be.
    """

    def __init__(self, engine: Engine, count: int, patience: float) -> None:
        self.engine, self.count, self.patience = engine, count, patience
        self.boot = secrets.token_hex(4)
        self._seats: OrderedDict[str, Seat] = OrderedDict()  # in the order in which they were last used
        self._changed = asyncio.Event()
        self.ending = False
        self.missed = MissedTurns(log=log)

    def label(self, seat: Seat) -> str:
        """The path of the adapter of ``seat``, another one for each state of the weights."""
        return label(seat.key, self.boot, seat.known.get("stamp", 0))

    @contextlib.asynccontextmanager
    async def hold(self, user: str) -> AsyncIterator[Seat]:
        """Inside, ``user`` has a seat and keeps it.

        Raises:
            TooBusy: if all seats stayed taken. Unavailable: if the server is stopping. Conflict, Unavailable: as the
                worker's ``open``.
        """
        try:
            seat = await asyncio.wait_for(self._take(user), self.patience)
        except TimeoutError:
            raise TooBusy(
                f"all {self.count} users that the server has room for are busy, ask again", retry_after=1.0
            ) from None
        try:
            yield seat
        finally:
            self.unpin(seat)

    def pin(self, seat: Seat) -> None:
        """Keep ``seat``, which is held now, until `unpin`."""
        seat.pins += 1

    def unpin(self, seat: Seat) -> None:
        """End a `pin`."""
        seat.pins -= 1
        self.wake()

    def wake(self) -> None:
        """Let those who wait look again."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def until(self, condition: Any) -> None:
        """Wait until ``condition()``, which is looked at after every `wake`."""
        while not condition():
            await self._changed.wait()

    async def drain(self, seconds: float) -> None:
        """Let nobody in any more, wait until what was said is learnt and stored, and give the users back.

        Who is being opened, and so takes a lease, is given back, too.

        Args:
            seconds: after which lessons that are not learnt yet are ended.
        """
        self.ending, end = True, time.monotonic() + seconds
        self.wake()  # who waits for a seat gets none
        with contextlib.suppress(TimeoutError):
            opened = self.until(lambda: not any(seat.opening for seat in self._seats.values()))
            await asyncio.wait_for(opened, seconds)
        while lessons := {lesson for seat in self._seats.values() for lesson in seat.lessons}:
            await asyncio.wait(lessons, timeout=max(end - time.monotonic(), 0.0))
            if time.monotonic() >= end:
                log.error("the server stops before %d lessons were learnt", sum(not each.done() for each in lessons))
                for lesson in lessons:
                    lesson.cancel()
                await asyncio.wait(lessons)
                break
        await self.engine.call("end")

    async def forget(self, user: str) -> None:
        """Erase ``user``: what is running goes on with the base model's weights, and teaches nothing."""
        await self.until(lambda: user not in self._seats or not self._seats[user].opening)
        before = self._seats.get(user)
        gone = self._seats[user] = Seat(user)  # nobody can open the user until all is erased
        unsaved = 0
        self.missed.forgetting(user)  # lessons that are cancelled note that themselves
        try:
            if before is not None:
                before.forgotten = True
                for lesson in list(before.lessons):
                    lesson.cancel()
                await before.settled()
                unsaved = await self.engine.call("unsaved", user) - before.told
            await self.engine.call("forget", user)
            self.missed.forget(user)
        except BaseException as error:  # also of a caller who is cancelled
            self.missed.not_forgotten(user, error, max(unsaved, 0))
            raise
        finally:
            if self._seats.get(user) is gone:
                del self._seats[user]
            self.wake()

    async def rollback(self, user: str, version: int) -> dict[str, Any]:
        """Put ``version`` of ``user`` into effect: the user's counters."""
        async with self.hold(user) as seat:
            return await self.change(seat, "rollback", user, version)

    async def change(self, seat: Seat, operation: str, *arguments: Any) -> dict[str, Any]:
        """Call an operation that changes the weights of ``seat``, after those that were called before.

        It begins when every request that has got a label has begun, too: a request that waits in vLLM's queue would
        otherwise be computed with new weights on top of cached keys and values of the old ones.
        """
        me = asyncio.current_task()
        assert me is not None
        seat.lessons.add(me)  # no request begins before it has ended
        try:
            async with seat.order:
                await self.until(lambda: seat.starting == 0)
                seat.known = await self.engine.call(operation, *arguments)
        finally:
            seat.lessons.discard(me)
        return seat.known

    async def _take(self, user: str) -> Seat:
        while True:
            if self.ending:
                raise Unavailable("the server is stopping: ask another one, or ask again", retry_after=5)
            seat = self._seats.get(user)
            if seat is not None and not seat.opening:
                again = seat.known.get("read_only") and not seat.pins and time.monotonic() - seat.opened > _REOPEN
                seat.pins += 1
                self._seats.move_to_end(user)
                return await self._open(seat) if again else seat
            if seat is None:
                idle = [each for each in self._seats.values() if not each.pins and not each.opening]
                if len(self._seats) < self.count or idle:
                    if len(self._seats) >= self.count:
                        del self._seats[idle[0].user]
                    seat = self._seats[user] = Seat(user, pins=1)
                    return await self._open(seat)
            await self._changed.wait()

    async def _open(self, seat: Seat) -> Seat:
        """Let the worker read the weights of ``seat``; those of users without a seat make room."""
        seat.opening = True
        try:
            seat.known = await self.engine.call("open", seat.user, seat.key, [*self._seats])
            seat.opened = time.monotonic()
        except BaseException:
            del self._seats[seat.user]
            raise
        finally:
            seat.opening = False
            self.wake()
        return seat
