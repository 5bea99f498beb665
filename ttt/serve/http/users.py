"""``/v1/users/{id}``: what was learnt from a user, more of it, back to an earlier version, out of here, and away."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import io
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ttt.adapt.peft_export import export_peft
from ttt.conversation import Telling
from ttt.learn.chat_template import openings as turn_openings
from ttt.learn.chat_template import plain_tokens_at
from ttt.serve import openings
from ttt.serve.errors import BadRequest, Forbidden, NotFound, TimedOut, Unavailable
from ttt.serve.http.running import result_of
from ttt.serve.http.schema import LearnRequest, RollbackRequest, StudyRequest
from ttt.serve.http.state import Server, server_of
from ttt.serve.jobs import Learnt
from ttt.serve.keys import Identity
from ttt.serve.session import Session
from ttt.serve.sessions import unavailable
from ttt.serve.state_reader import StateReader
from ttt.serve.teaching import Lesson, Teaching
from ttt.store import StoreError, UnknownUser

router = APIRouter(prefix="/v1")
_MOST_TAUGHT = 20


@router.get("/status")
async def status(http: Request) -> dict[str, Any]:
    """What the server is doing; operators also see which users have a slot."""
    server = server_of(http)
    identity = server.identify(http)
    service = server.service
    found: dict[str, Any] = {
        "model": server.name, "user": identity.user, "online": len(service.sessions.users), "slots": service.pool.slots,
        "waiting": service.waiting, "learning_tokens": service.learning_tokens,
    }  # fmt: skip
    return found | ({"users": list(service.sessions.users)} if identity.operator else {})


@router.get("/users/{user}")
async def show(http: Request, user: str) -> dict[str, Any]:
    """A user's versions, newest first, and what is known of those that are in use."""
    server = server_of(http)
    user = _allowed(server, http, user)
    reads = server.service.reads
    session, drift = server.service.sessions.get(user), None
    # Of a user who was taken over the store may have nothing any more: then nobody is to be given a slot.
    if session is not None and not reads and (not session.taken_over or await _history(server, http, user)):
        drift = await _result(server, http, server.service.drift(user))
    # The versions are read last: what counts as stored by now is among them.
    session, missed = server.service.sessions.get(user), server.service.missed.of(user)
    known = None if session is None or session.taken_over else session
    shown = {
        "id": user, "keeps": "state" if reads else "weights", "online": session is not None,
        "updates": None if known is None else known.updates, "tokens": None if known is None else known.tokens,
        "unsaved": 0 if known is None else known.updates - known.stored,
        "read_only": session.read_only if session is not None else "", "drift": drift,
        "guard": _guard(server, known), "missed": None if missed is None else dataclasses.asdict(missed),
    }  # fmt: skip
    versions = await _history(server, http, user)
    if known is None and not versions and missed is None:
        raise NotFound(f"there is no user {user!r}", param="user")
    return shown | {"versions": versions}


@router.delete("/users/{user}")
async def forget(http: Request, user: str) -> dict[str, Any]:
    """Remove everything that was learnt from a user, for good."""
    server = server_of(http)
    user = _allowed(server, http, user)
    await _result(server, http, server.service.forget(user))
    return {"id": user, "deleted": True}


@router.post("/users/{user}/rollback")
async def rollback(http: Request, user: str, body: RollbackRequest) -> dict[str, Any]:
    """Go back to an earlier version, which becomes the newest one."""
    server = server_of(http)
    user = _allowed(server, http, user)
    await _require_known(server, http, user)
    session = await _result(server, http, server.service.rollback(user, body.version))
    return {"id": user, "version": session.version, "updates": session.updates}


@router.post("/users/{user}/learn")
async def learn(http: Request, user: str, body: LearnRequest) -> dict[str, Any]:
    """Learn a text, or a chat, and answer when it is stored."""
    server = server_of(http)
    identity = _identity(server, http, user)
    lesson = await server.apart(_lesson, server, body)
    if lesson is None:
        why = "no token teaches; the first one of a text has none before it that it could be learnt at"
        param = "messages" if body.messages is not None else "text" if body.spans is None else "spans"
        raise BadRequest(f"there is nothing to learn: {why}", param=param)
    telling = _telling(server, body, lesson)
    server.limits.take(identity.key, tokens=len(lesson.ids) * telling.passes)
    learnt: Learnt = await _result(server, http, server.service.learn(user, lesson, telling))
    version = await _stored(server, http, user, learnt.stored)
    return {"id": user, "tokens": learnt.tokens, "nll": learnt.nll, "updates": learnt.updates, "version": version}


