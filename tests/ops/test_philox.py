import pytest
import torch

from ttt.ops.philox import philox, rounding_bits, stochastic_round_

# Known answers of the Random123 library (kat_vectors, philox4x32).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    words = philox(torch.tensor([counter[0]]), counter[1], counter[2], counter[3], key[0] | key[1] << 32)
    assert " ".join(f"{int(w):08x}" for w in words) == answer


def test_known_answer_of_seven_rounds():
    words = philox(torch.tensor([0]), 0, 0, 0, 0, rounds=7)
    assert " ".join(f"{int(w):08x}" for w in words) == "5f6fb709 0d893f64 4f121f81 4f730a48"


def test_rounding_bits_follow_the_documented_counters():
    step, seed = torch.tensor([7]), 99
    bits = rounding_bits(5, 13, step, seed)
    assert bits.shape == (5, 13)
    for i, j in [(0, 0), (4, 12), (2, 7)]:
        word = int(philox(torch.tensor([j // 8]), i, 7, 2, seed, rounds=7)[j % 8 // 2])
        assert int(bits[i, j]) == (word >> 16 if j % 2 else word & 0xFFFF)


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
