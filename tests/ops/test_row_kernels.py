"""The C++ kernels for products of rows and for the output head: each instruction set, both dtypes, odd shapes."""

import math

import pytest
import torch
from helpers import assert_close

from ttt.ops import cpu

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "others", "n"), [(1, 1, 1), (5, 3, 33), (17, 18, 127), (64, 7, 600), (0, 3, 5), (3, 0, 5)]
)
def test_products_of_rows(isa, dtype, rows, others, n):
    x, y = torch.randn(rows, n).to(dtype), torch.randn(others, n).to(dtype)
    found = cpu.row_products(x, y)
    assert found.dtype == torch.float32
    assert_close(found, x.double() @ y.double().T, x.float() @ y.float().T, "products")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (3, 4, 127), (64, 600), (0, 5), (4, 0)])
def test_dots_of_rows(dtype, shape):
    x, y = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    found = cpu.row_dots(x, y)
    assert (found.shape, found.dtype) == (shape[:-1], torch.float32)
    assert_close(found, (x.double() * y.double()).sum(-1), (x.float() * y.float()).sum(-1), "dots")


def test_a_row_that_is_not_finite_reaches_no_other():
    x, y = torch.randn(6, 40), torch.randn(5, 40)
    right = cpu.row_products(x, y), cpu.row_dots(x[:5], y)
    x[2, 3], y[4, 7] = math.nan, math.inf
    pairs, dots = cpu.row_products(x, y), cpu.row_dots(x[:5].contiguous(), y)
    rows, columns = [0, 1, 3, 4, 5], [0, 1, 2, 3]
    assert torch.equal(pairs[rows][:, columns], right[0][rows][:, columns])
    assert not torch.isfinite(pairs[2]).any()
    assert not torch.isfinite(pairs[:, 4]).any()
    assert torch.equal(torch.isfinite(dots), torch.tensor([True, True, False, True, False]))


def exact_scores(logits, targets):
    return -logits.double().log_softmax(1)[torch.arange(len(logits)), targets]


def exact_gradient(logits, targets, weight, chosen=None):
    """(N, d) float64; ``chosen`` (N, V): the words that are not left out."""
    p = logits.double().softmax(1)
    p[torch.arange(len(p)), targets] -= 1
    return (p if chosen is None else p * chosen) @ weight.double()


def gradient_of(logits, targets, weight, mass, wanted=None, most=2**40, mean=None):
    """With a mean row of zeros, where none is given, the words that are left out have no part in it."""
    _, highest, total = cpu.head_scores(logits, targets)
    mean = torch.zeros_like(weight[0]) if mean is None else mean
    return cpu.head_gradient(logits, weight, mean, targets, wanted, highest, total, mass, most)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "words"), [(1, 1), (1, 61), (7, 33), (16, 127), (3, 9001)])
def test_scores(isa, dtype, count, words):
    logits, targets = (20 * torch.randn(count, words) + 100).to(dtype), torch.randint(0, words, (count,))
    kept = logits.clone()
    nll, highest, total = cpu.head_scores(logits, targets)
    assert torch.equal(logits, kept)
    assert torch.equal(highest, logits.float().amax(1))
    exact = exact_scores(logits, targets)
    plain = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    assert float((nll - exact).abs().max()) <= max(2 * float((plain - exact).abs().max()), 2**-18)
    each = (logits.double() - highest.double().unsqueeze(1)).exp().sum(1)
    torch.testing.assert_close(total.double(), each, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 33, 130, 576, 1100])
@pytest.mark.parametrize(("count", "words"), [(1, 1), (7, 33), (5, 3001)])
def test_gradients_of_all_words(isa, dtype, weight_dtype, width, count, words):
    logits, weight = (3 * torch.randn(count, words)).to(dtype), torch.randn(words, width).to(weight_dtype)
    targets = torch.randint(0, words, (count,))
    found, rows = gradient_of(logits, targets, weight, 1e-30)
    assert (found.dtype, rows) == (weight_dtype, count * words)
    p = logits.float().softmax(1)
    p[torch.arange(count), targets] -= 1
    assert_close(found, exact_gradient(logits, targets, weight), p.to(weight_dtype) @ weight, "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_words_that_are_left_out(isa, dtype, threads):
    """They sum to no more than the mass, and to a large part of it; the target stays; more would not fit."""
    count, words, mass = 9, 1201, 0.02
    ranks = torch.rand(count, words).argsort(1).argsort(1) + 1
    logits = (-1.5 * ranks.float().log()).to(dtype)
    targets = torch.randint(0, words, (count,))
    # Each row of this weight counts one word, so that the gradient shows what was made of it.
    weight, before = torch.eye(words), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, rows = gradient_of(logits, targets, weight, mass)
    finally:
        torch.set_num_threads(before)
    chosen = found != 0
    assert rows == int(chosen.sum())
    assert chosen[torch.arange(count), targets].all()
    p = logits.double().softmax(1)
    left = torch.where(chosen, 0.0, p)
    assert float(left.sum(1).max()) <= mass * (1 + 1e-5)
    assert float(left.sum(1).min()) >= 0.7 * mass
    kept_least = torch.where(chosen, p, 1.0).scatter(1, targets.unsqueeze(1), 1.0).amin(1)
    assert (left.amax(1) <= kept_least).all()
    torch.testing.assert_close(found.double(), exact_gradient(logits, targets, weight, chosen), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 33, 130, 576])
