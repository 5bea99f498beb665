"""The C++ kernels of the delta rule, for each instruction set, against float64; and which calls they serve."""

import pytest
import torch
from helpers import assert_close
from sequence_cases import doubled

from ttt.ops import cpu
from ttt.ops import sequence as ops
from ttt.ops.backends import calls
from ttt.ops.sequence import delta_rule

pytestmark = pytest.mark.skipif(cpu._C is None, reason="the C++ kernels are not built")
SHAPES = [(1, 1, 4, 3, 5), (2, 33, 3, 5, 7), (1, 70, 2, 64, 64), (2, 32, 1, 19, 130), (1, 100, 1, 40, 24)]


def inputs(batch, tokens, heads, keys, values, dtype):
    q, k = (torch.nn.functional.normalize(torch.randn(batch, tokens, heads, keys), dim=-1) for _ in range(2))
    v = torch.randn(batch, tokens, heads, values)
    return q.to(dtype), k.to(dtype), v.to(dtype), torch.rand(batch, tokens, heads), -torch.rand(batch, tokens, heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gated", [True, False])
def test_the_delta_rule(isa, dtype, shape, gated):
    tensors = inputs(*shape, dtype)[: 5 if gated else 4]
    first = torch.randn(shape[0], shape[2], *shape[3:])
    copies = [t.clone() for t in (*tensors, first)]
    before = calls["gated_delta_rule", "cpu", ""]
    out, state = ops.gated_delta_rule(*tensors, initial_state=first, output_final_state=True)
    assert calls["gated_delta_rule", "cpu", ""] == before + 1
    exact = ops.gated_delta_rule(
        *doubled(tensors), initial_state=first.double(), output_final_state=True, form="reference"
    )
    plain = ops.gated_delta_rule(*tensors, initial_state=first, output_final_state=True, form="chunk", chunk_size=32)
    assert_close(out, exact[0], plain[0], "o")
    assert_close(state, exact[1], plain[1], "state")
    for t, copy in zip((*tensors, first), copies, strict=True):
        assert torch.equal(t, copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gated", [True, False])
def test_a_step_of_the_delta_rule(isa, dtype, shape, gated):
    tensors = [t[:, 0] for t in inputs(*shape, dtype)[: 5 if gated else 4]]
    state = torch.randn(shape[0], shape[2], *shape[3:])
    exact_state, plain_state = state.double(), state.clone()
    version = state._version
    out = ops.gated_delta_rule_step(*tensors, state=state)
    assert state._version > version
    exact = ops.gated_delta_rule_step(*doubled(tensors), state=exact_state)
    wide = [t.float() for t in tensors] + ([] if gated else [None])
    plain = delta_rule.step_(*wide, plain_state, shape[3] ** -0.5).to(dtype)
    assert_close(out, exact, plain, "o")
    assert_close(state, exact_state, plain_state, "state")


def test_packed_texts(isa):
    bounds = torch.tensor([0, 5, 5, 6, 40])
    q, k, v, beta, g = inputs(1, 40, 2, 9, 9, torch.float32)
    options = {"cu_seqlens": bounds, "output_final_state": True}
    found = ops.gated_delta_rule(q, k, v, beta, g, **options)
    expected = ops.gated_delta_rule(q, k, v, beta, g, form="chunk", **options)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_strided_inputs_and_values_that_are_not_finite_stay_in_their_head(isa):
    q, k, v, beta, g = inputs(2, 40, 3, 9, 9, torch.float32)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert not strided[0].is_contiguous()
    expected = ops.gated_delta_rule(q, k, v, beta, g)[0]
    assert torch.equal(ops.gated_delta_rule(*strided, beta, g)[0], expected)
    v[0, 35, 1] = torch.nan
    spoilt = ops.gated_delta_rule(q, k, v, beta, g)[0]
    assert spoilt[0, 35:, 1].isnan().all()
    spoilt[0, 32:, 1] = expected[0, 32:, 1]  # the tokens before it in its chunk may be spoilt too
    assert torch.equal(spoilt, expected)


def test_gates_of_zero_and_of_great_decay(isa):
    """Logarithms so low that a product of gates is zero."""
    q, k, v, beta, g = inputs(1, 80, 1, 8, 8, torch.float32)
    g[:, ::5] = -200.0
    g[:, 40] = -torch.inf
    out, state = ops.gated_delta_rule(q, k, v, beta, g, output_final_state=True)
    exact = ops.gated_delta_rule(*doubled((q, k, v, beta, g)), output_final_state=True, form="reference")
    torch.testing.assert_close(out.double(), exact[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state.double(), exact[1], rtol=1e-4, atol=1e-6)


def test_who_is_served():
    """Other dtypes take the torch form, with and without gradients, and the reason is counted."""
    half = [t.half() for t in inputs(1, 4, 1, 8, 8, torch.float32)]
    why = "no C++ kernel for torch.float16"
    counted = calls["gated_delta_rule", "torch", why]
    ops.gated_delta_rule(*half)
    out, _ = ops.gated_delta_rule(half[0].requires_grad_(), *half[1:])
    out.sum().backward()
    assert calls["gated_delta_rule", "torch", why] == counted + 2


def test_compiled_calls_equal_eager_ones():
    q, k, v, beta, g = inputs(1, 20, 2, 8, 8, torch.float32)

    def run(q, k, v, beta, g):
        out, state = ops.gated_delta_rule(q, k, v, beta, g, output_final_state=True)
        return out + ops.gated_delta_rule_step(q[:, 0], k[:, 0], v[:, 0], beta[:, 0], g[:, 0], state=state), state

    with torch.no_grad():
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        for a, b in zip(compiled(q, k, v, beta, g), run(q, k, v, beta, g), strict=True):
            assert torch.equal(a, b)
