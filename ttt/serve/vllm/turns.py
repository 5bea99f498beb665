"""Requests of users: with the user's weights, and learning from the prompt after the answer."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any

from ttt.serve.errors import BadRequest, RequestError
from ttt.serve.missed import forgotten
from ttt.serve.teaching import Lesson, Teaching
from ttt.serve.vllm.adapters import PREFIX
from ttt.serve.vllm.capture import KEY
from ttt.serve.vllm.identity import Turn
from ttt.serve.vllm.options import Options
from ttt.serve.vllm.seats import Seat, Seats

log = logging.getLogger("vllm.ttt")
Taught = tuple[list[int], list[bool], int]
"""Tokens, which of them teach, and how many tokens of the prompt stand before them."""


class Turns:
    """Runs the requests of users.

    Args:
        seats: the users' seats.
        options: the plugin's.
    """

    def __init__(self, seats: Seats, options: Options) -> None:
        self.seats, self.options = seats, options

    def check(self, turn: Turn, request: Any) -> None:
        """Take the body of a request of a user. Raises BadRequest for what cannot be served to one."""
        if getattr(request, "use_beam_search", False):
            raise BadRequest("use_beam_search must be false for users: beams were not tested", param="use_beam_search")
        turn.request = request
        if (getattr(request, "n", 1) or 1) > 1 and self.teaches(turn):
            raise BadRequest(
                "n must be 1 for a request that teaches; send the header x-ttt-learn: off for more answers", param="n"
            )
        if turn.learn in ("on", "wait") and not self.teaches(turn):
            raise BadRequest(
                "nothing of this request can teach: the last message must be the user's, of text alone that is not "
                "empty, or the prompt one text; leave out the header x-ttt-learn, or send 'off'"
            )

    def teaches(self, turn: Turn) -> bool:
        """Whether the request is to be learnt from."""
        messages, prompt = getattr(turn.request, "messages", None), getattr(turn.request, "prompt", None)
        if (turn.learn or self.options.learn) == "off":
            return False
        if messages:
            last = _plain(messages[-1])
            return last is not None and last["role"] == "user" and bool(last["content"].strip())
        one = isinstance(prompt, str) or (isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int))
        return turn.learn is not None and one and bool(prompt)  # text that is completed is learnt only if asked for

    async def run(
        self, generate: Callable[..., Any], turn: Turn, client: Any, params: Any, lora: Callable[[Seat], Any]
    ) -> AsyncIterator[Any]:
        """The outputs of a request, computed by ``generate(params, adapter)``."""
        seat, key = turn.seat, None
        if self.teaches(turn):
            key = secrets.token_hex(8)
            params.extra_args = {**(params.extra_args or {}), KEY: key}
            params.skip_reading_prefix_cache = True  # the hidden states of every token of the prompt are captured
        await seat.settled()  # what was said in an earlier turn is known in this one
        seat.starting += 1
        starting, done, ids, lesson = True, False, None, None

        def begun() -> None:
            nonlocal starting
            if starting:
                starting = False
                seat.starting -= 1
                self.seats.wake()

        try:
            async for out in generate(params, lora(seat)):
                begun()
                ids = out.prompt_token_ids or ids
                done = out.finished and all(each.finish_reason in ("stop", "length") for each in out.outputs)
                if done and key is not None:
                    lesson, key = self._begin(client, turn, key, list(ids or [])), None
                    if turn.learn == "wait":
                        await asyncio.shield(lesson)
                yield out
        finally:
            begun()
            if key is not None:  # it was aborted, or failed
                _background(self.seats.engine.call("drop", key))

    def _begin(self, client: Any, turn: Turn, key: str, ids: list[int]) -> asyncio.Task[None]:
        """Begin to learn from a prompt that was answered, in the background."""
        seat = turn.seat
        self.seats.pin(seat)
        task = asyncio.get_running_loop().create_task(self._learn(client, turn, key, ids))
        seat.lessons.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            seat.lessons.discard(task)
            self.seats.unpin(seat)
            error: BaseException | None = None
            if not task.cancelled():
                error = task.exception()
            elif seat.forgotten:
                error = forgotten()
            if error is not None and turn.learn != "wait":
                self.seats.missed.note(seat.user, error)

        task.add_done_callback(ended)
        return task

    async def _learn(self, client: Any, turn: Turn, key: str, ids: list[int]) -> None:
        seat = turn.seat
        try:
            if seat.forgotten:
                raise forgotten()
            found = self.lesson(turn.request, client.get_tokenizer(), ids)
            if found is None:
                raise BadRequest(
                    "nothing was learnt: the user's words cannot be found in the prompt, as where they hold control "
                    "tokens of the chat template, such as <|im_end|>, which vLLM reads as such"
                )
            learnt = await self.seats.change(seat, "learn", seat.user, key, *found)
            if turn.learn == "wait":
                seat.told += 1
                try:
                    seat.known = await self.seats.engine.call("stored", seat.user)
                finally:
                    seat.told -= 1
            log.debug("learnt: %s", learnt)
        except BaseException as error:
            if isinstance(error, RequestError) and error.code == "read_only":
                seat.known["read_only"] = error.message
            _background(self.seats.engine.call("drop", key))
            raise

    def lesson(self, request: Any, tokenizer: Any, ids: list[int]) -> Taught | None:
        """What ``request``, whose prompt was ``ids``, teaches; None if the words cannot be found there."""
        messages = getattr(request, "messages", None)
        if messages is None:
            whole = Lesson.of(ids, [True] * len(ids), len(ids))
        else:
            plain = [_plain(each) for each in messages]
            if any(each is None for each in plain):
                return None
            whole = Teaching().lesson(tokenizer, [each for each in plain if each is not None], len(ids))
        if whole is None or whole.ids != ids[: len(whole.ids)]:
            return None
        newest = Lesson.of(whole.ids, whole.learn, self.options.lesson)
        return None if newest is None else (newest.ids, newest.learn, len(whole.ids) - len(newest.ids))


def _plain(message: Any) -> dict[str, str] | None:
    """A message as role and text; None if it is something else too, as with a call of a tool or a picture.

    Parts of text are joined as vLLM joins them for a chat template that expects one text.
    """
    held = message if isinstance(message, dict) else message.model_dump(exclude_none=True)
    content = held.get("content")
    if isinstance(content, list):
        parts = [dict(part) for part in content]
        whole = all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts)
        content = "\n".join(part["text"] for part in parts) if whole else None
    if not isinstance(content, str) or held.get("tool_calls"):
        return None
    return {"role": held["role"], "content": content}


_tasks: set[asyncio.Task[Any]] = set()


def _background(work: Any) -> None:
    """Let ``work`` run by itself; a task that nobody holds could be collected before its end."""
    task = asyncio.get_running_loop().create_task(work)
    _tasks.add(task)

    def ended(task: asyncio.Task[Any]) -> None:
        _tasks.discard(task)
        if not task.cancelled():
            task.exception()  # the engine may be gone

    task.add_done_callback(ended)


def is_ours(lora_request: Any) -> bool:
    """Whether an adapter is a user's."""
    return lora_request is not None and lora_request.lora_path.startswith(PREFIX)
