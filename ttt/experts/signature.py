"""`Signature`: counts of pairs of tokens, which tell what kind of text a column has read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BUCKETS = 1 << 16  # for pairs: every pair of bytes has its own; with larger vocabularies, pairs share buckets
_MIX = 40503  # odd, so that multiplying by it permutes the buckets
_PAIR, _WORD = 8.0, 128.0  # weights, in tokens, of the distribution of single words and of the uniform one


class Signature:
    """A bigram model of the texts that were added, interpolated with single words (MacKay & Peto 1995):

        p(b | a) = (c(a, b) + 8 p(b)) / (c(a) + 8)        p(b) = (c(b) + 128 / V) / (n + 128)

    Pairs are counted in `BUCKETS` buckets. Where two pairs share one, both get too large a probability.

    Args:
        words: V, the size of the vocabulary.

    Attributes:
        pairs: (BUCKETS,) float32, c(a, b). first, second: (V,) float32, c(a), c(b).
    """

    def __init__(self, words: int, device: torch.device | str | None = None) -> None:
        self.pairs = torch.zeros(BUCKETS, device=device)
        self.first, self.second = torch.zeros(words, device=device), torch.zeros(words, device=device)

    @property
    def counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """``pairs``, ``first`` and ``second``."""
        return self.pairs, self.first, self.second

    @property
    def bytes(self) -> int:
        """Memory of the counts."""
        return sum(t.numel() * t.element_size() for t in self.counts)

    def copy(self) -> Signature:
        """A signature with copies of the counts."""
        return Signature.of(*(t.clone() for t in self.counts))

    @staticmethod
    def of(pairs: Tensor, first: Tensor, second: Tensor) -> Signature:
        """The signature that holds these tensors themselves, not copies."""
        made = Signature.__new__(Signature)
        made.pairs, made.first, made.second = pairs, first, second
        return made

    def add(self, ids: Tensor, sign: int = 1) -> None:
        """Count the T - 1 pairs of each row of ``ids`` (B, T) int64; with ``sign`` -1 take them out again."""
        a, b = ids[:, :-1].flatten(), ids[:, 1:].flatten()
        one = self.pairs.new_full((len(a),), float(sign))
        self.pairs.index_add_(0, self._bucket(a, b), one)
        self.first.index_add_(0, a, one)
        self.second.index_add_(0, b, one)

    def bits(self, ids: Tensor) -> float:
        """The sum of -log2 p over the T - 1 pairs of each row of ``ids`` (B, T) int64."""
        a, b = ids[:, :-1].flatten(), ids[:, 1:].flatten()
        word = (self.second[b] + _WORD / len(self.second)) / (self.second.sum() + _WORD)
        p = (self.pairs[self._bucket(a, b)] + _PAIR * word) / (self.first[a] + _PAIR)
        return -float(p.log2().sum(dtype=torch.float64))

    def _bucket(self, a: Tensor, b: Tensor) -> Tensor:
        return (a * len(self.first) + b) * _MIX % BUCKETS


def joined(one: Signature, other: Signature) -> Signature:
    """The signature of both texts."""
    return Signature.of(*(x + y for x, y in zip(one.counts, other.counts, strict=True)))


def distance(one: Signature, other: Signature) -> float:
    """Bits per token of the shorter text that it costs to describe the pairs of both by one distribution.

    It is 0 for equal distributions and never negative: up to its scale it is the Jensen-Shannon divergence of the
    pairs, weighted by the lengths of the texts.
    """
    apart = _cost(joined(one, other)) - _cost(one) - _cost(other)
    return apart / max(1.0, min(float(one.first.sum()), float(other.first.sum())))


def _cost(signature: Signature) -> float:
    """The sum of -log2 (c(a, b) / n) over all n pairs, bits."""
    pairs = signature.pairs.double()
    return float(torch.special.xlogy(pairs.sum(), pairs.sum()) - torch.special.xlogy(pairs, pairs).sum()) / math.log(2)


def nearest(signatures: Sequence[Signature]) -> tuple[int, int]:
    """The indices i < j of the two signatures with the smallest `distance`."""
    pairs = [(i, j) for j in range(len(signatures)) for i in range(j)]
    return min(pairs, key=lambda p: distance(signatures[p[0]], signatures[p[1]]))
