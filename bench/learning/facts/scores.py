"""What a model knows: its choice among the values of a fact, general facts, and how far it moved on general English."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.learning.facts.chat import Chat, Message, Question
from ttt.learn.huggingface import cache_of, cached

PAD = 0  # of rows that are too short; it stands after all tokens that are scored, so that no score depends on it

GENERAL: tuple[tuple[str, str], ...] = (
    ("The capital of Japan is", " Tokyo"), ("The capital of France is", " Paris"),
    ("The capital of Italy is", " Rome"), ("The capital of Germany is", " Berlin"),
    ("The capital of Spain is", " Madrid"), ("The capital of Egypt is", " Cairo"),
    ("The capital of Russia is", " Moscow"), ("The capital of England is", " London"),
    ("The largest planet in the solar system is", " Jupiter"), ("The planet closest to the Sun is", " Mercury"),
    ("Water is made of hydrogen and", " oxygen"), ("The chemical symbol for gold is", " Au"),
    ("The opposite of hot is", " cold"), ("The opposite of up is", " down"), ("The opposite of black is", " white"),
    ("Romeo and Juliet was written by William", " Shakespeare"),
    ("The theory of relativity was developed by Albert", " Einstein"),
    ("The first president of the United States was George", " Washington"), ("A week has seven", " days"),
    ("The color of the sky is", " blue"), ("The color of grass is", " green"), ("Two plus two equals", " four"),
    ("The freezing point of water is zero degrees", " Celsius"), ("The human heart pumps", " blood"),
    ("Bees make", " honey"), ("Cows give us", " milk"), ("The Great Wall is located in", " China"),
    ("The Eiffel Tower is located in", " Paris"), ("The currency of the United States is the", " dollar"),
    ("The largest ocean on Earth is the", " Pacific"),
)  # fmt: skip
"""(beginning, end) of sentences that the model knows before it is told anything."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a question was answered.

    Attributes:
        rank: of the right value among all, by probability; 1 is the best.
        nll: nats of the right value's tokens.
    """

    rank: int
    nll: float


@torch.no_grad()
def log_probabilities(model: Any, prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[float]:
    """The log probability of each of ``continuations`` after ``prompt``, summed over its tokens.

    The prompt is read once.
    """
    out = model(input_ids=torch.tensor([prompt]), **cached(model, None))
    first = out.logits[0, -1].float().log_softmax(-1)
    cache = copy.deepcopy(cache_of(out))
    cache.batch_repeat_interleave(len(continuations))
    rows = padded(continuations)
    after = model(input_ids=rows, **cached(model, cache)).logits.float().log_softmax(-1)
    found = []
    for row, tokens in enumerate(continuations):
        later = after[row].gather(1, rows[row, 1:, None])[: len(tokens) - 1] if len(tokens) > 1 else after.new_zeros(0)
        found.append(float(first[tokens[0]] + later.sum()))
    return found


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """``rows`` as one (B, T) int64 tensor, with `PAD` after the shorter ones."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[PAD] * (width - len(row))] for row in rows])


def choose(model: Any, chat: Chat, question: Question, before: Sequence[Message] = ()) -> Choice:
    """Let ``model`` choose the answer to ``question`` after the messages ``before``.

    The value whose tokens have the largest joint probability is chosen.
    """
    found = log_probabilities(model, chat.prompt(question, before), chat.values(question))
    right = found[question.fact.index]
    return Choice(1 + sum(value > right for value in found), -right)


@torch.no_grad()
def general_nll(model: Any, chat: Chat) -> float:
    """Nats of the ends of the sentences in `GENERAL`, mean over the sentences."""
    begins, ends = ([chat.ids(pair[side]) for pair in GENERAL] for side in (0, 1))
    rows = padded([begin + end for begin, end in zip(begins, ends, strict=True)])
    nll = -model(input_ids=rows).logits[:, :-1].float().log_softmax(-1).gather(2, rows[:, 1:, None])[..., 0]
    found = [nll[i, len(b) - 1 : len(b) + len(e) - 1].sum() for i, (b, e) in enumerate(zip(begins, ends, strict=True))]
    return float(torch.stack(found).mean())


@torch.no_grad()
def log_softmax(model: Any, rows: Tensor) -> Tensor:
    """(B, T, V): the log probabilities that ``model`` gives to each next token of ``rows`` (B, T)."""
    return model(input_ids=rows).logits.float().log_softmax(-1)


def divergence(before: Tensor, after: Tensor) -> float:
    """KL(before || after) in nats, mean over tokens, of two tensors of log probabilities (B, T, V)."""
    return float((before.exp() * (before - after)).sum(-1).mean(dtype=torch.float64))
