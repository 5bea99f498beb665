"""The commit, element by element: the float64 formula, rounded with the random bits that the kernels draw.

Norms over a whole matrix hide errors of a percent in bfloat16. Here every element must be the exact value, rounded with
its own bits. An error of a float32 sum can change which way an element is rounded, by one unit in the last place: that
is allowed for few elements.
"""

import pytest
import torch
from helpers import ORDER
from test_replay_rows import commit  # noqa: F401  (the fixture: one backend)

from ttt.ops import reference
from ttt.ops.arguments import CommitArguments
from ttt.ops.rounding import rounding_bits, stochastic_round_

SHAPES = [(1, 1, 1, 1), (7, 33, 5, 3), (35, 127, 17, 4), (66, 70, 40, 5)]
OPTIONS = {"seed": 2**62 + 5, "beta": 0.7, "eps": 0.1, "lam": 0.8, "gamma": 0.875, "trace_every": 1, "gate": None}


def case_of(m, n, tokens, dtype):
    """Updates are as large as the weights: an error of a percent is several units in the last place of bfloat16."""
    weight = torch.randn(m, n)
    return {
        "weight": weight.to(dtype),
        "anchor": (weight + 0.3 * torch.randn(m, n)).to(dtype),
        "importance": 3 * torch.rand(m, n),
        "trace": torch.randn(m, n),
        "x": torch.randn(tokens, n).to(dtype),
        "delta": torch.randn(tokens, m).to(dtype),
        "eta": (0.5 + torch.rand(tokens)) / tokens**0.5,
        "trace_delta": torch.randn(tokens, m).to(dtype),
        "memory": torch.randn(10, n).to(dtype),
        "seen": torch.tensor([25]),
        "step": torch.tensor([5]),
    }


def exact_weight(case, options, rounds_eta_delta=False):
    """W after the commit, in float64 and not rounded.

    Args:
        rounds_eta_delta: the kernel rounds the left factor eta D of G to bfloat16.
    """
    wide = {k: t.double() if t.is_floating_point() else t.clone() for k, t in case.items()}
    reference.commit(*CommitArguments(**wide, **options))
    if rounds_eta_delta:
        left = case["delta"].float() * case["eta"].unsqueeze(1)
        change = (left.bfloat16().double() - left.double()).T @ case["x"].double()
        pull = options["lam"] * case["eta"].double().sum() * case["importance"].double()
        return wide["weight"] - change / (1 + pull)
    return wide["weight"]


def units(value, dtype):
    """The distance between neighbouring numbers of ``dtype`` at ``value``."""
    digits = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}[dtype]
    least = torch.finfo(dtype).tiny
    return torch.exp2(torch.floor(torch.log2(value.abs().clamp_min(least))) - digits)


@pytest.mark.parametrize("kind", ["fisher", "mas", "si"])
@pytest.mark.parametrize(("m", "n", "tokens", "rows"), SHAPES)
def test_every_16_bit_weight_is_the_exact_one_rounded_by_its_bits(commit, kind, m, n, tokens, rows):  # noqa: F811
    dtype = commit.half
    case, options = case_of(m, n, tokens, dtype), {**OPTIONS, "kind": kind, "replay_rows": rows}
    ours, exact = commit(case, options)["weight"], exact_weight(case, options, commit.rounds_eta_delta)
    want = torch.empty(m, n, dtype=dtype)
    stochastic_round_(want, exact.float(), rounding_bits(m, n, case["step"], options["seed"]))
    apart = (ours.double() - want.double()).abs()
    # If terms of a sum cancel, its error in float32 can be several units in the last place of the small result.
    size = case["weight"].double().abs() + (case["delta"].double().abs().T * case["eta"]) @ case["x"].double().abs()
    assert bool((apart <= units(want.double(), dtype) * 1.001 + 2**-15 * size).all())
    flips = int((apart > 0).sum())
    assert flips <= 2 + 0.03 * m * n, f"{flips} of {m * n} elements differ"


@pytest.mark.parametrize("kind", ["fisher", "si"])
@pytest.mark.parametrize(("m", "n", "tokens", "rows"), SHAPES)
def test_every_float32_weight_is_the_exact_one(commit, kind, m, n, tokens, rows):  # noqa: F811
    case, options = case_of(m, n, tokens, torch.float32), {**OPTIONS, "kind": kind, "replay_rows": rows}
    ours, exact = commit(case, options)["weight"].double(), exact_weight(case, options)
    size = case["weight"].double().abs() + (case["delta"].double().abs().T * case["eta"]) @ case["x"].double().abs()
    size = size + (case["weight"] - case["anchor"]).double().abs() @ torch.ones(n, n, dtype=torch.float64) / n**0.5
    assert float(((ours - exact).abs() / size).max()) < 2**-18


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("m", "n", "tokens", "rows"), SHAPES)
def test_the_trace_of_si_uses_the_weight_as_it_was_rounded(commit, half, m, n, tokens, rows):  # noqa: F811
    """Updates are below one unit in the last place, so that rounded and exact movements of a weight differ much."""
    dtype = commit.half if half else torch.float32
    case, options = (
        case_of(m, n, tokens, dtype),
        {**OPTIONS, "kind": "si", "replay_rows": rows, "lam": 0.0, "beta": 0.0},
    )
    case["eta"] *= 2**-11
    after = commit(case, options)
    moved = after["weight"].double() - case["weight"].double()
    products = case["trace_delta"].double().T @ case["x"].double()
    keep = options["gamma"] ** tokens
    want = keep * case["trace"].double() - products * moved
    size = (keep * case["trace"].double()).abs() + (
        case["trace_delta"].double().abs().T @ case["x"].double().abs()
    ) * moved.abs()
    assert bool(((after["trace"].double() - want).abs() <= 2**-20 * size + 1e-12).all())
    if half:
        assert 0 < int((moved != 0).sum()) < m * n or m * n == 1


def test_arguments_have_the_order_of_the_schema():
    names = [argument.name for argument in torch.ops.ttt.commit.default._schema.arguments]
    assert names == list(CommitArguments._fields)
    assert [name for name in names if name in ORDER] == list(ORDER)
    defaults = {
        a.name: a.default_value for a in torch.ops.ttt.commit.default._schema.arguments if a.has_default_value()
    }
    assert defaults.items() <= CommitArguments._field_defaults.items()
