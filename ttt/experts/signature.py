"""`Signature`: what kind of text a column has read, as counts of pairs of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BUCKETS = 1 << 16  # of pairs: those of bytes have one each, those of more words share
_MIX = 40503  # odd: a permutation of the buckets
_PAIR, _WORD = 8.0, 128.0  # tokens' worth of trust in the single words, and in the uniform distribution


class Signature:
    """A bigram model, interpolated with single words (MacKay & Peto 1995), of the texts that were added::

        p(b | a) = (c(a, b) + 8 p(b)) / (c(a) + 8)        p(b) = (c(b) + 128 / V) / (n + 128)

    Pairs are counted in `BUCKETS` buckets; where two share one, both are thought likelier than they are.

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
        """Of the counts."""
        return sum(t.numel() * t.element_size() for t in self.counts)

    def copy(self) -> Signature:
        """One of its own."""
        return Signature.of(*(t.clone() for t in self.counts))

    @staticmethod
    def of(pairs: Tensor, first: Tensor, second: Tensor) -> Signature:
        """The signature that holds these counts themselves."""
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
        """-log2 p of the T - 1 pairs of each row of ``ids`` (B, T) int64, in sum."""
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
    """Bits that describing both texts' pairs by one distribution costs, for each token of the shorter; 0 for the same.

    The Jensen-Shannon divergence of the pairs, weighted by the texts' lengths, but for its scale. Never negative.
    """
    apart = _cost(joined(one, other)) - _cost(one) - _cost(other)
    return apart / max(1.0, min(float(one.first.sum()), float(other.first.sum())))


def _cost(signature: Signature) -> float:
    """Sum over the n pairs of -log2 c(a, b) / n."""
    pairs = signature.pairs.double()
    return float(torch.special.xlogy(pairs.sum(), pairs.sum()) - torch.special.xlogy(pairs, pairs).sum()) / math.log(2)


def nearest(signatures: Sequence[Signature]) -> tuple[int, int]:
    """The two (i < j) of the smallest `distance`."""
    pairs = [(i, j) for j in range(len(signatures)) for i in range(j)]
    return min(pairs, key=lambda p: distance(signatures[p[0]], signatures[p[1]]))
