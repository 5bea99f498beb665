"""The suite ``head``: its bytes and flops, its distribution, and a check that catches a wrong gradient."""

import math

import pytest
import torch

from bench.kernels.measure import checked, measure
from bench.kernels.suites import head
from bench.kernels.suites.head import MASS, Head, exact_gradient, scale_for


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(head, "COLD", 1 << 16)


def case(tokens=5, **options):
    return Head("cpu", "float32", 6000, 12, tokens, **options)


def test_bytes_and_flops():
    one = Head("cpu", "bfloat16", 7, 3, 2)
    assert one.bytes("exact product") == 2 * 2 * (7 * 3 + 2 * 3)  # W and h, in both directions
    assert one.bytes("forward and score") == 2 * (7 * 3 + 2 * 3)
    assert one.flops("exact product") == 2 * 2 * 7 * 3 * 2
    assert one.flops("ttt") is None
    assert one.name == "7x3, T = 2"


@pytest.mark.parametrize("bits", [1.0, 3.0, 7.5])
def test_distributions_have_the_entropy_asked_for(bits):
    logits = torch.randn(4, 3000)
    p = (logits * scale_for(logits, bits)).double().softmax(1)
    assert float(torch.special.entr(p).sum(1).mean()) / math.log(2) == pytest.approx(bits, rel=1e-3)


def test_the_reference_is_the_gradient_by_autograd():
    weight, h = torch.randn(40, 6), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 39, 7])
    torch.nn.functional.cross_entropy(h @ weight.double().T, targets, reduction="sum").backward()
    torch.testing.assert_close(exact_gradient(weight, h.detach(), targets), h.grad)


@pytest.mark.parametrize("flat", [False, True])
def test_rows_give_the_share_of_rows_read_and_the_error(flat):
    rows, not_timed = measure(case(20 if flat else 5, flat=flat), 3)
    assert not_timed == []
    found = {row["contender"]: row for row in rows}
    ours, exact = found["ttt"], found["exact product"]
    assert exact["relative_error"] < 1e-5
    if flat:  # all rows matter
        assert ours["share_of_rows"] is None
        assert ours["relative_error"] == exact["relative_error"]
    else:
        assert 0 < ours["share_of_rows"] < 0.3
        assert exact["relative_error"] < ours["relative_error"] < 0.05
        assert 0 < ours["error_of_bound"] <= 1
    assert ours["ratio"] > 0
    assert ours["ratio_to_forward"] > 0


def test_wrong_gradients_are_not_timed(monkeypatch):
    right = head.input_gradient
    monkeypatch.setattr(head, "input_gradient", lambda *args: right(*args) * (1 + 2 * MASS))
    good, not_timed = checked(case())
    assert set(good) == {"forward and score"}
    assert {row["contender"] for row in not_timed if row["failed"]} == {"ttt", "exact product"}
