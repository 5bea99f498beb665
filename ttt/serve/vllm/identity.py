"""Who sends a request, and whether it may teach: read from authenticated headers before vLLM sees the request."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from typing import Any

from ttt.serve.errors import BadRequest, RequestError, Unauthenticated
from ttt.serve.keys import Identity, Keys, check_user_id
from ttt.serve.teaching import check_learn_header
from ttt.serve.vllm.options import Options
from ttt.serve.vllm.seats import Seat, Seats

OPEN = frozenset({"/health", "/ping", "/metrics", "/version", "/load"})
"""Paths that need no identity; they tell nothing of users."""
GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
"""Paths on which a user gets weights of their own."""
TEACHING = ("/v1/chat/completions", "/v1/messages", "/v1/completions")
"""Those of them on which a request can teach."""


@dataclasses.dataclass(eq=False)
class Turn:
    """A request of a user.

    Attributes:
        seat: the user's.
        learn: one of `ttt.serve.teaching.LEARN`, as the header ``x-ttt-learn`` says; None where there is none.
        request: the body of the request, once vLLM has read it.
    """

    seat: Seat
    learn: str | None
    request: Any = None


current: contextvars.ContextVar[Turn | None] = contextvars.ContextVar("ttt_turn", default=None)
"""The turn that is being handled. It is lost where a stream's response is made: read it in a plain function before."""
identity_of: contextvars.ContextVar[Identity | None] = contextvars.ContextVar("ttt_identity", default=None)


class Identify:
    """Tells from the headers who asks. The field ``user`` of a request, which anyone can fill in, is not looked at.

    Args:
        options: the plugin's.
    """

    def __init__(self, options: Options) -> None:
        self.keys = Keys(options.keys) if options.identity == "keys" else None

    def __call__(self, headers: dict[str, str]) -> Identity:
        """Raises RequestError if nobody is authenticated, or somebody who may not act for the user that is named."""
        named = headers.get("x-ttt-user")
        if self.keys is not None:
            return self.keys.identify(_authorization(headers), named)
        if named is None:
            raise Unauthenticated("the header 'x-ttt-user' is needed: the proxy before this server sets it")
        return Identity(check_user_id(named), False, "header")


class Middleware:
    """Lets only those in who are known, and gives a user a seat for the time of the request."""

    def __init__(self, app: Any, options: Options, state: Any) -> None:
        self.app, self.state, self.identify = app, state, Identify(options)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI has it."""
        if scope["type"] == "websocket":
            return  # nothing there can be told apart by user
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or path in OPEN or scope["method"] == "OPTIONS":
            return await self.app(scope, receive, send)
        began = False

        async def sending(message: Any) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            async with contextlib.AsyncExitStack() as stack:
                headers = _headers(scope)
                identity = self.identify(headers)
                identity_of.set(identity)
                learn = headers.get("x-ttt-learn")
                if learn is not None:
                    check_learn_header(learn)
                if identity.user is not None and path in GENERATING and scope["method"] == "POST":
                    if learn in ("on", "wait") and path not in TEACHING:
                        raise BadRequest(
                            f"nothing is learnt on {path}, only on {', '.join(TEACHING)}: leave out the header "
                            f"x-ttt-learn, or send 'off', got {learn!r}", param="x-ttt-learn",
                        )  # fmt: skip
                    seats: Seats = self.state.seats()
                    seat = await stack.enter_async_context(seats.hold(identity.user))
                    await seat.settled()
                    current.set(Turn(seat, learn))
                await self.app(scope, receive, sending)
        except RequestError as error:
            if began:
                raise
            from starlette.responses import JSONResponse

            await error_response(error, JSONResponse)(scope, receive, send)


def _authorization(headers: dict[str, str]) -> str | None:
    """The header ``authorization``, or what it would be with the key in ``x-api-key``, as Anthropic's clients send it.

    Raises:
        BadRequest: if both are there with different keys.
    """
    given, key = headers.get("authorization"), headers.get("x-api-key")
    if key is None:
        return given
    bearer = f"Bearer {key}"
    if given is not None and given != bearer:
        raise BadRequest("the headers authorization and x-api-key must have the same key, or one be left out")
    return bearer


def _headers(scope: Any) -> dict[str, str]:
    """The headers by name. One that is given twice is refused: a proxy may have checked the other one.

    Raises:
        BadRequest: for a header of ours, or the authorization, that stands there twice.
    """
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin-1").lower()
        if key in found and (key in ("authorization", "x-api-key") or key.startswith("x-ttt-")):
            raise BadRequest(f"the header {key} must be given once")
        found[key] = value.decode("latin-1")
    return found


def error_response(error: RequestError, response: Any) -> Any:
    """``error`` in OpenAI's form; ``response`` is starlette's JSONResponse."""
    return response(error.body(), status_code=error.status, headers=error.headers)
