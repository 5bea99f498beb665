"""`Request`: text to be continued, and what its sender hears of it: each `Piece`, and the `Outcome`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ttt.serve.errors import RequestError
from ttt.serve.sampling import Sampling, TokenScore
from ttt.serve.teaching import Lesson


@dataclasses.dataclass(frozen=True)
class Piece:
    """Text that a sequence has grown by, with its tokens; text may come later than its tokens.

    Attributes:
        index: of the sequence among the request's.
        text: to be added.
        tokens: with their log probabilities, if the request asks for them; empty otherwise.
        finish: why the sequence has ended, "stop" or "length"; None if it goes on.
        count: number of tokens so far.
    """

    index: int
    text: str
    tokens: tuple[TokenScore, ...]
    finish: str | None
    count: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The end of a request that was served.

    Attributes:
        prompt_tokens, completion_tokens: numbers of tokens read and generated.
        updates, version: of the user's `Session` at the end; None without a user.
        learning: "off", "queued", "stored", or "refused: WHY".
    """

    prompt_tokens: int
    completion_tokens: int
    updates: int | None = None
    version: int | None = None
    learning: str = "off"


@dataclasses.dataclass(eq=False)
class Request:
    """Text to be continued, with the weights of a user.

    Attributes:
        user: whose weights are used; None for the base model's.
        prompt: tokens, at least one.
        sampling: how to go on; ``max_tokens`` 0 only reads.
        deliver: called in the engine's thread with each `Piece`, and at the end with an `Outcome` or a `RequestError`.
        n: number of continuations.
        lesson: what to learn after the last one has ended; None for nothing.
        wait: whether the outcome is to come when the lesson is stored, instead of at the end of the text.
        score_prompt: whether to give the log probabilities of the prompt's tokens to ``on_prompt``.
        on_prompt: called in the engine's thread with them; the first token has none.
        cancelled: set by anyone, from any thread: the request ends without an outcome, and teaches nothing.
    """

    user: str | None
    prompt: list[int]
    sampling: Sampling
    deliver: Callable[[Piece | Outcome | RequestError], None]
    n: int = 1
    lesson: Lesson | None = None
    wait: bool = False
    score_prompt: bool = False
    on_prompt: Callable[[list[TokenScore]], None] | None = None
    cancelled: bool = False
    arrival: int = 0
    generated: int = 0
    running: int = 0
    failed: bool = False
