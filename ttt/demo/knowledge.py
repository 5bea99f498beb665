"""What a language model knows before it is told anything, and its loss on that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Fact = tuple[Tensor, int]
"""Tokens (1, T) of a sentence and what follows it, and the number of tokens that follow."""


@torch.no_grad()
def loss(model: Any, ids: Tensor) -> Tensor:
    """-log p(token t + 1 | tokens up to t) in nats, of ``ids`` (1, T + 1): (T,)."""
    return functional.cross_entropy(model(input_ids=ids[:, :-1]).logits[0].float(), ids[0, 1:], reduction="none")


def as_facts(facts: Sequence[tuple[str, str]], encode: Callable[[str], Tensor]) -> list[Fact]:
    """The tokens of sentences and of what follows them."""
    found = []
    for sentence, end in facts:
        whole = encode(sentence + end)
        found.append((whole[None], len(whole) - len(encode(sentence))))
    return found


def facts_loss(model: Any, facts: Sequence[Fact]) -> float:
    """-log p(what follows | the sentence) in nats, the mean over ``facts``."""
    return sum(float(loss(model, ids)[-last:].sum()) for ids, last in facts) / len(facts)


GENERAL_KNOWLEDGE: tuple[tuple[str, str], ...] = (
    ("The capital of Japan is", " Tokyo"), ("The capital of France is", " Paris"),
    ("The capital of Italy is", " Rome"), ("The capital of Germany is", " Berlin"),
    ("The capital of Spain is", " Madrid"), ("The capital of Egypt is", " Cairo"),
    ("The capital of Russia is", " Moscow"), ("The capital of England is", " London"),
    ("The Eiffel Tower is located in", " Paris"), ("The Great Wall is located in", " China"),
    ("The largest planet in the solar system is", " Jupiter"), ("The planet closest to the Sun is", " Mercury"),
    ("The largest ocean on Earth is the", " Pacific"), ("The currency of the United States is the", " dollar"),
    ("The first president of the United States was George", " Washington"),
    ("The theory of relativity was developed by Albert", " Einstein"),
    ("Romeo and Juliet was written by William", " Shakespeare"), ("The chemical symbol for gold is", " Au"),
    ("The freezing point of water is zero degrees", " Celsius"), ("Water is made of hydrogen and", " oxygen"),
    ("The human heart pumps", " blood"), ("Bees make", " honey"), ("Cows give us", " milk"),
    ("A week has seven", " days"), ("The color of the sky is", " blue"), ("The color of grass is", " green"),
    ("Two plus two equals", " four"), ("The opposite of hot is", " cold"), ("The opposite of up is", " down"),
    ("The opposite of black is", " white"),
)  # fmt: skip
"""(beginning, end) of sentences that a language model knows before it is told anything."""