@router.post("/users/{user}/study")
async def study(http: Request, user: str, body: StudyRequest | None = None) -> dict[str, Any]:
    """Read what the user said again until the weights hold it, and answer when that is stored; a body is optional."""
    server = server_of(http)
    user = _allowed(server, http, user)
    await _require_known(server, http, user)
    output, stored = await _result(
        server, http, server.service.study(user, **(body or StudyRequest.model_validate({})).model_dump())
    )
    version = None if stored is None else await _stored(server, http, user, stored)
    after = None if stored is None else output.after
    return {
        "id": user, "episodes": output.episodes, "losses": output.losses, "after": after, "moved": output.moved,
        "version": version,
    }  # fmt: skip


@router.get("/users/{user}/taught")
async def taught(http: Request, user: str) -> dict[str, Any]:
    """The newest texts that were learnt from a user, with their loss before and now, in nats per token."""
    server = server_of(http)
    user = _allowed(server, http, user)
    await _require_known(server, http, user)
    found = await _result(server, http, server.service.taught(user, _MOST_TAUGHT))
    learner, data = server.service.learner, []
    assert not isinstance(learner, StateReader)
    assert learner.episodes is not None
    # Of what stands before the token before those that teach, the log keeps so many tokens.
    turns = await server.apart(turn_openings, server.tokenizer, learner.episodes.before - 1)
    for ids, learn, before, now, studied in found:
        text = server.tokenizer.decode(_words(ids, learn, turns), skip_special_tokens=True)
        data.append({"text": text, "before": before, "now": now, "studied": studied})
    return {"id": user, "data": data}


@router.get("/users/{user}/export")
async def export(http: Request, user: str) -> Response:
    """A user's weights as a LoRA adapter that PEFT and vLLM load, in a zip file."""
    server = server_of(http)
    user = _allowed(server, http, user)
    await _require_known(server, http, user)
    state = await _result(server, http, server.service.export(user))
    data = await _result(server, http, server.service.io(_zipped, state, server.name))
    return Response(
        data, media_type="application/zip", headers={"content-disposition": 'attachment; filename="adapter.zip"'}
    )


def _words(ids: list[int], learn: list[bool], turns: Iterable[tuple[int, ...]]) -> list[int]:
    """The tokens of an episode that teach, and the first one of their text or turn where they begin with its second.

    Weights cannot learn the first token of a text, and that of a turn teaches nothing, but a reader would miss it. Any
    other token before those that teach is context, which may be somebody else's words.

    Args:
        turns: the last tokens of what may stand before a turn, as `ttt.learn.chat_template.openings` returns them.
    """
    start = learn.index(True)
    before = tuple(ids[: start - 1])
    begins = start == 1 or any(before[-len(turn) :] == turn for turn in turns)
    taught = [token for token, teaches in zip(ids, learn, strict=True) if teaches]
    return [ids[start - 1], *taught] if begins else taught


def _guard(server: Server, session: Session | None) -> dict[str, Any] | None:
    """The bound of the user's guard, the drift that it measured last, and how often it has undone something."""
    learner = server.service.learner
    guards = None if isinstance(learner, StateReader) else learner.user_guards
    if guards is None or session is None:
        return None
    return {"bound": guards.bound, "drift": session.drift, "trips": session.trips}


def _allowed(server: Server, http: Request, user: str) -> str:
    """``user``, if who asks may act for them; raises as `_identity`."""
    _identity(server, http, user)
    return user


def _identity(server: Server, http: Request, user: str) -> Identity:
    """Who asks, if they may act for ``user``.

    Raises:
        RequestError: as `Server.identify` and `ttt.serve.keys.Identity.require`.
    """
    identity = server.identify(http)
    if not identity.operator and identity.user is None:
        raise Forbidden("this key may act for no user")
    identity.require(user)
    return identity


