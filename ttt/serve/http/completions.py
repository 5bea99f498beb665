"""``/v1/chat/completions``, ``/v1/completions`` and ``/v1/models``, as OpenAI has them."""

from __future__ import annotations

import dataclasses
import functools
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from ttt.serve.errors import BadRequest, NotFound, as_request_error
from ttt.serve.http.running import Running
from ttt.serve.http.schema import ChatRequest, CompletionRequest, StreamOptions
from ttt.serve.http.state import Server, server_of
from ttt.serve.keys import Identity
from ttt.serve.request import Outcome, Piece
from ttt.serve.sampling import Sampling, TokenScore
from ttt.serve.teaching import Lesson, Teaching, check_learn_header
from ttt.serve.token_text import Offsets, TokenText

router = APIRouter()


@router.get("/v1/models")
async def models(http: Request) -> dict[str, Any]:
    """List the model that is served."""
    server = server_of(http)
    server.identify(http)
    return {"object": "list", "data": [_model(server)]}


@router.get("/v1/models/{name:path}")
async def model(http: Request, name: str) -> dict[str, Any]:
    """Describe the model that is served."""
    server = server_of(http)
    server.identify(http)
    _require_model(server, name)
    return _model(server)


def _model(server: Server) -> dict[str, Any]:
    return {
        "id": server.name, "object": "model", "created": server.created, "owned_by": "ttt",
        "max_model_len": server.service.context,
    }  # fmt: skip


