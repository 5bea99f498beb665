"""|B^T A|^2 of low-rank factors by the kernel, against the dense product in float64."""

import re

import pytest
import torch
from test_low_rank import isa  # noqa: F401
from torch.testing._internal.two_tensor import TwoTensor

from ttt.nn.budget import low_rank_square
from ttt.ops.low_rank import cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def dense(a, b) -> float:
    return float((b.double().T @ a.double()).square().sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n", "m"), [(0, 7, 3), (1, 1, 1), (5, 7, 3), (96, 1536, 576), (17, 513, 1040)])
def test_it_is_the_square_of_the_product(isa, dtype, rows, n, m):  # noqa: F811
    a, b = torch.randn(rows, n).to(dtype), (torch.randn(rows, m) * 0.01).to(dtype)
    found = low_rank_square(a, b)
    assert (found.dtype, found.shape) == (torch.float64, ())
    assert float(found) == pytest.approx(dense(a, b), rel=1e-5)
    assert (cpu.low_rank_square(a, b) is None) == (cpu._C is None or dtype in (torch.float16, torch.float64))


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_rows_of_a_slot_and_rows_that_are_not_contiguous(isa, dtype):  # noqa: F811
    pool_a, pool_b = torch.randn(3, 20, 70).to(dtype), torch.randn(3, 20, 50).to(dtype)
    assert float(low_rank_square(pool_a[1, :11], pool_b[1, :11])) == pytest.approx(
        dense(pool_a[1, :11], pool_b[1, :11]), rel=1e-5
    )
    a, b = pool_a[2].T.contiguous().T, pool_b[2, ::2].repeat(2, 1)
    assert cpu.low_rank_square(a, b) is None
    assert float(low_rank_square(a, b)) == pytest.approx(dense(a, b), rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_products_that_cancel_and_numbers_at_the_ranges_ends(isa, dtype):  # noqa: F811
    a, b = torch.randn(4, 30).to(dtype), torch.randn(4, 30).to(dtype)
    a[2:], b[2:] = a[:2], -b[:2]
    assert 0.0 <= float(low_rank_square(a, b)) <= 1e-4 * dense(a[:2], b[:2])
    huge = torch.full((2, 40), 1e18).to(dtype)
    assert float(low_rank_square(huge, huge)) == pytest.approx(dense(huge, huge), rel=1e-5)
    a[0, 0] = torch.nan
    assert not torch.isfinite(low_rank_square(a, b))


@pytest.mark.parametrize(("one", "other"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_factors_of_two_dtypes_are_multiplied_as_numbers(one, other):
    a, b = torch.randn(5, 70).to(one), torch.randn(5, 50).to(other)
    assert cpu.low_rank_square(a, b) is None
    assert float(low_rank_square(a, b)) == pytest.approx(dense(a, b), rel=1e-5)


@pytest.mark.parametrize(
    "shapes", [((5, 7), (3, 4)), ((1, 7), (5, 4)), ((5,), (5, 4)), ((5, 7), (5,)), ((2, 5, 7), (2, 4))]
)
def test_factors_that_do_not_fit_are_refused(shapes):
    a, b = (torch.randn(shape) for shape in shapes)
    assert cpu.low_rank_square(a, b) is None
    message = f"a and b must have shapes (R, n) and (R, m), got {shapes[0]} and {shapes[1]}"
    with pytest.raises(ValueError, match=re.escape(message)):
        low_rank_square(a, b)


def test_factors_that_wrap_other_tensors_are_read_in_these():
    a, b = torch.randn(5, 7), torch.randn(5, 4)
    for pair in ((TwoTensor(a, 2 * a), b), (a, TwoTensor(b, 2 * b))):
        assert cpu.low_rank_square(*pair) is None
    found = low_rank_square(TwoTensor(a, 2 * a), TwoTensor(b, b))
    assert float(found.a) == pytest.approx(dense(a, b), rel=1e-5)
    assert float(found.b) == pytest.approx(4 * dense(a, b), rel=1e-5)
