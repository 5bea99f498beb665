"""Draws of tokens against the distribution, by chi-square, and against a search by hand."""

import math

import pytest
import torch

from ttt.learn.draw import draw_tokens


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_words_are_drawn_as_often_as_their_share(dtype, scale):
    count = 20_000
    p = (scale * torch.rand(13, generator=seeded(1), dtype=torch.float64).pow(3)).to(dtype)
    p[[0, 4, 5, 12]] = 0
    drawn = draw_tokens(p.expand(count, -1), seeded(2))
    assert (drawn.shape, drawn.dtype) == ((count,), torch.int64)
    found = torch.bincount(drawn, minlength=13).double()
    assert not found[p == 0].any()
    expected = count * p.double() / p.double().sum()
    chi = float(((found - expected).square() / expected)[p > 0].sum())
    assert chi < 27.9  # of 8 degrees of freedom: p = 0.0005


def test_each_row_is_searched_at_its_own_number():
    p = torch.rand(150, 1001, dtype=torch.float64, generator=seeded(3)) * 10
    numbers = torch.rand((150, 1), dtype=torch.float64, generator=seeded(4))
    found = draw_tokens(p, seeded(4))
    for row, number, index in zip(p.tolist(), numbers[:, 0].tolist(), found.tolist(), strict=True):
        total = math.fsum(row)
        below, through = math.fsum(row[:index]) / total, math.fsum(row[: index + 1]) / total
        assert below - 1e-12 <= number <= through + 1e-12
    assert torch.equal(draw_tokens(p, seeded(4)), found)
    assert torch.equal(draw_tokens(p[:70], seeded(4)), found[:70])
    assert not torch.equal(draw_tokens(p, seeded(5)), found)


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("p", [[0.0, 0.0, 0.3, 0.0, 0.6, 0.0], [1e-30, 0.0], [0.0, 5e-324], [0.1] * 7 + [0.0]])
def test_the_first_and_last_numbers_find_words_that_are_possible(p, number, monkeypatch):
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: rand(*args, **kwargs).fill_(number))
    p = torch.tensor([p], dtype=torch.float64)
    possible = p[0].nonzero()[:, 0]
    assert int(draw_tokens(p)) == int(possible[-1] if number else possible[0])


def test_the_default_generator_is_used_and_no_rows_are_no_draws():
    p = torch.rand(40, 99)
    torch.manual_seed(6)
    found = draw_tokens(p)
    torch.manual_seed(6)
    assert torch.equal(draw_tokens(p), found)
    assert not torch.equal(draw_tokens(p), found)
    assert draw_tokens(p[:0]).shape == (0,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_what_is_no_distribution_is_refused(bad):
    p = torch.rand(70, 5)
    p[66] = 0 if bad is None else p[66]
    if bad is not None:
        p[66, 2] = bad
    with pytest.raises(FloatingPointError, match=r"a finite sum above 0, got \["):
        draw_tokens(p)
