"""The Gaussian of a layer's inputs against moments and principal components of all rows at once, and its draws."""

import math

import pytest
import torch

from ttt.nn.gaussian import Gaussian
from ttt.ops.philox import DISTIL, NORMAL, normals, philox, spread_tokens

D = torch.float64


def empty(n, rank, dtype=D):
    return Gaussian(torch.zeros(n, dtype=dtype), torch.zeros(rank, n, dtype=dtype), torch.zeros(2, dtype=D))


def inputs(count, n):
    return torch.randn(count, n, dtype=D) @ torch.randn(n, n, dtype=D) * torch.linspace(2, 0.1, n) + torch.randn(n)


def scatter(x):
    centred = x - x.mean(0)
    return centred.T @ centred


@pytest.mark.parametrize(
    ("n", "rank", "splits"), [(1, 1, [3]), (9, 4, [1, 5, 0, 30]), (33, 7, [300, 2]), (5, 12, [40])]
)
def test_count_mean_and_trace_are_exact_however_the_rows_come(n, rank, splits):
    x = inputs(sum(splits), n)
    held = empty(n, rank)
    for part in x.split(splits):
        held = held.with_rows(part)
    assert float(held.moments[0]) == len(x)
    torch.testing.assert_close(held.mean, x.mean(0))
    torch.testing.assert_close(held.factor.square().sum() + held.moments[1], scatter(x).trace())
    assert held.factor.shape == (rank, n)
    gram = held.factor @ held.factor.T
    torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=1e-9, atol=1e-9 * float(scatter(x).trace()))
    if rank >= n:  # nothing is lost
        torch.testing.assert_close(held.factor.T @ held.factor, scatter(x))
        assert float(held.moments[1]) < 1e-9 * float(scatter(x).trace())


def test_rows_taken_at_once_give_their_principal_components():
    x = inputs(200, 21)
    held = empty(21, 5).with_rows(x)
    values, vectors = torch.linalg.eigh(scatter(x))
    expected = (vectors[:, -5:] * values[-5:]) @ vectors[:, -5:].T
    torch.testing.assert_close(held.factor.T @ held.factor, expected)
    torch.testing.assert_close(held.factor.square().sum(1), values[-5:].flip(0))


def test_joining_two_gaussians_gives_that_of_all_rows():
    """The rows have rank 6 in 30 dimensions, so a factor of 6 directions loses nothing."""
    x = torch.randn(90, 6, dtype=D) @ torch.randn(6, 30, dtype=D) + torch.randn(30, dtype=D)
    a, b = empty(30, 6).with_rows(x[:70]), empty(30, 6).with_rows(x[70:])
    joined = a.joined(b)
    for held in (joined, empty(30, 6).with_rows(x), b.joined(a), empty(30, 6).joined(joined)):
        assert float(held.moments[0]) == 90
        torch.testing.assert_close(held.mean, x.mean(0))
        torch.testing.assert_close(held.factor.T @ held.factor, scatter(x), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(joined.joined(empty(30, 6)).factor.abs(), joined.factor.abs(), rtol=1e-7, atol=1e-7)


def test_incremental_components_are_close_to_those_of_all_rows():
    x = torch.randn(2000, 40, dtype=D) * 0.3
    x[:, :4] *= torch.tensor([40.0, 30.0, 20.0, 15.0])
    held = empty(40, 6)
    for part in x.split(16):
        held = held.with_rows(part)
    values = torch.linalg.eigvalsh(scatter(x)).flip(0)
    torch.testing.assert_close(held.factor.square().sum(1)[:4], values[:4], rtol=1e-3, atol=0)


def test_draws_have_the_mean_and_the_covariance_of_probabilistic_pca():
    n, rank, count = 6, 2, 40000
    x = inputs(250, n)
    held = empty(n, rank).with_rows(x)
    drawn = held.draw(count, torch.tensor([4]), 17)
    values, vectors = torch.linalg.eigh(scatter(x) / len(x))
    values[:-rank] = values[:-rank].mean()
    covariance = (vectors * values) @ vectors.T
    scale = covariance.diagonal().sqrt()
    error = (drawn.mean(0) - x.mean(0)) / scale
    assert float(error.abs().max()) < 5 / math.sqrt(count)
    error = (torch.cov(drawn.T, correction=0) - covariance) / torch.outer(scale, scale)
    assert float(error.abs().max()) < 5 * math.sqrt(2 / count)


def test_draws_are_fixed_by_state_seed_and_step_and_zero_while_empty():
    held = empty(9, 3, torch.float32).with_rows(inputs(20, 9))
    one = held.draw(5, torch.tensor([4]), 17)
    assert torch.equal(one, held.draw(5, torch.tensor([4]), 17))
    assert torch.equal(one[:2], held.draw(2, torch.tensor([4]), 17))
    for other in (held.draw(5, torch.tensor([5]), 17), held.draw(5, torch.tensor([4]), 18)):
        assert not torch.isclose(one, other).any()
    assert torch.equal(empty(9, 3).draw(5, torch.tensor([4]), 17), torch.zeros(5, 9, dtype=D))


def test_normals_follow_from_philox_words_by_box_muller():
    z = normals(3, 7, torch.tensor([2**33 + 5]), 99)
    assert (z.shape, z.dtype) == ((3, 7), D)
    for r in range(3):
        for j in range(7):
            words = [int(w) for w in philox(torch.tensor(j // 4), r, (2**33 + 5) % 2**32, NORMAL, 99)]
            first, second = words[j % 4 // 2 * 2 :][:2]
            radius = math.sqrt(-2 * math.log((first + 0.5) / 2**32))
            angle = 2 * math.pi * (second + 0.5) / 2**32
            expected = radius * (math.sin(angle) if j % 2 else math.cos(angle))
            assert float(z[r, j]) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    z = normals(50, 1001, torch.tensor([1]), 3).flatten()
    quantiles = torch.special.ndtr(z.sort().values)
    at = (torch.arange(len(z), dtype=D) + 0.5) / len(z)
    assert float((quantiles - at).abs().max()) < 1.95 / math.sqrt(len(z))  # Kolmogorov and Smirnov, p = .001


@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (1, 5), (7, 3), (64, 64), (3, 8), (1000, 64)])
def test_spread_tokens_draws_one_token_from_each_equal_part(tokens, rows):
    step, count = torch.tensor([0]), torch.zeros(tokens, dtype=D)
    for at in range(300):
        token = spread_tokens(tokens, rows, step.fill_(at), 11)
        words = [int(philox(torch.tensor(r // 4), 0, at, DISTIL, 11)[r % 4]) for r in range(rows)] if at == 7 else []
        for r, word in enumerate(words):
            assert int(token[r]) == (r + word / 2**32) * tokens // rows
        count += torch.bincount(token, minlength=tokens)
    assert float(count.sum()) == 300 * rows
    expected = 300 * rows / tokens
    assert float((count - expected).abs().max()) <= 5.5 * math.sqrt(expected) + 1e-9