@router.post("/v1/chat/completions", response_model=None)
async def chat(http: Request, body: ChatRequest) -> dict[str, Any] | StreamingResponse:
    """Answer a chat; then learn from the user's own words of its last turn, unless ``x-ttt-learn`` is ``off``."""
    server, identity = _admitted(http, body)
    if body.top_logprobs and not body.logprobs:
        raise BadRequest("top_logprobs goes with logprobs=true only", param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise BadRequest("max_tokens and max_completion_tokens exclude each other", param="max_tokens")
    messages = [message.plain(at) for at, message in enumerate(body.messages)]
    prompt = await server.apart(server.chat_tokens, messages)
    wanted_by = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    sampling = body.sampling(
        _room(server, prompt, body.max_completion_tokens or body.max_tokens, "messages", wanted_by),
        body.top_logprobs if body.logprobs else None,
    )
    learn = check_learn_header(http.headers.get("x-ttt-learn", "on"))
    lesson = None
    if learn != "off" and identity.user is not None:
        teaching = Teaching(read=server.service.reads)
        lesson = await server.apart(teaching.lesson, server.tokenizer, messages, server.service.context)
    running = _begun(server, identity, prompt, sampling, n=body.n, lesson=lesson, wait=learn == "wait")
    shape = _Shape("chatcmpl", "chat.completion", server.name)
    if body.stream:
        return _Stream(running, _chat_chunks(server, running, shape, body.n, body.stream_options))
    texts, scores, reasons, outcome = await _collected(running, http, body.n)
    choices = [
        {
            "index": at, "message": {"role": "assistant", "content": texts[at], "refusal": None},
            "finish_reason": reasons[at],
            "logprobs": _chat_logprobs(server, scores[at]) if body.logprobs else None,
        }
        for at in range(body.n)
    ]  # fmt: skip
    return shape.body() | {"choices": choices} | _end(outcome)


@router.post("/v1/completions", response_model=None)
async def completions(http: Request, body: CompletionRequest) -> dict[str, Any] | StreamingResponse:
    """Continue one or more texts. Learn from them only if ``x-ttt-learn`` says so."""
    server, identity = _admitted(http, body)
    prompts = await server.apart(_prompts, server, body.prompt)
    if body.stream and (len(prompts) > 1 or body.echo):
        raise BadRequest("stream=true takes one prompt, without echo", param="stream")
    if body.max_tokens == 0 and not body.echo:
        raise BadRequest("max_tokens must be at least 1 without echo, got 0", param="max_tokens")
    if body.echo and body.n > 1:
        raise BadRequest("echo goes with n=1 only", param="n")
    samplings = [
        body.sampling(_room(server, prompt, body.max_tokens, "prompt", "max_tokens", least=0), body.logprobs)
        for prompt in prompts
    ]
    learn = check_learn_header(http.headers.get("x-ttt-learn", "off"))
    lessons: list[Lesson | None] = [None] * len(prompts)
    if learn != "off" and identity.user is not None:
        context, read = server.service.context, server.service.reads
        lessons = [Lesson.of(prompt, [True] * len(prompt), context, read=read) for prompt in prompts]
    runnings: list[Running] = []
    try:
        for prompt, sampling, lesson in zip(prompts, samplings, lessons, strict=True):
            options = {"n": body.n, "lesson": lesson, "wait": learn == "wait"}
            score = body.echo and body.logprobs is not None
            runnings.append(_begun(server, identity, prompt, sampling, score_prompt=score, **options))
        shape = _Shape("cmpl", "text_completion", server.name)
        if body.stream:
            chunks = _text_chunks(server, runnings[0], shape, body.n, body.stream_options, body.logprobs)
            return _Stream(runnings[0], chunks)
        choices: list[dict[str, Any]] = []
        outcomes = []
        for running, prompt in zip(runnings, prompts, strict=True):
            texts, scores, reasons, outcome = await _collected(running, http, body.n)
            outcomes.append(outcome)
            for at in range(body.n):
                text, found = texts[at], scores[at]
                if body.echo:
                    text = server.text(prompt) + text
                    first = TokenScore(prompt[0], float("nan"))
                    found = [first, *running.prompt_scores, *found] if body.logprobs is not None else []
                choices.append({
                    "index": len(choices), "text": text, "finish_reason": reasons[at],
                    "logprobs": None if body.logprobs is None else _text_logprobs(server, found, Offsets()),
                })  # fmt: skip
    except BaseException:
        for running in runnings:
            running.close()
        raise
    total = dataclasses.replace(
        outcomes[-1], prompt_tokens=sum(each.prompt_tokens for each in outcomes),
        completion_tokens=sum(each.completion_tokens for each in outcomes),
    )  # fmt: skip
    return shape.body() | {"choices": choices} | _end(total)


# -- what was asked ----------------------------------------------------------------------------------------------


def _admitted(http: Request, body: ChatRequest | CompletionRequest) -> tuple[Server, Identity]:
    """The server, and who asks, for a request without anything that is not supported."""
    server = server_of(http)
    identity = server.identify(http)
    body.refuse_extras()
    server.service.limits.check_n(body.n)
    _require_model(server, body.model)
    return server, identity


def _begun(server: Server, identity: Identity, prompt: list[int], sampling: Sampling, **options: Any) -> Running:
    """A request that the service works on, after its tokens were counted; ``options`` are those of `Running`."""
    server.limits.take(identity.key, tokens=len(prompt) + options["n"] * sampling.max_tokens)
    return Running(
        server.service, server.metrics, identity.user, prompt, sampling, seconds=server.request_seconds,
        unused=functools.partial(server.limits.give_back, identity.key), **options,
    )  # fmt: skip


def _require_model(server: Server, name: str) -> None:
    if name != server.name:
        raise NotFound(
            f"the model {name!r:.100} does not exist; this server has {server.name!r}",
            param="model",
            code="model_not_found",
        )


def _room(server: Server, prompt: Sequence[int], wanted: int | None, param: str, wanted_by: str, least: int = 1) -> int:
    """How many tokens may be generated after ``prompt``.

    Args:
        wanted: how many are asked for, by the parameter ``wanted_by``; None for as many as there is room for.
        param: the parameter that holds the prompt.
        least: how many must fit.

    Raises:
        BadRequest: which names ``param`` if the prompt leaves no room, and ``wanted_by`` if only that is too large.
    """
    context, code = server.service.context, "context_length_exceeded"
    left = context - len(prompt)
    if left < least:
        raise BadRequest(
            f"{param} must have at most {context - least} tokens, in a context of {context}, got {len(prompt)}",
            param=param, code=code,
        )  # fmt: skip
    if wanted is not None and left < wanted:
        raise BadRequest(
            f"{wanted_by} must be at most {left}, as {param} takes {len(prompt)} of the context's {context} tokens, "
            f"got {wanted}",
            param=wanted_by, code=code,
        )  # fmt: skip
    return left if wanted is None else wanted


def _prompts(server: Server, prompt: str | list[str] | list[int] | list[list[int]]) -> list[list[int]]:
    """The tokens of each prompt."""
    one = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], int))
    prompts: list[Any] = [prompt] if one else list(prompt)
    if not prompts or len(prompts) > 64:
        raise BadRequest(f"prompt must hold 1 to 64 texts, got {len(prompts)}", param="prompt")
    found = [server.tokens(each) if isinstance(each, str) else list(each) for each in prompts]
    for ids in found:
        if not ids:
            raise BadRequest("prompt must not be empty", param="prompt")
        server.check_tokens(ids, "prompt")
    return found


# -- what is answered --------------------------------------------------------------------------------------------


class _Shape:
    """What all parts of one answer have in common."""

    def __init__(self, prefix: str, kind: str, model: str) -> None:
        self.id, self.created = f"{prefix}-{secrets.token_hex(12)}", int(time.time())
        self.kind, self.model = kind, model

    def body(self, kind: str | None = None) -> dict[str, Any]:
        return {"id": self.id, "object": kind or self.kind, "created": self.created, "model": self.model}


def _usage(outcome: Outcome) -> dict[str, int]:
    prompt, completion = outcome.prompt_tokens, outcome.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _end(outcome: Outcome) -> dict[str, Any]:
    learnt = {"updates": outcome.updates, "version": outcome.version, "learning": outcome.learning}
    return {"usage": _usage(outcome), "ttt": learnt}


