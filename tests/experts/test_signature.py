"""Signatures against bigram models counted with dictionaries, and the sums of evidence against the recursion."""

import itertools
import math
from collections import Counter

import pytest
import torch

from ttt.experts.change_detection import Evidence
from ttt.experts.signature import BUCKETS, Signature, distance, joined, nearest

WORDS = 11


def made(*texts, words=WORDS):
    found = Signature(words)
    for ids in texts:
        found.add(ids)
    return found


def pairs_of(ids):
    return [pair for row in ids.tolist() for pair in itertools.pairwise(row)]


def test_bits_are_those_of_the_interpolated_bigram_model():
    texts, new = [torch.randint(WORDS, shape) for shape in ((1, 40), (3, 7))], torch.randint(WORDS, (2, 9))
    read = [pair for ids in texts for pair in pairs_of(ids)]
    pairs, first, second = Counter(read), Counter(a for a, _ in read), Counter(b for _, b in read)
    expected = 0.0
    for a, b in pairs_of(new):
        word = (second[b] + 128 / WORDS) / (len(read) + 128)
        expected -= math.log2((pairs[a, b] + 8 * word) / (first[a] + 8))
    assert made(*texts).bits(new) == pytest.approx(expected, rel=1e-5)
    assert made().bits(new) == pytest.approx(16 * math.log2(WORDS), rel=1e-5)  # nothing read: all alike likely


def test_the_model_is_a_distribution_over_bytes():
    found = made(torch.randint(256, (1, 600)), words=256)
    for a in torch.randint(256, (3,)).tolist():
        rows = torch.stack([torch.full((256,), a), torch.arange(256)], 1)
        total = sum(2 ** -found.bits(row.view(1, 2)) for row in rows)
        assert total == pytest.approx(1, abs=1e-4)


def test_words_beyond_the_buckets_are_counted():
    words = 3 * BUCKETS + 7
    ids = torch.randint(words, (1, 200))
    found = made(ids, words=words)
    assert [float(t.sum()) for t in found.counts] == [199.0] * 3
    assert found.bits(ids) < 199 * math.log2(words) - 199


def test_taking_out_is_never_having_counted():
    one, other = torch.randint(WORDS, (1, 50)), torch.randint(WORDS, (2, 8))
    found = made(one, other)
    kept = found.copy()
    found.add(other, -1)
    assert all(torch.equal(x, y) for x, y in zip(found.counts, made(one).counts, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(kept.counts, made(one, other).counts, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(joined(made(one), made(other)).counts, kept.counts, strict=True))


def entropy(read):
    return -sum(count * math.log2(count / len(read)) for count in Counter(read).values())


def test_distance_is_what_one_distribution_for_both_costs():
    texts = [torch.randint(WORDS, (1, length)) for length in (120, 35)]
    reads = [pairs_of(ids) for ids in texts]
    expected = (entropy(reads[0] + reads[1]) - entropy(reads[0]) - entropy(reads[1])) / 34
    one, other = (made(ids) for ids in texts)
    assert distance(one, other) == pytest.approx(expected, rel=1e-6)
    assert distance(other, one) == pytest.approx(expected, rel=1e-6)
    assert distance(one, one) == pytest.approx(0, abs=1e-9)


def test_the_nearest_are_of_one_kind():
    kinds = [torch.rand(WORDS, WORDS) ** 6 for _ in range(3)]

    def text(kind):
        ids = [0]
        for _ in range(400):
            ids.append(int(torch.multinomial(kind[ids[-1]], 1)))
        return torch.tensor([ids])

    signatures = [made(text(kinds[i])) for i in (0, 1, 2, 1)]
    assert nearest(signatures) == (1, 3)


def test_evidence_is_pages_sum():
    evidence, expected, since = Evidence(0.25), 0.0, 0
    for bits, tokens in zip(torch.randn(300).tolist(), torch.randint(1, 5, (300,)).tolist(), strict=True):
        bits = 2 * bits + 0.5
        expected = max(0.0, expected + bits - 0.25 * tokens)
        since = since + tokens if expected else 0
        assert evidence.add(bits, tokens) == pytest.approx(expected)
        assert evidence.since == since
    evidence.add(50.0, 1)
    evidence.clear()
    assert (evidence.sum, evidence.since) == (0.0, 0)
