import math

import pytest
import torch

from ttt.ops.philox import philox
from ttt.ops.rounding import momentum_rounding_bits, rounding_bits, stochastic_round_, trace_rounding_bits


def plain_mix(x, key):
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15 ^ key) * 0x846CA68B % 2**32
    return x ^ x >> 16


def test_bits_follow_the_documented_hash():
    step, seed = torch.tensor([7]), 99
    s = [int(word) for word in philox(torch.tensor([0]), 0, 7, 2, seed)]
    ours = [draw(5, 13, step, seed) for draw in (rounding_bits, trace_rounding_bits, momentum_rounding_bits)]
    for i in range(5):
        row = i * 0x9E3779B9
        k, l = plain_mix((s[0] + row) % 2**32, s[1]), plain_mix((s[2] + row) % 2**32, s[3])
        words = [plain_mix((k + c * 0x9E3779B9) % 2**32, l) for c in range(8)]
        bits = [half for word in words for half in (word & 0xFFFF, word >> 16)]
        for drawn, other in zip(ours, (0, 1, 2), strict=True):
            assert drawn[i].tolist() == [bits[j ^ other] for j in range(13)]


def deviation(counts):
    """The deviation of a chi-square statistic of equally likely counts, in standard deviations."""
    expected = counts.sum() / len(counts)
    freedom = len(counts) - 1
    return float(((counts - expected).square() / expected).sum() - freedom) / math.sqrt(2 * freedom)


def counted(values, bins):
    return torch.bincount(values.flatten(), minlength=bins).double()


@pytest.mark.parametrize("seed", [0, 2**40 + 3])
def test_bits_are_even_and_independent_of_their_neighbours(seed):
    """Half a million elements: bits within a row, of rows, of steps, and of an element's weight, trace and momentum."""
    rows, cols = 512, 1024
    drawn = [rounding_bits(rows, cols, torch.tensor([step]), seed) for step in (3, 4)]
    bits = drawn[0]
    pairs = {f"column {d}": (bits[:, :-d], bits[:, d:]) for d in (1, 2, 3, 8, 64)}
    pairs |= {f"row {d}": (bits[:-d], bits[d:]) for d in (1, 2, 3, 8, 64)}
    pairs["step"] = tuple(drawn)
    pairs["trace"] = bits, trace_rounding_bits(rows, cols, torch.tensor([3]), seed)
    pairs["momentum"] = bits, momentum_rounding_bits(rows, cols, torch.tensor([3]), seed)
    off = {"high": deviation(counted(bits >> 8, 256)), "low": deviation(counted(bits & 255, 256))}
    for name, (one, other) in pairs.items():
        off[name] = deviation(counted((one >> 12) * 16 + (other >> 12), 256))
        off[f"{name}, low"] = deviation(counted((one & 15) * 16 + (other & 15), 256))
    # 28 statistics of fixed seeds; one of them beyond 4.5 has a chance of 1 in 5000.
    assert {name: value for name, value in off.items() if abs(value) > 4.5} == {}


def test_small_steps_survive_bf16_only_with_stochastic_rounding():
    nearest = torch.ones(64, 64, dtype=torch.bfloat16)
    stochastic = nearest.clone()
    for step in range(100):
        nearest -= 1e-4
        stochastic_round_(stochastic, stochastic.float() - 1e-4, rounding_bits(64, 64, torch.tensor([step]), 1))
    assert bool((nearest == 1).all())
    # One step is +-2^-8 at most, 4096 independent walks: the mean's standard error is below 1e-4.
    assert abs(float(stochastic.float().mean()) - 0.990) < 4e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_between_neighbours_and_keeps_the_non_finite(dtype):
    value = torch.randn(31, 33) * 3
    target = torch.empty(31, 33, dtype=dtype)
    stochastic_round_(target, value, rounding_bits(31, 33, torch.tensor([0]), 5))
    down = (value.double() - target.double()).abs()
    spacing = torch.finfo(dtype).eps * value.abs().double()
    assert bool((down <= spacing).all())
    exact = torch.tensor([[1.5, -0.25, float("inf"), float("-inf")]])
    target = torch.empty(1, 4, dtype=dtype)
    stochastic_round_(target, exact, torch.full((1, 4), 0xFFFFFFFF))
    assert torch.equal(target.float(), exact)
    stochastic_round_(target, torch.full((1, 4), float("nan")), torch.full((1, 4), 0xFFFFFFFF))
    assert bool(target.isnan().all())