async def _collected(
    running: Running, http: Request, n: int
) -> tuple[list[str], list[list[TokenScore]], list[str | None], Outcome]:
    """Texts, scores of tokens and reasons to end of all ``n`` sequences, and the outcome."""
    texts, scores = [""] * n, [list[TokenScore]() for _ in range(n)]
    reasons: list[str | None] = [None] * n
    outcome: Outcome | None = None
    async for event in running.events(http):
        if isinstance(event, Outcome):
            outcome = event
        else:
            texts[event.index] += event.text
            scores[event.index] += event.tokens
            reasons[event.index] = event.finish or reasons[event.index]
    assert outcome is not None
    return texts, scores, reasons, outcome


class _Stream(StreamingResponse):
    """Sends ``chunks`` as server-sent events; if the client hangs up, even before the first one, ends the request."""

    def __init__(self, running: Running, chunks: AsyncIterator[dict[str, Any] | str]) -> None:
        super().__init__(_lines(chunks), media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._running = running

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._running.close()


async def _lines(chunks: AsyncIterator[dict[str, Any] | str]) -> AsyncIterator[str]:
    try:
        async for chunk in chunks:
            yield f"data: {chunk if isinstance(chunk, str) else json.dumps(chunk)}\n\n"
    except Exception as error:
        yield as_request_error(error).event()


async def _chunks(
    running: Running,
    shape: _Shape,
    kind: str,
    options: StreamOptions | None,
    choice: Callable[[Piece], dict[str, Any]],
) -> AsyncIterator[dict[str, Any] | str]:
    """The parts of a streamed answer. The last one with a choice also says what was learnt."""
    left = running.request.n
    last: Piece | None = None
    async for event in running.events():
        if isinstance(event, Outcome):
            if last is not None:
                yield shape.body(kind) | {"choices": [choice(last)], "ttt": _end(event)["ttt"]}
            if options is not None and options.include_usage:
                yield shape.body(kind) | {"choices": [], "usage": _usage(event)}
            yield "[DONE]"
            continue
        if event.text or event.tokens:
            yield shape.body(kind) | {"choices": [choice(dataclasses.replace(event, finish=None))]}
        if event.finish:
            left -= 1
            end = dataclasses.replace(event, text="", tokens=())
            if left:
                yield shape.body(kind) | {"choices": [choice(end)]}
            else:  # sent with the outcome
                last = end


async def _chat_chunks(
    server: Server, running: Running, shape: _Shape, n: int, options: StreamOptions | None
) -> AsyncIterator[dict[str, Any] | str]:
    kind = "chat.completion.chunk"
    for at in range(n):
        first = {"index": at, "delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None}
        yield shape.body(kind) | {"choices": [first]}

    def choice(piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text or piece.tokens else {}
        return {
            "index": piece.index, "delta": delta, "finish_reason": piece.finish,
            "logprobs": _chat_logprobs(server, piece.tokens) if piece.tokens else None,
        }  # fmt: skip

    async for chunk in _chunks(running, shape, kind, options, choice):
        yield chunk


async def _text_chunks(
    server: Server, running: Running, shape: _Shape, n: int, options: StreamOptions | None, logprobs: int | None
) -> AsyncIterator[dict[str, Any] | str]:
    offsets = [Offsets() for _ in range(n)]

    def choice(piece: Piece) -> dict[str, Any]:
        scores = None if logprobs is None else _text_logprobs(server, piece.tokens, offsets[piece.index])
        return {"index": piece.index, "text": piece.text, "finish_reason": piece.finish, "logprobs": scores}

    async for chunk in _chunks(running, shape, shape.kind, options, choice):
        yield chunk


def _chat_logprobs(server: Server, scores: Sequence[TokenScore]) -> dict[str, Any]:
    def one(token: int, logprob: float) -> dict[str, Any]:
        text = TokenText.of(server.tokenizer, token)
        return {"token": text.shown, "logprob": max(logprob, -9999.0), "bytes": list(text.raw)}

    content = [one(s.token, s.logprob) | {"top_logprobs": [one(*each) for each in s.top]} for s in scores]
    return {"content": content, "refusal": None}


def _text_logprobs(server: Server, scores: Sequence[TokenScore], offsets: Offsets) -> dict[str, Any]:
    """``nan`` stands for the first token of a text, which has no probability; ``offsets`` are those of the text."""
    tokens = [TokenText.of(server.tokenizer, score.token) for score in scores]
    known = [score.logprob == score.logprob for score in scores]
    return {
        "tokens": [token.shown_apart for token in tokens],
        "token_logprobs": [
            max(s.logprob, -9999.0) if is_known else None for s, is_known in zip(scores, known, strict=True)
        ],
        "top_logprobs": [_top(server, s) if is_known else None for s, is_known in zip(scores, known, strict=True)],
        "text_offset": [offsets.add(token) for token in tokens],
    }


def _top(server: Server, score: TokenScore) -> dict[str, float]:
    """The likeliest tokens by their texts; of several with one text, as a special token and the same letters, the
    likeliest."""
    found: dict[str, float] = {}
    for token, value in score.top:
        found.setdefault(TokenText.of(server.tokenizer, token).shown_apart, max(value, -9999.0))
    return found
