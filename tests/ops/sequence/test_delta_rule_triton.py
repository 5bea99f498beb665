"""The Triton kernels of the delta rule (in the interpreter, without a GPU) against the float64 recurrence."""

import pytest
import torch
from helpers import assert_close

from ttt.ops.sequence import cuda
from ttt.ops.sequence import delta_rule as formulas
from ttt.ops.triton import delta_rule as kernels
from ttt.ops.triton.common import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
# Without tensor cores' three passes the interpreter multiplies in float32: the same precision.
SHAPES = [(1, 1, 1, 16, 16), (2, 37, 2, 20, 33), (1, 48, 1, 64, 64), (1, 20, 3, 5, 7), (1, 18, 1, 60, 20)]


def truncates(dtype):
    """Whether stores drop the lower half of a number instead of rounding it, as the interpreter does for bfloat16."""
    return INTERPRETED and dtype == torch.bfloat16


def inputs(batch, tokens, heads, keys, values, dtype):
    q, k = (torch.nn.functional.normalize(torch.randn(batch, tokens, heads, keys), dim=-1) for _ in range(2))
    v, beta, g = torch.randn(batch, tokens, heads, values), *torch.rand(2, batch, tokens, heads)
    return [t.to(DEVICE) for t in (q.to(dtype), k.to(dtype), v.to(dtype), beta, -g)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gated", [True, False])
def test_chunks(dtype, shape, gated):
    q, k, v, beta, g = inputs(*shape, dtype)
    g = g if gated else None
    first = torch.randn(shape[0], shape[2], *shape[3:], device=DEVICE)
    copies = [t.clone() for t in (q, k, v, beta, first)]
    out, last = kernels.delta_rule(q, k, v, beta, g, first, None, 0.3)
    wide = [None if t is None else t.double() for t in (q, k, v, beta, g, first)]
    exact = formulas.recurrent(*wide, 0.3)
    plain = formulas.chunked(*(None if t is None else t.float() for t in (q, k, v, beta, g, first)), 0.3, 16)
    if not truncates(dtype):
        assert_close(out, exact[0], plain[0].to(dtype), "o")
    assert_close(last, exact[1], plain[1], "state")
    assert all(torch.equal(a, b) for a, b in zip((q, k, v, beta, first), copies, strict=True))


def test_packed_texts_of_which_some_are_empty():
    q, k, v, beta, g = inputs(1, 50, 2, 16, 16, torch.float32)
    bounds = torch.tensor([0, 7, 7, 8, 50], device=DEVICE)
    first = torch.randn(4, 2, 16, 16, device=DEVICE)
    out, last = kernels.delta_rule(q, k, v, beta, g, first, bounds, 1.0)
    for n in range(4):
        part = [t[:, bounds[n] : bounds[n + 1]].contiguous() for t in (q, k, v, beta, g)]
        alone, state = kernels.delta_rule(*part, first[n : n + 1], None, 1.0)
        assert torch.equal(out[:, bounds[n] : bounds[n + 1]], alone)
        assert torch.equal(last[n : n + 1], state)


def test_without_a_first_state_and_with_great_decay():
    q, k, v, beta, g = inputs(1, 40, 1, 16, 16, torch.float32)
    g[:, ::7] = -200.0
    g[:, 20] = -torch.inf
    out, last = kernels.delta_rule(q, k, v, beta, g, None, None, 1.0)
    wide = [t.double() for t in (q, k, v, beta, g)]
    exact = formulas.recurrent(*wide, torch.zeros(1, 1, 16, 16, dtype=torch.float64, device=DEVICE), 1.0)
    torch.testing.assert_close(out.double(), exact[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(last.double(), exact[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gated", [True, False])
def test_one_token(dtype, shape, gated):
    q, k, v, beta, g = (t[:, 0].contiguous() for t in inputs(*shape, dtype))
    g = g if gated else None
    state = torch.randn(shape[0], shape[2], *shape[3:], device=DEVICE)
    exact_state, plain_state = state.double(), state.clone()
    out = kernels.delta_rule_step(q, k, v, beta, g, state, 0.3)
    exact = formulas.step_(*(None if t is None else t.double() for t in (q, k, v, beta, g)), exact_state, 0.3)
    plain = formulas.step_(*(None if t is None else t.float() for t in (q, k, v, beta, g)), plain_state, 0.3)
    if not truncates(dtype):
        assert_close(out, exact, plain.to(dtype), "o")
    assert_close(state, exact_state, plain_state, "state")


def test_which_calls_the_kernels_take():
    """Texts of heads of 16, 32, 48 and 64; tokens of any width up to 256."""

    def why(keys, values, dtype=torch.float32, text=True):
        shape = (1, 5, 2) if text else (1, 2)
        return cuda.why_not(torch.zeros(*shape, keys, dtype=dtype), torch.zeros(*shape, values, dtype=dtype))

    assert not any(why(width, width) for width in (16, 32, 48, 64))
    assert not why(20, 7, text=False)
    assert not why(64, 128)
    assert why(128, 128) == "no Triton kernel for keys wider than 64, got 128"
    assert why(257, 1, text=False) == "no Triton kernel for keys wider than 256, got 257"
    assert why(20, 16) == "no Triton kernel for widths that are no multiples of 16, got 20 and 16"
    assert why(16, 16, torch.float64) == "no Triton kernel for torch.float64"
