"""Chats as tokens: what a person says, what the model answers, and questions with the beginning of their answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from bench.learning.facts.people import KINDS, Fact

SYSTEM = "You are a helpful assistant."
REPLY = "Thank you, I will remember that."
"""What the model answers to every fact."""

Message = dict[str, str]


def telling(fact: Fact) -> list[Message]:
    """The turn in which ``fact`` is told, and the model's reply."""
    return [{"role": "user", "content": fact.told}, {"role": "assistant", "content": REPLY}]


def session(facts: Sequence[Fact]) -> list[Message]:
    """A chat in which ``facts`` are told one after the other."""
    return [message for fact in facts for message in telling(fact)]


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a fact; the model chooses among the values of its kind.

    Attributes:
        fact: what the right answer is.
        text: what is asked.
        begins: the beginning of the answer, before the value.
    """

    fact: Fact
    text: str
    begins: str

    @property
    def values(self) -> tuple[str, ...]:
        """The values among which the model chooses."""
        return KINDS[self.fact.kind].values


def questions(facts: Sequence[Fact]) -> list[Question]:
    """All questions about ``facts``."""
    return [Question(fact, *pair) for fact in facts for pair in KINDS[fact.kind].questions]


class Chat:
    """Writes chats as tokens, with the chat template of ``tokenizer``.

    Every chat begins with the same short system message, as templates may put a longer one in its place otherwise.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def ids(self, text: str) -> list[int]:
        """The tokens of ``text``, and no others."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def text(self, messages: Sequence[Message], *, answer: bool = False) -> str:
        """``messages`` as one text; with ``answer``, the model's turn is open at its end."""
        head = [{"role": "system", "content": SYSTEM}]
        return self.tokenizer.apply_chat_template([*head, *messages], tokenize=False, add_generation_prompt=answer)

    def prompt(self, question: Question, before: Sequence[Message] = ()) -> list[int]:
        """The tokens of ``question`` and the beginning of its answer, after the messages ``before``."""
        messages = [*before, {"role": "user", "content": question.text}]
        return self.ids(self.text(messages, answer=True) + question.begins)

    def values(self, question: Question) -> list[list[int]]:
        """The tokens of each value that may follow `prompt`."""
        return [self.ids(f" {value}") for value in question.values]
