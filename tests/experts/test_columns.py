"""Columns against full singular value decompositions in float64."""

import pytest
import torch

from ttt.experts.columns import compress, merge
from ttt.experts.signature import BUCKETS, Signature

SHAPES = ((33, 21), (7, 40), (5, 5))


def low_rank(rank, noise=0.0):
    return [torch.randn(m, rank) @ torch.randn(rank, n) + noise * torch.randn(m, n) for m, n in SHAPES]


def signature(length=50):
    made = Signature(30)
    made.add(torch.randint(30, (1, length)))
    return made


def column(deltas, rank=3, tokens=100, worth=1.0, seed=0):
    return compress(deltas, rank, tokens, worth, signature(), seed)


def truncated(delta, rank):
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def test_what_has_the_rank_is_kept():
    deltas = low_rank(3)
    found = column(deltas)
    for i, delta in enumerate(deltas):
        torch.testing.assert_close(found.delta(i), delta, rtol=1e-4, atol=1e-4)
    assert found.error < 1e-3
    assert found.bytes == 4 * (sum(3 * (m + n) for m, n in SHAPES) + BUCKETS + 2 * 30)


def test_truncation_is_the_best_one_and_says_what_it_lost():
    deltas = low_rank(2, noise=0.1)
    found = column(deltas, rank=4)
    lost = whole = 0.0
    for i, delta in enumerate(deltas):
        best = truncated(delta, 4)
        gone = float((found.delta(i).double() - delta.double()).square().sum())
        assert gone <= 1.02 * float((best - delta.double()).square().sum()) + 1e-8
        lost, whole = lost + gone, whole + float(delta.double().square().sum())
    assert found.error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)


def test_compression_is_seeded_and_draws_from_no_other_generator():
    deltas = low_rank(2, noise=0.5)
    read, state = signature(), torch.get_rng_state()
    one, same, other = (compress(deltas, 3, 100, 1.0, read, seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(one.a + one.b, same.a + same.b, strict=True))
    assert not torch.equal(one.a[0], other.a[0])


def test_zero_is_a_column():
    found = column([torch.zeros(m, n) for m, n in SHAPES])
    assert found.error == 0
    assert float(found.delta(0).abs().max()) == 0


def test_merging_is_the_truncated_mean_weighted_by_tokens():
    first, second = low_rank(3), low_rank(3)
    one, other = column(first, tokens=300, worth=1.0), column(second, tokens=100, worth=0.2)
    before = [t.clone() for t in one.a + one.b + other.a + other.b]
    merged = merge(one, other, 3)
    lost = whole = 0.0
    for i, (x, y) in enumerate(zip(first, second, strict=True)):
        mean = 0.75 * x.double() + 0.25 * y.double()
        torch.testing.assert_close(merged.delta(i).double(), truncated(mean, 3), rtol=1e-3, atol=1e-3)
        lost += float((truncated(mean, 3) - mean).square().sum())
        whole += float(mean.square().sum())
    assert merged.error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert (merged.tokens, merged.worth) == (400, pytest.approx(0.8))
    for both, x, y in zip(merged.signature.counts, one.signature.counts, other.signature.counts, strict=True):
        assert torch.equal(both, x + y)
    assert all(torch.equal(x, y) for x, y in zip(before, one.a + one.b + other.a + other.b, strict=True))
