"""What all routes share: the service, the keys, the limits, and the tokenizer."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request

from ttt.learn.chat_template import prompt_tokens
from ttt.serve.errors import BadRequest
from ttt.serve.http.limits import RateLimits
from ttt.serve.http.metrics import Metrics
from ttt.serve.keys import Identity, Keys, NoKeys
from ttt.serve.service import Service

T = TypeVar("T")


@dataclasses.dataclass
class Server:
    """What the routes of one application share.

    Attributes:
        service: answers and learns.
        keys: tell who is asking.
        name: of the model, in requests and answers.
        metrics: for Prometheus.
        limits: of each key.
        request_seconds: the longest that a request may take.
        created: when the server started, in seconds since 1970.
    """

    service: Service
    keys: Keys | NoKeys
    name: str
    metrics: Metrics
    limits: RateLimits
    request_seconds: float = 300.0
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    # Tokenizers are not made for several threads at once; one after the other they take their turns.
    texts: concurrent.futures.Executor = dataclasses.field(
        default_factory=lambda: concurrent.futures.ThreadPoolExecutor(1, "ttt-text")
    )

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.service.tokenizer

    def identify(self, http: Request) -> Identity:
        """Who is asking; the request is counted.

        Raises:
            Unauthenticated, Forbidden, BadRequest: as `Keys.identify`. TooBusy: as `RateLimits.take`.
        """
        identity = self.keys.identify(http.headers.get("authorization"), http.headers.get("x-ttt-user"))
        self.limits.take(identity.key, requests=1)
        return identity

    async def apart(self, work: Callable[..., T], *args: Any) -> T:
        """Do ``work`` on a text in a thread of its own: other requests do not wait for a long text."""
        return await asyncio.get_running_loop().run_in_executor(self.texts, work, *args)

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text."""
        return self.tokenizer(text).input_ids

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return self.tokenizer.decode(list(ids))

    def chat_tokens(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The tokens of a chat in the model's template, with the beginning of an answer; see `prompt_tokens`.

        Raises:
            BadRequest: if the model has no chat template, or it refuses the messages.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise BadRequest("this model has no chat template; use /v1/completions", param="messages")
        try:
            return prompt_tokens(self.tokenizer, messages)
        except Exception as error:  # templates raise what they like
            raise BadRequest(f"the chat template refuses the messages: {error!s:.200}", param="messages") from None

    def check_tokens(self, ids: Sequence[int], param: str) -> None:
        """Raise BadRequest unless all ``ids`` are tokens of the model."""
        size = self.service.learner.model.get_input_embeddings().num_embeddings
        if (wrong := next((token for token in ids if not 0 <= token < size), None)) is not None:
            raise BadRequest(f"{param} must hold tokens from 0 to {size - 1}, got {wrong!s:.40}", param=param)


def server_of(http: Request) -> Server:
    """The `Server` of the application that got the request."""
    return http.app.state.server
