"""The web application: routes, errors in OpenAI's form, numbers, health, and the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from ttt.serve.errors import BadRequest, NotFound, RequestError
from ttt.serve.http import completions, users
from ttt.serve.http.middleware import Guarded
from ttt.serve.http.state import Server, server_of
from ttt.serve.keys import check_user_id

PAGE = Path(__file__).parent / "page"
_FILES = {"page.js": "text/javascript", "page.css": "text/css"}
_CONTENT_SECURITY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    # Not covered by default-src. In a frame of another site, a click there could be one on "Forget everything" here.
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
# After an update of the server no browser may put an old script and a new page together.
_FILE_HEADERS = {"x-content-type-options": "nosniff", "cache-control": "no-cache"}


def create_app(server: Server, *, largest_body: int = 1 << 20, hosts: Sequence[str] | None = None) -> FastAPI:
    """The application in front of ``server.service``.

    Args:
        server: what the routes share.
        largest_body: bytes of a request, at most.
        hosts: see `ttt.serve.http.middleware.Guarded`.
    """
    app = FastAPI(title="ttt serve", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.server = server
    app.include_router(completions.router)
    app.include_router(users.router)
    for name, about, read in (
        ("ttt_waiting_requests", "Requests that wait for their turn.", lambda: server.service.waiting),
        (
            "ttt_learning_queue_tokens",
            "Tokens to be read to learn, in all passes.",
            lambda: server.service.learning_tokens,
        ),
        ("ttt_users_online", "Users with a slot.", lambda: len(server.service.sessions.users)),
        ("ttt_store_fails", "1 where /health says that the store takes nothing.", lambda: bool(server.service.stalled)),
    ):
        server.metrics.watch(name, about, read)
    _add_errors(app)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health(http: Request) -> JSONResponse:
        service = server_of(http).service
        if not service.alive:
            return JSONResponse({"status": "stopping"}, 503)
        if (stalled := service.stalled) is not None:
            return JSONResponse({"status": "store", "reason": stalled.reason}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics(http: Request) -> Response:
        return Response(server_of(http).metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi(http: Request) -> JSONResponse:
        server_of(http).identify(http)
        return JSONResponse(app.openapi())

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> FileResponse:
        headers = _FILE_HEADERS | {"content-security-policy": _CONTENT_SECURITY}
        return FileResponse(PAGE / "index.html", media_type="text/html", headers=headers)

    @app.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def file(name: str) -> FileResponse:
        if name not in _FILES:
            raise NotFound(f"there is no page {name!r:.80}")
        return FileResponse(PAGE / name, media_type=_FILES[name], headers=_FILE_HEADERS)

    app.add_middleware(Guarded, largest=largest_body, hosts=hosts, metrics=server.metrics)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def known(http: Request, error: RequestError) -> JSONResponse:
        return _response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> JSONResponse:
        return _response(_bad_request(error.errors()))

    @app.exception_handler(HTTPException)
    async def http_error(http: Request, error: HTTPException) -> JSONResponse:
        if error.status_code in (404, 405):
            if (wrong := _wrong_user(http)) is not None:
                return _response(wrong)
            code = None if error.status_code == 404 else "method_not_allowed"
            path = http.url.path
            hint = "; leave out the slash at the end" if path.endswith("/") and path != "/" else ""
            known: RequestError = NotFound(f"{http.method} {path:.80} is not served here{hint}", code=code)
        else:  # a body that is no JSON, in no encoding of text, or nested too deeply
            known = BadRequest(f"the body must be JSON: {error.detail!s:.200}")
        known.status = error.status_code
        return _response(known)


def _response(error: RequestError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


def _wrong_user(http: Request) -> BadRequest | None:
    """The error about the user in a path that no route has because the user's name holds a slash, as "%2F"."""
    parts = http.scope.get("raw_path", b"").decode("latin-1").split("/")
    if parts[:3] != ["", "v1", "users"] or len(parts) < 4 or "/" not in (user := unquote(parts[3])):
        return None
    try:
        check_user_id(user)
    except BadRequest as error:
        return error
    return None


def _bad_request(errors: Sequence[Any]) -> BadRequest:
    """The most telling of pydantic's ``errors``, with the name of the parameter and the value that was received."""
    first = _most_telling(errors)
    if first["type"] == "json_invalid":
        return BadRequest(f"the body must be JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    path = [part for part in first["loc"] if part != "body"]
    # Of a union, pydantic names the part that it tried, as in "prompt.list[int]": the parameter stands before it.
    parts = [part for part in path if _is_name(part)]
    if first["type"] == "extra_forbidden" and not _is_name(path[-1]):  # what is not known may have any name
        parts.append(f"{path[-1]:.80}")
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")
    got = first.get("input")
    shown = f", got {got!r:.100}" if first["type"] != "missing" and not isinstance(got, (dict, list)) else ""
    if first["type"] == "string_unicode" and not name:  # of no value: of a name itself
        return BadRequest(f"a parameter's name must be text that UTF-8 can hold, got {got!r:.100}", param=f"{got:.80}")
    if isinstance(got, bytes) and not name:
        return BadRequest("the body must be JSON, named by the header content-type: application/json")
    if not name:
        return BadRequest("the body must be a JSON object of the parameters")
    return BadRequest(f"{name}: {first['msg']}{shown}", param=name)


def _most_telling(errors: Sequence[Any]) -> Any:
    """Of the errors about the first wrong parameter, one for each type that it may have, that of the type it has.

    Of a list that may also be a text, that it is no text says nothing; what is wrong inside of it lies deepest.
    """
    same = [error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]]
    lists = [error for error in same if not (error["type"] == "string_type" and isinstance(error["input"], list))]
    return max(lists or same, key=lambda error: len(error["loc"]))


def _is_name(part: Any) -> bool:
    return isinstance(part, int) or (part.isidentifier() and part not in ("str", "int"))
