"""Errors that a client gets to see, each with its HTTP status and OpenAI's type and code."""

from __future__ import annotations

import errno
import json
import os
from typing import Any


class RequestError(Exception):
    """A request that cannot be served.

    Args:
        message: for the client: what was wrong, what was received, and what is allowed.
        param: the name of the wrong parameter; None if there is none.
        code: for programs; by default the class's.
        retry_after: seconds after which the same request may be served; None for never.
    """

    status = 400
    type = "invalid_request_error"
    code: str | None = None

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.retry_after = message, param, retry_after
        if code is not None:
            self.code = code

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the answer."""
        return {} if self.retry_after is None else {"retry-after": str(max(1, round(self.retry_after)))}

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        param = None if self.param is None else _encodable(self.param)
        return {"error": {"message": _encodable(self.message), "type": self.type, "param": param, "code": self.code}}

    def event(self) -> str:
        """The error as the last of the server-sent events of an answer that has begun."""
        return f"data: {json.dumps(self.body())}\n\n"


class BadRequest(RequestError):
    """The request is wrong in itself."""


class Unauthenticated(RequestError):
    """There is no valid API key."""

    status, type, code = 401, "authentication_error", "invalid_api_key"


class Forbidden(RequestError):
    """The API key does not allow this."""

    status, type, code = 403, "permission_error", "forbidden"


class NotFound(RequestError):
    """There is no such model, user, version or page."""

    status, code = 404, "not_found"


class Conflict(RequestError):
    """The state of a user does not allow this now."""

    status, type, code = 409, "conflict_error", "conflict"


class Tripped(Conflict):
    """The user's guard did not let a change of the weights stand."""

    code = "guard"


class TooLarge(RequestError):
    """The body is larger than allowed."""

    status, code = 413, "request_too_large"


class TooBusy(RequestError):
    """There are too many requests, from this client or at all."""

    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"


class ServerFailure(RequestError):
    """The request may be right, but it could not be served."""

    status, type, code = 500, "server_error", "internal_error"


class Unavailable(RequestError):
    """The server is stopping, or the store is out of reach."""

    status, type, code = 503, "server_error", "unavailable"


class NotStored(Unavailable):
    """Something was learnt, and the store does not take it; it is stored as soon as the store does."""

    code = "not_stored"

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the answer: OpenAI's clients would send the request again, and it would be learnt again."""
        return {**super().headers, "x-should-retry": "false"}


class HungUp(RequestError):
    """The client has closed the connection; nobody reads the answer."""

    status, code = 499, "client_closed_request"


class TimedOut(RequestError):
    """The request took longer than allowed."""

    status, type, code = 504, "server_error", "timeout"


def _encodable(text: str) -> str:
    r"""``text``, with halves of characters, which UTF-8 cannot hold and names in JSON can, written as in "\ud83d"."""
    return text.encode("utf-8", "backslashreplace").decode()


def kinds(error: BaseException | None) -> str:
    """The types of ``error`` and of what caused it, each once: their texts may name users, paths and addresses."""
    found = []
    while error is not None:
        reason = _system_reason(error) if isinstance(error, OSError) else getattr(error, "sqlite_errorname", None)
        found.append(type(error).__name__ + (f" ({reason})" if reason else ""))
        error = error.__cause__
    return ", by ".join(dict.fromkeys(found))


def _system_reason(error: OSError) -> str | None:
    """What the system calls the number of ``error``, whose ``strerror`` may be any text; None without such a number."""
    number = error.errno
    return os.strerror(number) if number is not None and number in errno.errorcode else None


def as_request_error(error: BaseException) -> RequestError:
    """``error``, or for one that clients must not see, a `ServerFailure` that names its type only."""
    if isinstance(error, RequestError):
        return error
    return ServerFailure(f"the server failed: {type(error).__name__}")
