"""From an HTTP request to the service and back: events across threads, time limits, and clients that hang up."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request as HttpRequest

from ttt.serve.errors import HungUp, RequestError, TimedOut, as_request_error
from ttt.serve.http.metrics import Metrics
from ttt.serve.request import Outcome, Piece, Request
from ttt.serve.sampling import Sampling, TokenScore
from ttt.serve.service import Service
from ttt.serve.teaching import Lesson

_LOOK = 0.25  # seconds between looks whether the client is still there


class Running:
    """A request that the service works on.

    Args:
        service: that gets it.
        metrics: is told the time to the first token.
        user, prompt, sampling, n, lesson, wait, score_prompt: as for `ttt.serve.request.Request`.
        seconds: the longest that it may take.
        unused: called at the end with the number of tokens that were counted for the request and not generated.

    Raises:
        RequestError: as `Service.submit`.

    Attributes:
        prompt_scores: of the prompt's tokens, once the first piece has come.
    """

    def __init__(
        self,
        service: Service,
        metrics: Metrics,
        user: str | None,
        prompt: list[int],
        sampling: Sampling,
        *,
        n: int = 1,
        lesson: Lesson | None = None,
        wait: bool = False,
        score_prompt: bool = False,
        seconds: float,
        unused: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Piece | Outcome | RequestError] = asyncio.Queue()
        self._metrics, self._began, self._seconds = metrics, time.monotonic(), seconds
        self.prompt_scores: list[TokenScore] = []
        self._done = self._closed = False
        self._unused = unused
        self.request = Request(
            user, prompt, sampling, self._deliver, n=n, lesson=lesson, wait=wait, score_prompt=score_prompt,
            on_prompt=self._take_prompt_scores,
        )  # fmt: skip
        try:
            service.submit(self.request)
        except BaseException:
            self._closed = True
            unused(len(prompt) + n * sampling.max_tokens)
            raise

    def _deliver(self, event: Piece | Outcome | RequestError) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def _take_prompt_scores(self, scores: list[TokenScore]) -> None:
        self.prompt_scores = scores

    async def events(self, http: HttpRequest | None = None) -> AsyncIterator[Piece | Outcome]:
        """The pieces, and the outcome as the last one. If the iterator is closed before, the request is cancelled.

        Args:
            http: to cancel the request when its client hangs up; None where something else looks for that.

        Raises:
            RequestError: if the request fails or takes too long, or the client hung up.
        """
        first, looked = True, self._began
        try:
            while True:
                left = self._began + self._seconds - time.monotonic()
                if left <= 0:
                    raise TimedOut(f"the request took longer than {self._seconds:g} s")
                if http is not None and time.monotonic() - looked > _LOOK:
                    looked = time.monotonic()
                    if await http.is_disconnected():
                        raise HungUp("the client has closed the connection")
                try:
                    event = await asyncio.wait_for(self._events.get(), min(left, _LOOK))
                except asyncio.TimeoutError:
                    continue
                if isinstance(event, RequestError):
                    self._done = True
                    raise event
                if first:
                    self._metrics.first_token.observe(time.monotonic() - self._began)
                    first = False
                self._done = isinstance(event, Outcome)
                yield event
                if self._done:
                    return
        finally:
            self.close()

    def close(self) -> None:
        """Cancel the request unless it has ended. It may have ended, and nobody come for its events."""
        if not self._done:
            self.request.cancelled = True
        if not self._closed:
            self._closed = True
            self._unused(self.request.n * self.request.sampling.max_tokens - self.request.generated)


async def result_of(future: concurrent.futures.Future[Any], http: HttpRequest, seconds: float) -> Any:
    """The result of work in another thread.

    Args:
        future: of the work. If nobody waits for it any more it is cancelled, which ends work that need not be done.
        http: whose client waits.
        seconds: how long, at most.

    Raises:
        RequestError: what the work raised; errors that clients must not see become one. TimedOut: after ``seconds``.
            HungUp: if the client has closed the connection.
    """
    wrapped, until = asyncio.wrap_future(future), time.monotonic() + seconds
    try:
        while not wrapped.done():
            left = until - time.monotonic()
            if left <= 0:
                raise TimedOut(f"the request took longer than {seconds:g} s; it may still be carried out")
            await asyncio.wait({wrapped}, timeout=min(left, _LOOK))
            if not wrapped.done() and await http.is_disconnected():
                raise HungUp("the client has closed the connection")
        return wrapped.result()
    except Exception as error:
        raise as_request_error(error) from error
    finally:
        wrapped.cancel()
