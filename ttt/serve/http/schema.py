"""What requests may hold. What OpenAI's API has and this server has not is refused by name, unless it has no effect."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from ttt.conversation import MOST_PASSES
from ttt.serve.errors import BadRequest
from ttt.serve.sampling import Sampling

_NO_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity"}
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "web_search_options": (None,),
}
"""Parameters of OpenAI's API that are not supported, with the values that ask for nothing."""


def _encodable(text: str) -> str:
    """``text``; an error of pydantic's if UTF-8 cannot hold it: JSON can name halves of characters, as in "\\ud83d"."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError(
            "not_utf8", "must be text that UTF-8 can hold ({reason})", {"reason": error.reason}
        ) from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class Strict(BaseModel):
    """Refuses parameters that it does not know."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """What a stream ends with."""

    include_usage: bool = False


class _Generation(BaseModel):
    """What requests for text have in common."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    n: int = Field(1, ge=1)  # what the server generates at a time is its own bound
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _defaults_for_null(cls, values: Any) -> Any:
        """null stands for the default."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None or name not in cls.model_fields}

    def refuse_extras(self) -> None:
        """Raise BadRequest for a parameter that is not supported and would have an effect."""
        for name, value in (self.model_extra or {}).items():
            if name in _NO_EFFECT or (name in _NEUTRAL and value in _NEUTRAL[name]):
                continue
            known = "is not supported by this server" if name in _NEUTRAL else "is not known"
            raise BadRequest(f"the parameter {name!r:.80} {known}", param=name[:80], code="unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise BadRequest("stream_options goes with stream=true only", param="stream_options")

    def sampling(self, max_tokens: int, logprobs: int | None) -> Sampling:
        """How tokens are drawn."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if any(not text for text in stop):
            raise BadRequest("stop must hold texts that are not empty", param="stop")
        return Sampling(
            max_tokens, self.temperature, self.top_p, max(self.top_k, 0), self.frequency_penalty, self.presence_penalty,
            self.seed, tuple(stop), logprobs, self.ignore_eos,
        )  # fmt: skip


def _text_only(kind: str) -> str:
    """``kind``, or an error if parts of a message with this type are not supported, as images and audio."""
    if kind != "text":
        raise PydanticCustomError("unsupported_part", "this server takes parts of type 'text' only")
    return kind


class TextPart(Strict):
    """A part of a message."""

    type: Annotated[str, AfterValidator(_text_only)]
    text: Text


class ChatMessage(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Union[Text, list[TextPart], None] = None  # noqa: UP007
    name: str | None = None
    tool_call_id: str | None = None
    refusal: str | None = None

    def plain(self, at: int) -> dict[str, str]:
        """The message as chat templates take it; ``at`` is its place, for messages.

        Raises:
            BadRequest: if it holds something that is not supported.
        """
        for name, value in (self.model_extra or {}).items():
            if value not in (None, [], {}):
                raise BadRequest(
                    f"messages[{at}].{name:.80} is not supported by this server",
                    param=f"messages[{at}].{name:.80}", code="unsupported_parameter",
                )  # fmt: skip
        if self.content is None:
            raise BadRequest(f"messages[{at}].content must be a text, got null", param=f"messages[{at}].content")
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Generation):
    """The body of ``/v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=2048)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)


class CompletionRequest(_Generation):
    """The body of ``/v1/completions``."""

    prompt: Text | list[Text] | list[int] | list[list[int]]
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False


class LearnRequest(Strict):
    """The body of ``/v1/users/{id}/learn``: a text, or a chat.

    ``spans`` are the parts [start, stop) of the text, in characters, that teach; by default all of it. Of a chat the
    messages of ``roles`` teach. ``passes`` and ``emphasis`` are those of `ttt.conversation.Telling`; by default
    the server's for a text of this length.
    """

    text: Text | None = None
    spans: list[Annotated[list[int], Field(min_length=2, max_length=2)]] | None = Field(None, max_length=4096)
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=2048)
    roles: list[Literal["user", "assistant", "system", "tool"]] = Field(["user"], min_length=1)
    passes: int | None = Field(None, ge=1, le=MOST_PASSES)
    emphasis: float | None = Field(None, gt=0, le=100)


class RollbackRequest(Strict):
    """The body of ``/v1/users/{id}/rollback``."""

    version: int = Field(ge=1, lt=2**63)


class StudyRequest(Strict):
    """The body of ``/v1/users/{id}/study``, as the arguments of `ttt.Learner.study`."""

    passes: int = Field(20, ge=1, le=200)
    lr: float = Field(0.005, gt=0, le=0.1)
    until: float = Field(0.2, ge=0)
    rehearse: float = Field(10.0, ge=0, le=1000)
