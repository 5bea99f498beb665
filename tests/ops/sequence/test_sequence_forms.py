"""Every sequence op: the chunk form and the step against the recurrence, in float64; packed texts; any pieces."""

import pytest
import torch
from sequence_cases import OPS, H

from ttt.ops import sequence as ops
from ttt.ops.sequence.states import concatenated, own, select_rows, tensors_of

SIZES = (1, 7, 16, 64)


def near(a, b, within=1e-10):
    for x, y in zip(tensors_of(a), tensors_of(b), strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        assert x.numel() == 0 or float((x - y).abs().max()) <= within * (1 + float(y.abs().max()))


def both(op, tensors, size, **options):
    return op.run(*tensors, size=size, output_final_state=True, **options)


def steps(op, tensors, size, state):
    outs = [op.step(*(t[:, i] for t in tensors), size=size, state=state) for i in range(tensors[0].shape[1])]
    return torch.stack(outs, 1) if outs else torch.zeros_like(tensors[2])


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("size", SIZES)
def test_chunks_and_steps_are_the_recurrence(name, size):
    """For no token, one, and one less and one more than a chunk; outputs and states."""
    op = OPS[name]()
    for tokens in {0, 1, size - 1, size + 1, 2 * size + 3}:
        tensors = op.inputs(2, tokens)
        expected, state = both(op, tensors, size, form="reference")
        found = both(op, tensors, size, form="chunk")
        near(found, (expected, state))
        stepped = op.begin(2)
        near(steps(op, tensors, size, stepped), expected)
        near(stepped, state)
        assert found[0].shape == tensors[2].shape


@pytest.mark.parametrize("name", OPS)
def test_a_text_may_be_read_in_any_pieces(name):
    """Pieces in chunks and single tokens in turn; one piece is empty. What was returned earlier is never changed."""
    op = OPS[name]()
    tensors = op.inputs(2, 40)
    expected = both(op, tensors, 7)
    outs, state = [], None
    for begin, end in ((0, 3), (3, 3), (3, 20), (20, 21), (21, 40)):
        part = [t[:, begin:end] for t in tensors]
        if end - begin == 1:
            state = own(state)
            outs.append(steps(op, part, 7, state))
        else:
            before, copy = state, None if state is None else own(state)
            out, state = both(op, part, 7, initial_state=state)
            outs.append(out)
            if copy is not None:
                near(before, copy, 0)
    near((torch.cat(outs, 1), state), expected)


@pytest.mark.parametrize("name", OPS)
def test_steps_change_no_other_tensor(name):
    """A step after a whole text, whose state may share memory with nothing."""
    op = OPS[name]()
    tensors = op.inputs(1, 15)
    for tokens in (0, 14):  # 14 is the end of a mini-batch of 7
        part, last = [t[:, :tokens] for t in tensors], [t[:, tokens] for t in tensors]
        state = op.begin(1)
        copy = own(state)
        _, final = both(op, part, 7, initial_state=state)
        kept = own(final)
        op.step(*last, size=7, state=final)
        near(state, copy, 0)
        whole = both(op, [t[:, : tokens + 1] for t in tensors], 7)[1]
        near(final, whole)
        assert any(not torch.equal(a, b) for a, b in zip(tensors_of(final), tensors_of(kept), strict=True))


@pytest.mark.parametrize("name", OPS)
def test_packed_is_padded_is_single(name):
    """Sequences of several lengths, some of them empty, with states of their own, at positions of their own."""
    op = OPS[name]()
    lengths, begun = (5, 0, 1, 17, 8), (0, 3, 7, 11, 2)
    firsts = [both(op, op.inputs(1, n), 7)[1] for n in begun]
    parts = [op.inputs(1, n) for n in lengths]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    packed = [torch.cat(ts, 1) for ts in zip(*parts, strict=True)]
    for form in ("chunk", "reference"):
        options = {"initial_state": concatenated(firsts), "cu_seqlens": bounds, "form": form}
        out, state = both(op, packed, 7, **options)
        for n, (part, first) in enumerate(zip(parts, firsts, strict=True)):
            alone = both(op, part, 7, initial_state=first)
            near((out[:, bounds[n] : bounds[n + 1]], select_rows(state, slice(n, n + 1))), alone)

    # Padded at the end, a sequence's outputs are the same.
    def to_length(t):
        return torch.cat([t, t.new_full((1, 17 - t.shape[1], *t.shape[2:]), 0.5)], 1)

    padded = [torch.cat([to_length(t) for t in ts]) for ts in zip(*parts, strict=True)]
    out = op.run(*padded, size=7, initial_state=concatenated(firsts))[0]
    for n, (part, first) in enumerate(zip(parts, firsts, strict=True)):
        near(out[n : n + 1, : lengths[n]], op.run(*part, size=7, initial_state=first)[0])


@pytest.mark.parametrize("name", OPS)
def test_rows_at_different_positions_step_together(name):
    op = OPS[name]()
    states = [both(op, op.inputs(1, n), 7)[1] for n in (0, 6, 3)]
    tensors = op.inputs(3, 9)
    together = concatenated(states)
    out = steps(op, tensors, 7, together)
    for n, state in enumerate(states):
        row = [t[n : n + 1] for t in tensors]
        near((out[n : n + 1], select_rows(together, slice(n, n + 1))), both(op, row, 7, initial_state=state))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("form", ["chunk", "reference"])
def test_gradients(name, form):
    """By gradcheck, through outputs and the final state."""
    op = OPS[name]()
    tensors = tuple(t.requires_grad_() for t in op.inputs(1, 5))

    def loss(*tensors):
        out, state = both(op, tensors, 3, form=form)
        return out, *(t for t in tensors_of(state) if t.requires_grad)

    assert torch.autograd.gradcheck(loss, tensors, fast_mode=True)


@pytest.mark.parametrize("form", ["chunk", "reference"])
def test_gradients_by_the_state_and_the_first_weights(form):
    state = torch.randn(1, H, 5, 4, dtype=torch.float64, requires_grad=True)
    op = OPS["gated delta rule"]()
    tensors = op.inputs(1, 5)
    assert torch.autograd.gradcheck(lambda s: both(op, tensors, 2, initial_state=s, form=form), (state,))
    for name in ("TTT-MLP", "LaCT", "Titans"):
        op = OPS[name]()
        tensors, first = op.inputs(1, 5), op.begin(1)
        weights = tuple(w[0].clone().requires_grad_() for w in first.weights)

        def loss(*weights, op=op, tensors=tensors):
            return op.run(*tensors, size=3, weights=weights, form=form)[0]

        assert torch.autograd.gradcheck(loss, weights, fast_mode=True)


def test_a_step_has_no_derivative():
    for make in OPS.values():
        op = make()
        tensors = [t[:, 0].requires_grad_() for t in op.inputs(1, 1)]
        state = op.begin(1)
        copy = own(state)
        with pytest.raises(RuntimeError, match="has no derivative: call it under"):
            op.step(*tensors, size=3, state=state)
        near(state, copy, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    """Outputs keep the dtype, sums and states are float32, and only the inputs' rounding is felt."""
    for make in OPS.values():
        op = make()
        tensors = [t.to(dtype) for t in op.inputs(2, 20)]
        expected, _ = both(op, [t.double() for t in tensors], 7, form="reference")
        for form in ("chunk", "reference", "auto"):
            out, state = both(op, tensors, 7, form=form)
            assert out.dtype == dtype
            assert all(t.dtype in (torch.float32, torch.int64) for t in tensors_of(state))
            within = 1e-4 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
            assert float((out.double() - expected).abs().max()) < within * float(expected.abs().max())


def test_the_gated_delta_rule_is_a_step_of_titans_memory():
    """Without momentum and bias: the rate is beta e^g, the gate e^g, and values are divided by e^g."""
    q, k, v, beta, g = OPS["gated delta rule"]().inputs(2, 9)
    out, state = ops.gated_delta_rule(q, k, v, beta, g, scale=1.0, output_final_state=True)
    gate, weight, outs = g.exp(), torch.zeros_like(state), []
    for t in range(9):
        error = torch.einsum("bhi,bhio->bho", k[:, t], weight) - v[:, t] / gate[:, t].unsqueeze(-1)
        change = torch.einsum("bhi,bho->bhio", k[:, t], error)
        weight = gate[:, t, :, None, None] * weight - (beta * gate)[:, t, :, None, None] * change
        outs.append(torch.einsum("bhi,bhio->bho", q[:, t], weight))
    near((out, state), (torch.stack(outs, 1), weight))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", ["auto", "chunk", "reference"])
@pytest.mark.parametrize("name", OPS)
def test_a_batch_of_no_sequences(name, form, dtype):
    """As where all of a server's users have gone: outputs and states are empty, with and without a state."""
    op = OPS[name]()
    for tokens in (0, 1, 9):
        tensors = op.inputs(0, tokens, dtype)
        for state in (None, op.begin(0, dtype)):
            out, final = both(op, tensors, 7, form=form, initial_state=state)
            assert out.shape == tensors[2].shape
            assert [t.shape for t in tensors_of(final)] == [t.shape for t in tensors_of(op.begin(0, dtype))]
    state = op.begin(0, dtype)
    assert op.step(*(t[:, 0] for t in op.inputs(0, 1, dtype)), size=7, state=state).shape == (0, *tensors[2].shape[2:])
