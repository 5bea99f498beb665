"""What is done with every HTTP request: bounds on its size, its host, a line in the log, and a count."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from ttt.serve.errors import Forbidden, RequestError, TooLarge, Unavailable, as_request_error
from ttt.serve.http.metrics import Metrics

log, faults = logging.getLogger("ttt.serve.access"), logging.getLogger("ttt.serve")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def route_of(scope: Scope) -> str:
    """The route of a request that was passed on, such as "/v1/users/{user}", which holds nothing that a client sent."""
    return getattr(scope.get("route"), "path", "other")


class _BodyTooLarge(Exception):
    """Ends the reading of a body; what the application makes of it, an error or this exception, is replaced."""


class Guarded:
    """Passes requests on to ``app`` that are not too large and meant for this host, and writes a line about each.

    What ``app`` does not expect becomes an error in OpenAI's form.

    The line has the route, the status and the time, but nothing that a client sent: no content, no key, no user.

    Args:
        largest: bytes of a body, at most.
        hosts: names that the header ``Host`` may have, without the port, and pages of no other origin may ask; None for
            any. A server without keys must look at them: otherwise any web page could talk to it from the browser, by
            the server's own name or by one that leads to it.
        metrics: counts requests.
    """

    def __init__(self, app: App, *, largest: int, hosts: Sequence[str] | None, metrics: Metrics) -> None:
        self.app, self.largest, self.hosts, self.metrics = app, largest, hosts, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status, size, refused = time.perf_counter(), 0, 0, False
        streams = ended = False

        async def counted() -> MutableMapping[str, Any]:
            nonlocal size, refused
            message = await receive()
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                if size > self.largest:
                    refused = True
                    raise _BodyTooLarge
            return message

        async def answered(message: MutableMapping[str, Any]) -> None:
            if status or not refused:  # otherwise it is what the application makes of the broken body
                await noted(message)

        async def noted(message: MutableMapping[str, Any]) -> None:
            nonlocal status, streams, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                kind = dict(message.get("headers", ())).get(b"content-type", b"")
                streams = kind.startswith(b"text/event-stream")
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            await send(message)

        headers = dict(scope["headers"])
        try:
            host = headers.get(b"host", b"").decode("latin-1")
            origin = headers.get(b"origin", b"").decode("latin-1")
            # A page of another server on this machine has another port.
            foreign = bool(origin) and origin.partition("://")[2] != host
            # A browser says where a request comes from that has no origin; following a link to the page is harmless.
            site, link = headers.get(b"sec-fetch-site"), headers.get(b"sec-fetch-mode") == b"navigate"
            foreign |= site == b"cross-site" and not (link and scope["method"] == "GET")
            if self.hosts is not None and foreign:
                shown = origin or "another site"
                await _answer(Forbidden(f"pages of {shown!r:.80} may not use this server, which needs no key"), noted)
            elif self.hosts is not None and _without_port(host) not in self.hosts:
                await _answer(
                    Forbidden(f"this server answers to {', '.join(self.hosts)} only, got {host!r:.80}"), noted
                )
            elif (length := headers.get(b"content-length", b"0")).isdigit() and int(length) > self.largest:
                await _answer(self._too_large(), noted)
            else:
                await self.app(scope, counted, answered)
                if refused and not status:
                    await _answer(self._too_large(), noted)
        except asyncio.CancelledError:
            # Only a server that stops cancels requests. Of an answer that has begun only events can still say so.
            stopping = Unavailable("the server is stopping", retry_after=10)
            if not status:
                await _answer(stopping, noted)
            elif streams and not ended:
                await _end(stopping, noted)
        except Exception as error:
            told = self._too_large() if refused else as_request_error(error)
            if not isinstance(error, _BodyTooLarge):  # which an application that reads its body itself lets through
                # The HTTP server would print the error's own text, which may repeat what the client sent.
                faults.error("a request failed", exc_info=error)
            if not status:
                await _answer(told, noted)
            elif streams and not ended:
                await _end(told, noted)
            else:  # then the connection is closed, so that the client sees that the answer is cut short
                raise RuntimeError("a request failed after its answer had begun") from None
        finally:
            route = route_of(scope)
            self.metrics.requests.labels(route, str(status)).inc()
            milliseconds = round(1e3 * (time.perf_counter() - began), 1)
            log.info(json.dumps({"method": scope["method"], "route": route, "status": status, "ms": milliseconds}))

    def _too_large(self) -> TooLarge:
        return TooLarge(f"a request may have at most {self.largest} bytes")


def _without_port(host: str) -> str:
    """The name in a header ``Host`` such as ``localhost:8000`` or ``[::1]:8000``."""
    name, _, port = host.rpartition(":")
    return name if name and port.isdigit() else host


async def _end(error: RequestError, send: Send) -> None:
    """End an answer of server-sent events that has begun."""
    await send({"type": "http.response.body", "body": error.event().encode()})


async def _answer(error: RequestError, send: Send) -> None:
    body = json.dumps(error.body()).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        *((name.encode(), value.encode()) for name, value in error.headers.items()),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
