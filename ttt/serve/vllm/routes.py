"""The routes ``/v1/users``: what is known of a user, erasure, and going back to an earlier version."""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Any

from ttt.serve.errors import BadRequest, NotFound, Unauthenticated
from ttt.serve.vllm.identity import identity_of
from ttt.serve.vllm.seats import Seats

SHOWN = ("updates", "tokens", "stored", "version", "rows", "read_only", "lesson")


def add_routes(app: Any, state: Any) -> None:
    """Add the routes to vLLM's FastAPI ``app``; ``state.seats()`` gives the users' `Seats`."""
    from fastapi import Request  # not at the top: only the API server needs it

    async def show(user: str) -> dict[str, Any]:
        seats: Seats = state.seats()
        async with seats.hold(_allowed(user)) as seat:
            await seat.settled()
            known, missed = await seats.engine.call("status", user), seats.missed.of(user)
            seat.known = known
            if known["version"] is None and not known["updates"] and not known["read_only"] and missed is None:
                raise NotFound(f"there is no user {user!r}", param="user")
            told = None if missed is None else dataclasses.asdict(missed)
            return {"id": user, **{name: seat.known[name] for name in SHOWN}, "missed": told}

    async def forget(user: str) -> dict[str, Any]:
        seats: Seats = state.seats()
        await seats.forget(_allowed(user))
        return {"id": user, "deleted": True}

    async def rollback(user: str, request: Request) -> dict[str, Any]:
        seats: Seats = state.seats()
        _allowed(user)
        try:
            version = (await request.json())["version"]
        except (ValueError, KeyError, TypeError):
            raise BadRequest('the body must be JSON with a version, as {"version": 3}', param="version") from None
        if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version < 2**63:
            raise BadRequest(f"version must be a whole number of at least 1, got {version!r:.40}", param="version")
        known = await seats.rollback(user, version)
        return {"id": user, **{name: known[name] for name in SHOWN}}

    rollback.__annotations__["request"] = Request  # which FastAPI looks up in the module, where it is not
    app.add_api_route("/v1/users/{user}", show, methods=["GET"])
    app.add_api_route("/v1/users/{user}", forget, methods=["DELETE"])
    app.add_api_route("/v1/users/{user}/rollback", rollback, methods=["POST"])


class WithoutUsers(logging.Filter):
    """Replaces the user's id in the paths of uvicorn's access log by ``{user}``; a query is left out."""

    def filter(self, record: logging.LogRecord) -> bool:
        """As `logging.Filter` has it: always True."""
        if isinstance(record.args, tuple):
            record.args = tuple(_without_user(each) if isinstance(each, str) else each for each in record.args)
        return True


def _without_user(path: str) -> str:
    return re.sub(r"(/v1/users/).*?(/rollback)?(\?.*)?$", r"\1{user}\2", path)


def _allowed(user: str) -> str:
    identity = identity_of.get()
    if identity is None:
        raise Unauthenticated("an API key is needed")
    return identity.require(user)
