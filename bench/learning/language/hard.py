"""Hard texts: there is nothing in them that is worth learning, and learning from them must not hurt."""

from __future__ import annotations

import base64
from collections.abc import Callable

import torch
from torch import Tensor

from bench.learning.language import texts

CHUNK = 64
"""Tokens that a method scores before it learns from them."""

Encode = Callable[[str], Tensor]
"""Text -> its tokens (T,) int64."""


def _random(encode: Encode, vocabulary: int, count: int, g: torch.Generator) -> Tensor:
    return torch.randint(vocabulary, (count,), generator=g)


def _one_token(encode: Encode, vocabulary: int, count: int, g: torch.Generator) -> Tensor:
    return encode(" the")[:1].repeat(count)


def _base64(encode: Encode, vocabulary: int, count: int, g: torch.Generator) -> Tensor:
    noise = bytes(torch.randint(256, (6 * count,), generator=g).tolist())
    return encode(base64.b64encode(noise).decode())[:count]


def _numbers(encode: Encode, vocabulary: int, count: int, g: torch.Generator) -> Tensor:
    return encode(" ".join(map(str, torch.randint(10_000, (count,), generator=g).tolist())))[:count]


def _alternating(encode: Encode, vocabulary: int, count: int, g: torch.Generator) -> Tensor:
    # In turns of one chunk, so that every step of learning is followed by text of the other kind.
    parts = [encode(texts.read(name)[: 10 * count])[:count].split(CHUNK) for name in ("german", "headers")]
    return torch.cat([piece for pair in zip(*parts, strict=True) for piece in pair])[:count]


def _shuffled(encode: Encode, vocabulary: int, count: int, g: torch.Generator) -> Tensor:
    words = texts.english()[texts.SHUFFLED : texts.REPEATED][: 10 * count].split()
    return encode(" ".join(words[i] for i in torch.randperm(len(words), generator=g).tolist()))[:count]


def _repeated(encode: Encode, vocabulary: int, count: int, g: torch.Generator) -> Tensor:
    few = encode(texts.english()[texts.REPEATED :][:1000])[:50]
    return few.repeat(-(-count // len(few)))[:count]


HARD: dict[str, Callable[[Encode, int, int, torch.Generator], Tensor]] = {
    "random tokens": _random, "one token": _one_token, "base64": _base64, "random numbers": _numbers,
    "two languages in turns": _alternating, "shuffled words": _shuffled, "50 tokens repeated": _repeated,
}  # fmt: skip
"""Name -> function of (encode, size of the vocabulary, number of tokens, generator) that makes the tokens."""

READS = {"two languages in turns": ("german", "headers")}
"""Hard text -> the texts that it is made of, of those that may be missing."""
