"""The C++ kernel of a token of LaCT, for each instruction set, against float64."""

import pytest
import torch
from helpers import assert_close
from sequence_cases import between, draw, unit

from ttt.ops import cpu
from ttt.ops import sequence as ops
from ttt.ops.backends import calls
from ttt.ops.sequence.states import map_state, own, tensors_of

pytestmark = pytest.mark.skipif(cpu._C is None, reason="the C++ kernels are not built")


def case(batch, heads, width, inner, dtype=torch.float32):
    """Six tokens (q, k, v, rates, momentum), and the state of new sequences in float32."""
    shape = (batch, 6, heads)
    q, k, v = draw(*shape, width), unit(*shape, width), draw(*shape, width)
    rates, momentum = between(0, 0.1, *shape, 3), between(0, 1, *shape)
    weights = [draw(heads, *sizes) / sizes[0] ** 0.5 for sizes in ((width, inner), (inner, width), (width, inner))]
    state = ops.new_large_chunk_state([w.float() for w in weights], batch, True, True)
    return [t.to(dtype) for t in (q, k, v)] + [rates.float(), momentum.float()], state


def wide_of(state):
    return map_state(lambda t: t.double() if t.is_floating_point() else t.clone(), state)


def state_of(state):
    """A new state with the weights of ``state``."""
    return ops.new_large_chunk_state([w[0] for w in state.weights], 1, True, True)


def steps(tensors, state, size):
    outs = []
    for t in range(tensors[0].shape[1]):
        q, k, v, rates, momentum = (x[:, t] for x in tensors)
        outs.append(ops.lact_step(q, k, v, rates, state=state, momentum=momentum, chunk_size=size, scale=0.7))
    return torch.stack(outs, 1)


def in_chunks(tensors, state, size):
    """The torch form in the dtype of ``tensors``."""
    q, k, v, rates, momentum = tensors
    weights, options = [w[0] for w in state.weights], {"momentum": momentum, "chunk_size": size, "scale": 0.7}
    return ops.lact(q, k, v, rates, weights, initial_state=state, output_final_state=True, form="chunk", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [4, 100])
@pytest.mark.parametrize("sizes", [(1, 1), (3, 5), (16, 32), (20, 33), (64, 128)])
def test_tokens(isa, dtype, size, sizes):
    """Outputs, and all of the state, also where a chunk ends among the tokens; rows are at different positions."""
    tensors, state = case(3, 2, *sizes, dtype)
    state.position.copy_(torch.arange(3) % size)
    exact, plain = wide_of(state), own(state)
    before = calls["lact_step", "cpu", ""]
    found = steps(tensors, state, size)
    assert calls["lact_step", "cpu", ""] == before + 6
    wanted, exact = in_chunks([t.double() for t in tensors], exact, size)
    near, plain = in_chunks([t.float() for t in tensors], plain, size)
    if size == 100:  # Newton-Schulz steps carry rounding into all digits of the weights
        assert_close(found, wanted, near.to(dtype), "o")
        for a, b, c in zip(*map(tensors_of, (state, exact, plain)), strict=True):
            assert torch.equal(a, b) if a.dtype == torch.int64 else assert_close(a, b, c, "state") is None
    else:
        torch.testing.assert_close(found[:, :2].double(), wanted[:, :2], rtol=2**-7, atol=1e-4)
        assert torch.equal(state.position, exact.position)
        for a, b in zip(state.sums, plain.sums, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * float(b.abs().max()))


def test_large_numbers_and_zeros(isa):
    """Gates far from 0 neither overflow nor lose their sign, and what is not finite stays in its row."""
    tensors, state = case(3, 1, 5, 7)
    tensors[1][0] *= 1e4
    tensors[0][1], tensors[1][1] = 0.0, 0.0
    tensors[2][2, 0] = torch.nan
    plain = own(state)
    found = steps(tensors, state, 100)
    expected, plain = in_chunks(tensors, plain, 100)
    for a, b in zip((found, *state.sums), (expected, *plain.sums), strict=True):
        assert a[:2].isfinite().all()
        torch.testing.assert_close(a[:2], b[:2], rtol=1e-4, atol=1e-4 * float(b[:2].abs().max()))
        assert torch.equal(a[2].isnan(), b[2].isnan())


def test_threads_change_no_bit():
    tensors, state = case(16, 3, 40, 72)
    copies, threads = own(state), torch.get_num_threads()
    found = steps(tensors, state, 100)
    try:
        torch.set_num_threads(3)
        again = steps(tensors, copies, 100)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found, again)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(state), tensors_of(copies), strict=True))


def test_what_the_kernel_does_not_take_is_counted():
    tensors, state = case(1, 2, 5, 7)
    turned = state._replace(sums=tuple(s.mT.contiguous().mT for s in state.sums))
    for tokens, held, why in (
        (tensors, turned, "a state that is not contiguous, or is a negative view"),
        ([t.double() for t in tensors], wide_of(state), "no C++ kernel for torch.float64"),
    ):
        before = calls["lact_step", "torch", why]
        out = steps(tokens, held, 100)
        assert calls["lact_step", "torch", why] == before + 6
        exact, _ = in_chunks([t.double() for t in tensors], wide_of(state_of(held)), 100)
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_compiled_steps_equal_eager_ones():
    tensors, state = case(2, 2, 8, 12)
    copies = own(state)

    def step(q, k, v, rates, momentum, state):
        return ops.lact_step(q, k, v, rates, state=state, momentum=momentum, chunk_size=100)

    token = [t[:, 0] for t in tensors]
    with torch.no_grad():
        compiled = torch.compile(step, backend="aot_eager")(*token, state)
        assert torch.equal(compiled, step(*token, copies))
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(state), tensors_of(copies), strict=True))
