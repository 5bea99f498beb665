"""Clients that stream from a server and note when tokens come."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import time
from typing import Any

import httpx


@dataclasses.dataclass(frozen=True)
class Streamed:
    """One streamed answer: seconds to the first token, gaps between its tokens, their number, and the last event."""

    first: float
    gaps: tuple[float, ...]
    tokens: int
    end: dict[str, Any]


async def stream(
    client: httpx.AsyncClient, model: str, text: str, user: str | None, learn: str, tokens: int
) -> Streamed:
    """Ask for ``tokens`` tokens after a chat of one turn."""
    body = {
        "model": model, "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "stream": True,
        "temperature": 0, "ignore_eos": True, "logprobs": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    headers = {"x-ttt-learn": learn} | ({"x-ttt-user": user} if user else {})
    began, times, end = time.perf_counter(), list[float](), dict[str, Any]()
    async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code}: {(await answer.aread()).decode()}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(line)
            if event["choices"] and event["choices"][0].get("logprobs"):
                times.append(time.perf_counter())
            end = event
    gaps = tuple(later - earlier for earlier, later in itertools.pairwise(times))
    return Streamed(times[0] - began, gaps, len(times), end)


async def all_at_once(
    url: str, model: str, texts: list[str], users: list[str | None], learn: str, tokens: int
) -> tuple[list[Streamed], float]:
    """One stream for each of ``users`` at the same time: what came, and the seconds until the last one had ended."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        began = time.perf_counter()
        tasks = [stream(client, model, text, user, learn, tokens) for text, user in zip(texts, users, strict=True)]
        return list(await asyncio.gather(*tasks)), time.perf_counter() - began