def test_the_mean_row_stands_for_what_is_left_out(isa, weight_dtype, width):
    count, words, mass = 7, 3001, 0.05
    logits, weight = 4 * torch.randn(count, words), torch.randn(words, width).to(weight_dtype)
    targets, mean = torch.randint(0, words, (count,)), torch.randn(width).to(weight_dtype)
    wanted = torch.rand(count) < 0.7
    chosen = gradient_of(logits, targets, torch.eye(words), mass)[0] != 0
    left = torch.where(chosen, 0.0, logits.double().softmax(1)).sum(1, keepdim=True)
    assert float(left.min()) > 0.2 * mass
    found, _ = gradient_of(logits, targets, weight, mass, wanted, mean=mean)
    exact = exact_gradient(logits, targets, weight, chosen) + left * mean.double()
    exact[~wanted] = 0
    within = 2**-7 if weight_dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), exact, rtol=within, atol=within)
    if wanted.any():  # without it, the gradient is further away
        without = gradient_of(logits, targets, weight, mass, wanted)[0].double()
        assert float((without - exact).norm()) > 0.3 * float((left * mean.double())[wanted].norm())


def test_a_token_does_not_depend_on_the_others(isa):
    logits, weight = 4 * torch.randn(6, 4001), torch.randn(4001, 70)
    targets = torch.randint(0, 4001, (6,))
    wanted = torch.tensor([True, False, True, True, False, True])
    found, rows = gradient_of(logits, targets, weight, 0.05, wanted)
    assert float(found[~wanted].abs().sum()) == 0
    alone = [gradient_of(logits[t : t + 1], targets[t : t + 1], weight, 0.05) for t in range(6) if wanted[t]]
    assert torch.equal(found[wanted], torch.cat([one for one, _ in alone]))
    assert rows == sum(count for _, count in alone)
    logits[2, 100] = math.nan
    with_nan, _ = gradient_of(logits, targets, weight, 0.05, wanted)
    assert not torch.isfinite(with_nan[2]).any()
    others = [0, 3, 5]
    assert torch.equal(with_nan[others], found[others])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_of_logits_that_are_not_finite_are_not(isa, bad):
    logits, targets = torch.randn(3, 100), torch.tensor([0, 1, 2])
    logits[1, 50] = bad
    nll, _, _ = cpu.head_scores(logits, targets)
    assert torch.equal(torch.isfinite(nll), torch.tensor([True, False, True]))


def test_nothing_is_made_where_more_rows_matter_than_are_allowed(isa):
    logits, weight, targets = torch.zeros(4, 1000), torch.randn(1000, 5), torch.arange(4)
    assert gradient_of(logits, targets, weight, 0.01, most=3000)[1] == -1
    assert gradient_of(logits, targets, weight, 0.01, most=4000)[1] == 4000


@pytest.mark.parametrize("target", [-1, 50])
def test_targets_that_are_no_words_are_refused(target):
    logits, weight, targets = torch.zeros(2, 50), torch.zeros(50, 3), torch.tensor([0, target])
    with pytest.raises(IndexError, match=rf"targets must be in \[0, 50\), got {target}"):
        cpu.head_scores(logits, targets)
    one = torch.ones(2)
    with pytest.raises(IndexError, match=rf"targets must be in \[0, 50\), got {target}"):
        cpu.head_gradient(logits, weight, weight[0], targets, None, one, one, 0.1, 100)


def test_tensors_that_do_not_fit_are_refused_by_name():
    x = torch.zeros(3, 4)
    for y in (torch.zeros(3, 5), torch.zeros(3, 4, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="y must be rows like x"):
            cpu.row_products(x, y)
        with pytest.raises(ValueError, match="y must be like x"):
            cpu.row_dots(x, y)
    logits, weight, targets, one = torch.zeros(2, 50), torch.zeros(50, 3), torch.tensor([0, 1]), torch.ones(2)
    for bad in (targets.int(), targets[:1]):
        with pytest.raises(ValueError, match=r"targets must be torch\.int64"):
            cpu.head_scores(logits, bad)
    right = {"weight": weight, "mean": weight[0], "targets": targets, "wanted": None, "highest": one, "total": one}
    wrong = {
        "weight": weight[:40], "mean": weight[0].bfloat16(), "targets": targets.int(), "wanted": torch.ones(2),
        "highest": one[:1], "total": one.double(),
    }  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"^{name} must be torch"):
            cpu.head_gradient(logits, mass=0.1, most=100, **(right | {name: value}))