async def _result(server: Server, http: Request, future: concurrent.futures.Future[Any]) -> Any:
    return await result_of(future, http, server.request_seconds)


async def _stored(server: Server, http: Request, user: str, future: concurrent.futures.Future[int]) -> int:
    """The number of the version that is being stored; it is stored whether or not somebody waits for it."""
    return await _result(server, http, server.service.stored(user, future))


async def _require_known(server: Server, http: Request, user: str) -> None:
    """Raise NotFound if nothing is known of ``user``, who gets no slot then."""
    if server.service.sessions.get(user) is None and not await _history(server, http, user):
        raise NotFound(f"there is no user {user!r}", param="user")


async def _history(server: Server, http: Request, user: str) -> list[dict[str, Any]]:
    """A user's versions, newest first; empty for a user who is not in the store.

    Raises:
        Unavailable: if the store fails, or does not answer for `ttt.serve.openings.LONGEST` seconds.
    """
    try:
        seconds = min(server.request_seconds, openings.LONGEST)
        return await result_of(server.service.io(_versions, server, user), http, seconds)
    except TimedOut:
        raise Unavailable("the store does not answer; try again later", retry_after=5) from None


def _versions(server: Server, user: str) -> list[dict[str, Any]]:
    try:
        history = server.service.store.history(user)
    except UnknownUser:
        return []
    except StoreError as error:
        raise unavailable("the store is out of reach", error) from error
    return [
        {"number": v.number, "created": v.created, "bytes": v.size, "restores": v.source} for v in history
    ]  # fmt: skip


def _lesson(server: Server, body: LearnRequest) -> Lesson | None:
    if (body.text is None) == (body.messages is None):
        raise BadRequest("one of text and messages must be given, and not both", param="text")
    context, read = server.service.context, server.service.reads
    if body.messages is not None:
        if body.spans is not None:
            raise BadRequest("spans go with text only", param="spans")
        messages = [message.plain(at) for at, message in enumerate(body.messages)]
        found = list(dict.fromkeys(message["role"] for message in messages))
        if not set(found) & set(body.roles):
            raise BadRequest(
                f"there is nothing to learn: roles must have one of the messages' roles, {', '.join(found)}, got "
                f"{', '.join(body.roles)}",
                param="roles",
            )
        return Teaching(tuple(body.roles), all_turns=True, read=read).lesson(server.tokenizer, messages, context)
    assert body.text is not None
    if "roles" in body.model_fields_set:
        raise BadRequest("roles go with messages only", param="roles")
    if not body.text:
        raise BadRequest("text must have at least one character, got ''", param="text")
    spans = [(0, len(body.text))] if body.spans is None else [(span[0], span[1]) for span in body.spans]
    for start, stop in spans:
        if not 0 <= start < stop <= len(body.text):
            raise BadRequest(f"spans must lie in the text, [0, {len(body.text)}), got [{start}, {stop})", param="spans")
    try:
        ids, inside = plain_tokens_at(server.tokenizer, body.text, spans)
    except ValueError as error:
        raise BadRequest(str(error), param="text") from None
    if len(ids) > context:
        raise BadRequest(
            f"text must have at most {context} tokens, got {len(ids)}; send it in parts",
            param="text", code="context_length_exceeded",
        )  # fmt: skip
    return Lesson.of(ids, inside, context, read=read)


def _telling(server: Server, body: LearnRequest, lesson: Lesson) -> Telling:
    """How the ``lesson`` in ``body`` is read."""
    for name in ("passes", "emphasis"):
        if server.service.reads and getattr(body, name) is not None:
            raise BadRequest(
                f"{name} is for users with weights of their own; those of this model have states", param=name
            )
    return server.service.telling.of(lesson.tokens).changed(passes=body.passes, emphasis=body.emphasis)


def _zipped(state: dict[str, Any], base_model: str) -> bytes:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "adapter"
        export_peft(state, folder, base_model=base_model)
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as archive:
            for file in sorted(folder.iterdir()):
                archive.write(file, file.name)
        return data.getvalue()
