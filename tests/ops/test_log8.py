"""The 8-bit format against its definition, element by element in Python."""

import math

import pytest
import torch

from ttt.ops import log8


def definition(row, n):
    """The values of one packed row by the formula of the module's docstring."""
    codes, exponents = row[:n].tolist(), row[n:].tolist()
    return [
        2.0 ** (exponents[j // 32] - 127) * 2.0 ** (q // 16 - 16) * (1 + q % 16 / 16)
        if q and exponents[j // 32]
        else 0.0
        for j, q in enumerate(codes)
    ]


@pytest.mark.parametrize("n", [1, 31, 32, 33, 100])
def test_decode_is_the_formula(n):
    packed = torch.randint(0, 256, (5, log8.width(n)), dtype=torch.uint8)
    packed[:, n:] = torch.randint(0, 254, (5, log8.width(n) - n), dtype=torch.uint8)
    packed[0, n:] = 0
    expected = torch.tensor([definition(row, n) for row in packed], dtype=torch.float64)
    assert torch.equal(log8.decode(packed, n).double(), expected)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 3e7, 1e35])
def test_nearest_is_within_half_a_gap(scale):
    v = torch.rand(7, 70).pow(8) * scale
    v[3] = 0
    got = log8.decode(log8.encode(v), 70)
    top = torch.nn.functional.pad(v, (0, 26)).view(7, 3, 32).amax(2).repeat_interleave(32, 1)[:, :70]
    # Half of the widest gap, 1/16 of a value; below the range half of the smallest code.
    bound = torch.maximum(v / 32, top * 2.0**-16 * 1.1) * (1 + 2**-10)
    assert bool(((got - v).abs() <= bound).all())
    assert torch.equal(got[3], torch.zeros(70))
    again = log8.encode(got)
    assert torch.equal(log8.decode(again, 70), got)


def test_every_code_survives():
    n = 32
    codes = torch.arange(256, dtype=torch.uint8).view(8, 32)
    codes[:, 31] = 255  # the maximum that fixes the exponent
    packed = torch.cat((codes, torch.full((8, 1), 130, dtype=torch.uint8)), 1)
    for bits in (None, torch.zeros(8, n, dtype=torch.int64), torch.full((8, n), 0xFFFF)):
        again = log8.encode(log8.decode(packed, n), bits)
        assert torch.equal(again, packed)


def test_stochastic_rounding_is_unbiased():
    """Over all 65536 values of the random bits the mean is the value, to the resolution of the bits."""
    values = torch.cat((torch.rand(30) * 0.9, torch.tensor([2.0**-16 * 0.3, 0.9])))
    bits = torch.arange(65536).view(-1, 1).expand(-1, 32)
    got = log8.decode(log8.encode(values.expand(65536, 32), bits), 32).double().mean(0)
    gap = torch.maximum(values / 16, torch.full_like(values, 2.0**-16)).double()
    assert bool(((got - values.double()).abs() <= gap * 2.0**-15).all())


def test_extremes():
    v = torch.zeros(4, 3)
    v[0, 0], v[1, 0], v[2, 0] = 3.0e38, 1e-45, 2.0**-126
    packed = log8.encode(v)
    assert int(packed[0, 3]) == log8.MAX_EXPONENT
    got = log8.decode(packed, 3)
    assert bool(torch.isfinite(got).all())
    assert math.isclose(float(got[2, 0]), 2.0**-126, rel_tol=1 / 16)
    assert log8.encode(torch.zeros(2, 0)).shape == (2, 0)
    assert torch.equal(log8.decode(log8.zeros(2, 40), 40), torch.zeros(2, 40))
