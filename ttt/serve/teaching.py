"""Which tokens of a chat may teach: by default the user's own words of the last turn, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ttt.learn.chat_template import turn_tokens
from ttt.learn.plain_text import Message
from ttt.serve.errors import BadRequest

LEARN = ("off", "on", "wait")
"""Values of the header ``x-ttt-learn``: learn nothing; learn after the answer; the same, and end when it is stored."""


def check_learn_header(value: str) -> str:
    """Return the ``value`` of the header ``x-ttt-learn``, or raise BadRequest if it is none of `LEARN`."""
    if value not in LEARN:
        raise BadRequest(
            f"the header x-ttt-learn must be one of {', '.join(LEARN)}, got {value!r:.40}", param="x-ttt-learn"
        )
    return value


@dataclasses.dataclass(frozen=True)
class Lesson:
    """A text to learn from.

    Attributes:
        ids: tokens, to the last one that teaches.
        learn: for each, whether it teaches; the others are context. The first only in a lesson that is read.
    """

    ids: list[int]
    learn: list[bool]

    @classmethod
    def of(cls, ids: Sequence[int], learn: Sequence[bool], longest: int, *, read: bool = False) -> Lesson | None:
        """The lesson of ``ids`` where ``learn``; None if nothing in it teaches.

        The newest ``longest`` tokens of it are kept.

        Args:
            read: whether it is to be read by a state, not learnt by weights, which learn a token from those before it:
                then the first token teaches too.
        """
        taught = [at for at, teaches in enumerate(learn) if teaches and (read or at > 0)]
        if not taught:
            return None
        end = taught[-1] + 1
        start = max(0, end - longest)
        ids, learn = list(ids[start:end]), list(learn[start:end])
        learn[0] = learn[0] and read
        return cls(ids, learn) if any(learn) else None

    @property
    def tokens(self) -> int:
        """How many tokens teach."""
        return sum(self.learn)

    @property
    def taught(self) -> list[int]:
        """The tokens that teach, without their context."""
        return [token for token, teaches in zip(self.ids, self.learn, strict=True) if teaches]

    def tensors(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """The tokens, (1, T) int64, and which of them teach, (1, T) bool, as `ttt.Learner.observe` takes them."""
        return torch.tensor([self.ids], device=device), torch.tensor([self.learn], device=device)


@dataclasses.dataclass(frozen=True)
class Teaching:
    """Chooses the tokens of a chat that teach.

    Attributes:
        roles: whose messages teach.
        all_turns: teach from every message of ``roles``, not only from the last message of the chat.
        read: see `Lesson.of`.
    """

    roles: tuple[str, ...] = ("user",)
    all_turns: bool = False
    read: bool = False

    def lesson(self, tokenizer: Any, messages: Sequence[Message], longest: int) -> Lesson | None:
        """What ``messages`` teach; None for nothing, as where the last one is a tool's, or is empty.

        The template's text, and messages of other roles, are context, as is the first token of a message that weights
        learn (`ttt.learn.chat_template.teaching_words`). Control tokens in messages are read as plain text.

        Args:
            longest: largest number of tokens, with context.

        Raises:
            BadRequest: if the chat template changes the words of a message that teaches.
        """
        chosen = [at for at, each in enumerate(messages) if each["role"] in self.roles and each["content"] != ""]
        if not self.all_turns:
            chosen = [at for at in chosen if at == len(messages) - 1]
        if not chosen:
            return None
        try:
            ids, inside, teaches = turn_tokens(tokenizer, messages[: chosen[-1] + 1], chosen, cut=True)
        except ValueError as error:
            raise BadRequest(str(error), param="messages") from None
        return Lesson.of(ids, inside if self.read else teaches, longest, read=self.read)
