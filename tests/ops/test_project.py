"""Inputs without their part in some directions: the C++ and the Triton kernels, the op and the reference."""

import pytest
import torch
from helpers import assert_close

import ttt
from ttt import _C
from ttt.ops import backends, reference
from ttt.ops.triton.common import INTERPRETED
from ttt.ops.triton.project import project_out as by_triton
from ttt.ops.triton.project import project_out_pair as by_triton_pair

DEVICE = "cpu" if INTERPRETED else "cuda"
SHAPES = [(1, 1, 1), (1, 7, 3), (5, 33, 7), (17, 127, 16), (1, 1000, 17), (35, 1, 1), (9, 600, 33), (3, 1025, 5)]


@pytest.fixture(autouse=True)
def scratch_is_nan():
    """Fill uninitialised memory with NaN, to detect reads before writes."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def case_of(tokens, n, k, dtype, device="cpu"):
    """Inputs, and k rows that are orthonormal up to the rounding of ``dtype``; one row is zero."""
    x = torch.randn(tokens, n, device=device, dtype=torch.float64)
    basis = torch.zeros(k, n, device=device, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(n, min(k, n), device=device, dtype=torch.float64)).Q.T
    basis[: len(q)] = q
    basis[k // 2] = 0
    return x.to(dtype), basis.to(dtype)


def plain(x, basis):
    """The formula in plain torch at this dtype."""
    return x - (x @ basis.T) @ basis


def brute_force(x, basis):
    """The formula in float64, one direction and one token at a time."""
    out = x.double().clone()
    for row, token in zip(out, x.double(), strict=True):
        for u in basis.double():
            row -= (token * u).sum() * u
    return out


@pytest.mark.parametrize("isa", _C.available_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "n", "k"), SHAPES)
def test_cpu_kernels(isa, dtype, tokens, n, k):
    x, basis = case_of(tokens, n, k, dtype)
    before, kept = _C.active_isa(), (x.clone(), basis.clone())
    _C.set_isa(isa)
    try:
        y = ttt.ops.project_out(x, basis)
    finally:
        _C.set_isa(before)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert_close(y, brute_force(x, basis), plain(x, basis), "x'")
    assert torch.equal(x, kept[0])
    assert torch.equal(basis, kept[1])


# The interpreter rounds float32 to bfloat16 wrongly.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16]))
@pytest.mark.parametrize(("tokens", "n", "k"), SHAPES)
def test_triton_kernel(dtype, tokens, n, k):
    x, basis = case_of(tokens, n, k, dtype, DEVICE)
    kept = x.clone(), basis.clone()
    y = by_triton(x, basis)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert_close(y, brute_force(x, basis), plain(x, basis), "x'")
    assert torch.equal(x, kept[0])
    assert torch.equal(basis, kept[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_go_to_the_reference(dtype):
    x, basis = case_of(5, 33, 7, dtype)
    backends.calls.clear()
    y = ttt.ops.project_out(x, basis)
    assert backends.calls["project_out", "reference", f"no C++ kernel for {dtype}"] == 1
    assert_close(y, brute_force(x, basis), plain(x, basis), "x'")


@pytest.mark.parametrize("project", [ttt.ops.project_out, reference.project_out, by_triton])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (0, 7), (2, 0, 7), (3, 0)])
def test_leading_shapes_and_nothing_to_take_out(project, shape):
    device = DEVICE if project is by_triton else "cpu"
    x, basis = torch.randn(shape, device=device), case_of(1, shape[-1] or 1, 3, torch.float32, device)[1]
    basis = basis[:, : shape[-1]].contiguous()
    y = project(x, basis)
    assert y.shape == shape
    exactly, rounded = (t - (t @ u.T) @ u for t, u in ((x.double(), basis.double()), (x, basis)))
    assert_close(y, exactly, rounded, "y")
    for none in (torch.zeros_like(basis), basis[:0]):
        assert torch.equal(project(x, none), x)


def test_what_is_left_is_orthogonal_and_stays():
    x, basis = case_of(20, 300, 11, torch.float32)
    y = ttt.ops.project_out(x, basis)
    assert float((y @ basis.T).norm() / x.norm()) < 1e-6
    assert float((ttt.ops.project_out(y, basis) - y).norm() / y.norm()) < 1e-6
    inside = torch.randn(4, 11) @ basis
    assert float(ttt.ops.project_out(inside, basis).norm() / inside.norm()) < 1e-6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [({"x": torch.zeros(2, 6)}, ValueError, r"x must have shape \(..., 5\), got \(2, 6\)"),
     ({"x": torch.zeros(())}, ValueError, "x must have shape"),
     ({"x": torch.zeros(2, 5).double()}, TypeError, r"basis must be torch\.float64, got torch\.float32"),
     ({"x": torch.zeros(2, 5).int()}, TypeError, "x must be torch.float32"),
     ({"x": torch.zeros(5, 2).T}, ValueError, "x must be contiguous"),
     ({"x": torch.zeros(2, 5, requires_grad=True)}, RuntimeError, "x requires grad"),
     ({"basis": torch.zeros(5)}, ValueError, r"basis must have shape \(k, n\), got \(5,\)"),
     ({"basis": torch.zeros(5, 3).T}, ValueError, "basis must be contiguous")],
)  # fmt: skip
def test_refusals_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        ttt.ops.project_out(**({"x": torch.zeros(2, 5), "basis": torch.zeros(3, 5)} | change))


def test_opcheck():
    for dtype in (torch.float32, torch.float64):
        torch.library.opcheck(torch.ops.ttt.project_out.default, case_of(5, 33, 7, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "n", "k", "m", "l"),
    [
        (1, 7, 3, 600, 17),
        (5, 33, 7, 1, 1),
        (17, 1025, 16, 127, 33),
        (3, 40, 0, 50, 2),
        (0, 4, 2, 5, 3),
        (3, 0, 1, 5, 2),
    ],
)
def test_a_pair_has_the_bits_of_each(dtype, tokens, n, k, m, l):
    (x, u), (d, v) = (case_of(tokens, *size, dtype, DEVICE) for size in ((n, max(k, 1)), (m, l)))
    u = u[:k]
    y, z = by_triton_pair(x, u, d, v)
    assert torch.equal(y, by_triton(x, u))
    assert torch.equal(z, by_triton(d, v))
    expected = [ttt.ops.project_out(*each) for each in ((x, u), (d, v))]
    assert all(torch.equal(*each) for each in zip(torch.ops.ttt.project_out_pair(x, u, d, v), expected, strict=True))


def test_a_pair_that_does_not_fit_is_refused():
    (x, u), (d, v) = case_of(3, 8, 2, torch.float32, DEVICE), case_of(4, 5, 2, torch.float32, DEVICE)
    with pytest.raises(ValueError, match=r"d must have as many rows as x, \(3,\), got \(4,\)"):
        torch.ops.ttt.project_out_pair(x, u, d, v)
    with pytest.raises(TypeError, match=r"basis must be torch\.float32"):
        torch.ops.ttt.project_out_pair(x, u, d[:3], v.double())
