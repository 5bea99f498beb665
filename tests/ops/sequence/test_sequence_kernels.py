"""The C++ kernels of the sequence ops, for each instruction set, against float64; and which calls they serve."""

import pytest
import torch
from helpers import ISAS, assert_close

from ttt.ops import cpu
from ttt.ops import sequence as ops
from ttt.ops.backends import calls
from ttt.ops.sequence import delta_rule, dual_form
from ttt.ops.sequence.states import own, tensors_of

pytestmark = pytest.mark.skipif(cpu._C is None, reason="the C++ kernels are not built")
SHAPES = [(1, 1, 4, 3, 5), (2, 33, 3, 5, 7), (1, 70, 2, 64, 64), (2, 32, 1, 19, 130), (1, 100, 1, 40, 24)]


@pytest.fixture(params=[isa for isa in ISAS if "amx" not in isa])
def isa(request):
    before = cpu._C.active_isa()
    cpu._C.set_isa(request.param)
    yield request.param
    cpu._C.set_isa(before)


def inputs(batch, tokens, heads, keys, values, dtype):
    q, k = (torch.nn.functional.normalize(torch.randn(batch, tokens, heads, keys), dim=-1) for _ in range(2))
    v = torch.randn(batch, tokens, heads, values)
    return q.to(dtype), k.to(dtype), v.to(dtype), torch.rand(batch, tokens, heads), -torch.rand(batch, tokens, heads)


def doubled(tensors):
    return [None if t is None else t.double() for t in tensors]


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


def linear_case(batch, tokens, heads, width, dtype):
    q, k, v, rate, _ = inputs(batch, tokens, heads, width, width, dtype)
    weights = [0.3 * torch.randn(heads, width, width), 0.1 * torch.randn(heads, width)]
    # A norm of 3 numbers divides by deviations that are near 0 now and then: rounding errors would grow by each step.
    eps, most = (1e-6, 0.3) if width > 16 else (1.0, 0.1)
    norm = ops.Norm(1 + 0.1 * torch.randn(heads, width), 0.1 * torch.randn(heads, width), eps)
    return (q, k, v, most * rate), weights, norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 16, 64])
@pytest.mark.parametrize("width", [3, 20, 64])
def test_ttt_linear(isa, dtype, size, width):
    """A text in two pieces, of which the first ends within a mini-batch, and then some steps."""
    tensors, weights, norm = linear_case(2, 47, 2, width, dtype)
    options = {"norm": norm, "mini_batch": size, "scale": 0.8}
    wide = {**options, "norm": ops.Norm(norm.weight.double(), norm.bias.double(), norm.eps)}

    def read(tensors, weights, options, form):
        outs, state = [], None
        for begin, end in ((0, 20), (20, 40)):
            part = [t[:, begin:end] for t in tensors]
            out, state = ops.memory(*part, weights, initial_state=state, output_final_state=True, form=form, **options)
            outs.append(out)
        state = own(state)
        for t in range(40, 47):
            part = [x[:, t] for x in tensors]
            if form == "chunk":
                scaled = [part[0].float() * options["scale"], *(x.float() for x in part[1:])]
                out = dual_form.step_(*scaled, None, None, state, norm, size).to(dtype)
            else:
                out = ops.memory_step(*part, state=state, **options)
            outs.append(out.unsqueeze(1))
        return torch.cat(outs, 1), state

    before = calls["ttt_linear", "cpu", ""], calls["ttt_linear_step", "cpu", ""]
    copies = [t.clone() for t in (*tensors, *weights)]
    out, state = read(tensors, weights, options, "auto")
    assert (calls["ttt_linear", "cpu", ""], calls["ttt_linear_step", "cpu", ""]) == (before[0] + 2, before[1] + 7)
    exact = read(doubled(tensors), doubled(weights), wide, "reference")
    plain = read(tensors, weights, options, "chunk")
    assert_close(out, exact[0], plain[0], "o")
    for got, wanted, other in zip(*map(tensors_of, (state, exact[1], plain[1])), strict=True):
        assert_close(got.float(), wanted, other.float(), "state")
    for t, copy in zip((*tensors, *weights), copies, strict=True):
        assert torch.equal(t, copy)


def test_packed_texts(isa):
    bounds = torch.tensor([0, 5, 5, 6, 40])
    q, k, v, beta, g = inputs(1, 40, 2, 9, 9, torch.float32)
    _, weights, norm = linear_case(1, 1, 2, 9, torch.float32)
    delta = {"cu_seqlens": bounds, "output_final_state": True}
    learning = {**delta, "norm": norm, "mini_batch": 7}
    for op, given, options in (
        (ops.gated_delta_rule, (q, k, v, beta, g), delta),
        (ops.memory, (q, k, v, 0.3 * beta, weights), learning),
    ):
        found = op(*given, **options)
        expected = op(*given, form="chunk", **options)
        for a, b in zip(tensors_of(found), tensors_of(expected), strict=True):
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
    """Gradients and other dtypes take the torch form; the reason of the second is counted."""
    tensors = inputs(1, 4, 1, 8, 8, torch.float32)
    before = calls["gated_delta_rule", "cpu", ""]
    out, _ = ops.gated_delta_rule(tensors[0].requires_grad_(), *tensors[1:])
    out.sum().backward()
    assert calls["gated_delta_rule", "cpu", ""] == before
    half = [t.detach().half() for t in tensors]
    why = "no C++ kernel for torch.float16"
    counted = calls["gated_delta_rule", "torch", why]
    ops.gated_delta_rule(*half)
    assert calls["gated_delta_rule", "torch", why] == counted + 1


def test_compiled_calls_equal_eager_ones():
    tensors, weights, norm = linear_case(1, 20, 2, 8, torch.float32)
    _, state = ops.memory(*tensors, weights, norm=norm, output_final_state=True)

    def run(q, k, v, rate, state):
        out, _ = ops.gated_delta_rule(q, k, v, rate)
        state = own(state)
        return out + ops.memory_step(q[:, 0], k[:, 0], v[:, 0], rate[:, 0], norm=norm, state=state).unsqueeze(1)

    with torch.no_grad():
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(*tensors, state), run(*tensors, state))
