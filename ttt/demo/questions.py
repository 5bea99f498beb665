"""Asking a language model what it was told: chats as tokens, and choices among answers."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ttt.learn.chat_template import Message, teaching_words, words_in_template
from ttt.learn.huggingface import cache_of, cached

SYSTEM = "You are a helpful assistant."
REPLY = "Thank you, I will remember that."
"""What the model answers to every sentence that it is told."""
PAD = 0  # of rows that are too short; it stands after all tokens that are scored, so that no score depends on it

_HEAD: Message = {"role": "system", "content": SYSTEM}


def telling(sentence: str) -> list[Message]:
    """The turn in which ``sentence`` is said, and the model's reply."""
    return [{"role": "user", "content": sentence}, {"role": "assistant", "content": REPLY}]


def session(sentences: Sequence[str]) -> list[Message]:
    """A chat in which ``sentences`` are said one after the other."""
    return [message for sentence in sentences for message in telling(sentence)]


@dataclasses.dataclass(frozen=True)
class Question:
    """A question whose answer is chosen among several values.

    Attributes:
        text: what is asked.
        begins: the beginning of the answer, before the value.
        values: what may follow.
        right: the index of the right one.
    """

    text: str
    begins: str
    values: tuple[str, ...]
    right: int


class Template:
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
        return self.tokenizer.apply_chat_template([_HEAD, *messages], tokenize=False, add_generation_prompt=answer)

    def turn(self, sentence: str) -> tuple[list[int], list[bool]]:
        """The tokens of a turn in which a person says ``sentence``, and which of them teach: words and their end.

        Raises:
            ValueError: as `words_in_template`.
        """
        whole, start, stop = words_in_template(self.tokenizer, [_HEAD, {"role": "user", "content": sentence}])
        before, said = self.ids(whole[:start]), self.ids(whole[start:stop])
        return before + said, teaching_words([False] * len(before) + [True] * len(said))

    def prompt(self, question: Question, before: Sequence[Message] = (), *, begun: bool = True) -> list[int]:
        """The tokens of ``question`` and, if ``begun``, the beginning of its answer, after the messages ``before``."""
        messages = [*before, {"role": "user", "content": question.text}]
        return self.ids(self.text(messages, answer=True) + (question.begins if begun else ""))


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a question was answered.

    Attributes:
        rank: of the right value among all, by probability; 1 is the best.
        nll: nats of the right value's tokens.
        chosen: index of the most probable value.
    """

    rank: int
    nll: float
    chosen: int


def choose(
    model: Any,
    template: Template,
    question: Question,
    before: Sequence[Message] = (),
    answering: Callable[[int], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Choice:
    """Let ``model`` choose the answer to ``question`` after the messages ``before``.

    The value whose tokens have the largest joint probability is chosen. ``answering`` is as in `log_probabilities`.
    """
    values = [template.ids(f" {value}") for value in question.values]
    found = log_probabilities(model, template.prompt(question, before), values, answering)
    right = found[question.right]
    return Choice(1 + sum(value > right for value in found), -right, found.index(max(found)))


@torch.no_grad()
def written(
    model: Any,
    template: Template,
    question: Question,
    before: Sequence[Message] = (),
    answering: Callable[[int], contextlib.AbstractContextManager] = contextlib.nullcontext,
    *,
    tokens: int = 24,
) -> str:
    """The answer that ``model`` writes by itself, of at most so many ``tokens``, each of them the most probable one.

    The other arguments are those of `choose`.
    """
    prompt = torch.tensor([template.prompt(question, before, begun=False)], device=next(model.parameters()).device)
    with answering(1):
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False)
    return template.tokenizer.decode(ids[0, prompt.shape[1] :].tolist(), skip_special_tokens=True)


def names_the_right_value(answer: str, question: Question) -> bool:
    """Whether ``answer`` has the right value of ``question`` as words of their own, in any case, and no other value."""
    named = [
        at for at, value in enumerate(question.values)
        if re.search(rf"\b{re.escape(value)}\b", answer, re.IGNORECASE)
    ]  # fmt: skip
    return named == [question.right]


@torch.no_grad()
def log_probabilities(
    model: Any,
    prompt: Sequence[int],
    continuations: Sequence[Sequence[int]],
    answering: Callable[[int], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> list[float]:
    """The log probability of each of ``continuations`` after ``prompt``, summed over its tokens.

    The prompt is read once. ``answering`` makes the context in which the model reads a batch of that many rows.

    Raises:
        ValueError: if prompt and continuation are longer than the model's context.
    """
    longest = len(prompt) + max(map(len, continuations))
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and longest > context:
        raise ValueError(f"prompt and continuation must fit into the context of {context} tokens, got {longest}")
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}
    device = next(model.parameters()).device
    with answering(1):
        out = model(input_ids=torch.tensor([prompt], device=device), **last, **cached(model, None))
    first = out.logits[0, -1].float().log_softmax(-1)
    cache = copy.deepcopy(cache_of(out))
    cache.batch_repeat_interleave(len(continuations))
    rows = padded(continuations, device)
    with answering(len(continuations)):
        after = model(input_ids=rows, **cached(model, cache)).logits.float().log_softmax(-1)
    found = []
    for row, tokens in enumerate(continuations):
        later = after[row].gather(1, rows[row, 1:, None])[: len(tokens) - 1] if len(tokens) > 1 else after.new_zeros(0)
        found.append(float(first[tokens[0]] + later.sum()))
    return found


def padded(rows: Sequence[Sequence[int]], device: torch.device | None = None) -> Tensor:
    """``rows`` as one (B, T) int64 tensor on ``device``, with `PAD`, which is 0, after the shorter ones."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[PAD] * (width - len(row))] for row in rows], dtype=torch.int64, device=device)
