"""Several servers over one store: a user's requests go to the server that holds the user's lease.

The lease decides who may learn. Who is asked first is a hint, kept in a directory: a wrong hint costs a refusal that
the answer states, never what was learnt.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol
from urllib.parse import unquote

import httpx
from starlette.requests import Request

from ttt.serve.errors import RequestError, ServerFailure
from ttt.serve.http.middleware import App, Receive, Scope, Send
from ttt.serve.http.state import Server

_CONNECT_SECONDS = 2.0
# Headers that are meant for one connection only (RFC 9110, 7.6.1), and the length, which httpx counts again.
_NOT_PASSED_ON = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer",
    b"transfer-encoding", b"upgrade", b"content-length",
}  # fmt: skip
_PATHS = ("/v1/chat/completions", "/v1/completions")
_USERS = "/v1/users/"


class Directory(Protocol):
    """Tells which server is to serve a user; see `Claims`."""

    async def claim(self, user: str, address: str) -> str: ...
    async def gone(self, address: str) -> None: ...


class Claims:
    """Which server is to serve each user: the one that holds the lease, or else the first one that asked.

    Args:
        seconds: after which a server that has not called `alive` counts as dead, and its users go to others.
        most: largest number of users that are remembered; those asked for longest ago are dropped first.
    """

    def __init__(self, seconds: float, most: int = 1_000_000) -> None:
        self.seconds, self.most = seconds, most
        self._seen: dict[str, float] = {}  # address -> when it was last alive, by time.monotonic
        self._holders: OrderedDict[str, str] = OrderedDict()  # user -> address

    def alive(self, address: str, users: Iterable[str] = ()) -> None:
        """Note that the server at ``address`` lives, and holds the leases of ``users``."""
        self._seen[address] = time.monotonic()
        for user in users:
            self._note(user, address)

    def claim(self, user: str, address: str) -> str:
        """The address of the server for ``user``; ``address``, which asks, if there is no other that lives."""
        holder = self._holders.get(user)
        if holder is None or time.monotonic() - self._seen.get(holder, -self.seconds) > self.seconds:
            holder = address
        self._note(user, holder)
        return holder

    def gone(self, address: str) -> None:
        """Note that the server at ``address`` stops or cannot be reached: its users go to others."""
        self._seen.pop(address, None)

    def _note(self, user: str, address: str) -> None:
        self._holders[user] = address
        self._holders.move_to_end(user)
        if len(self._holders) > self.most:
            self._holders.popitem(last=False)


async def _nothing(user: str) -> None:
    """Do nothing."""


class Forwarding:
    """Serves the users whose lease this server holds, and passes requests of others on to their servers.

    A request is passed on with its own credentials, which the other server checks again: nothing is trusted that a
    client could not send there itself. If that server cannot be reached, this one answers: it takes the lease if it has
    ended, and else answers from the user's newest stored version and says that it learnt nothing.

    Args:
        app: this server's application (`ttt.serve.http.app.create_app`).
        server: what its routes share.
        directory: names the server of a user.
        address: URL at which the other servers reach ``app``, not this object, so that no request goes in circles.
        served: awaited with a user whom this server serves, before it does.
        largest: bytes of a body that is passed on; ``app`` refuses larger ones.
    """

    def __init__(
        self,
        app: App,
        server: Server,
        directory: Directory,
        address: str,
        *,
        served: Callable[[str], Awaitable[object]] = _nothing,
        largest: int = 1 << 20,
    ) -> None:
        self.app, self.server, self.directory, self.address = app, server, directory, address
        self.served, self.largest = served, largest
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS), trust_env=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        user = self._user(scope) if scope["type"] == "http" else None
        if user is None:
            return await self.app(scope, receive, send)
        holder = self.address if self._holds(user) else await self.directory.claim(user, self.address)
        if holder != self.address:
            body, again = await _read(receive, self.largest)
            if body is not None and await self._passed_on(holder, scope, body, receive, send):
                return
            receive = again
        await self.served(user)
        await self.app(scope, receive, send)

    def _user(self, scope: Scope) -> str | None:
        """Whose weights the request is about; None if nobody's, or if ``app`` will refuse it."""
        path = scope["path"]
        if path not in _PATHS and not path.startswith(_USERS):
            return None
        headers = Request(scope).headers
        try:
            identity = self.server.keys.identify(headers.get("authorization"), headers.get("x-ttt-user"))
            if path in _PATHS:
                return identity.user
            return identity.require(unquote(path.removeprefix(_USERS).partition("/")[0]))
        except RequestError:
            return None

    def _holds(self, user: str) -> bool:
        session = self.server.service.sessions.get(user)
        return session is not None and session.lease is not None

    async def _passed_on(self, holder: str, scope: Scope, body: bytes, receive: Receive, send: Send) -> bool:
        """Have the server at ``holder`` answer; False, and nothing sent, if it cannot be reached."""
        path = scope.get("raw_path") or scope["path"].encode()
        query = scope.get("query_string", b"")
        url = holder + path.decode("latin-1") + (f"?{query.decode('latin-1')}" if query else "")
        # With the client's "host", which the other server checks.
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in _NOT_PASSED_ON]
        request = self._client.build_request(scope["method"], url, headers=headers, content=body)
        answer = asyncio.create_task(self._answer(request, send))
        hung_up = asyncio.create_task(_hung_up(receive))
        try:
            await asyncio.wait({answer, hung_up}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                return True  # nobody waits for the answer: the other server notices that this one hangs up
            answer.result()
        except (httpx.ConnectError, httpx.ConnectTimeout):
            await self.directory.gone(holder)
            return False
        finally:
            for task in (answer, hung_up):
                task.cancel()
            await asyncio.gather(answer, hung_up, return_exceptions=True)
        return True

    async def _answer(self, request: httpx.Request, send: Send) -> None:
        """Send ``request``, and its answer to the client as it comes."""
        started = False
        try:
            response = await self._client.send(request, stream=True)
            try:
                headers = [(n, v) for n, v in response.headers.raw if n.lower() not in _NOT_PASSED_ON]
                if "content-length" in response.headers:
                    headers.append((b"content-length", response.headers["content-length"].encode()))
                await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
                started = True
                async for part in response.aiter_raw():
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
            finally:
                await response.aclose()
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise
        except httpx.TransportError:
            if started:
                raise  # the connection is closed, so that the client sees that the answer is cut short
            lost = ServerFailure(
                "the server that learns from this user ended before it answered; whether it learnt is not known",
                code="answer_lost",
            )
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 502, "headers": headers})
            await send({"type": "http.response.body", "body": json.dumps(lost.body()).encode()})


async def _read(receive: Receive, largest: int) -> tuple[bytes | None, Receive]:
    """The body, or None if it is too large or its client has hung up, and a `Receive` that gives it again."""
    messages, body, complete = [], b"", False
    while not complete and len(body) <= largest:
        messages.append(message := await receive())
        if message["type"] != "http.request":
            break
        body += message.get("body", b"")
        complete = not message.get("more_body", False)
    waiting = iter(messages)

    async def again():
        message = next(waiting, None)
        return await receive() if message is None else message

    return (body if complete and len(body) <= largest else None), again


async def _hung_up(receive: Receive) -> None:
    """Wait until the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass
