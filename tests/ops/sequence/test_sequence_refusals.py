"""Wrong arguments of the sequence ops: each error names the argument, what it was and what is allowed."""

import pytest
import torch
from sequence_cases import OPS, D, H

from ttt.ops import sequence as ops
from ttt.ops.sequence.states import own, tensors_of

OP = "gated delta rule"


def case(name=OP, tokens=6):
    op = OPS[name]()
    return op, list(op.inputs(2, tokens))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda t: [t[0][0], *t[1:]], ValueError, r"q must be \(B, T, H, D\), got \(6, 2, 5\)"),
        (lambda t: [t[0], t[1].float(), *t[2:]], TypeError, "k must be torch.float64 on cpu like q, got torch.float32"),
        (lambda t: [t[0], t[1][..., :3], *t[2:]], ValueError, r"k must have the shape of q, \(2, 6, 2, 5\), got"),
        (lambda t: [t[0], t[1], t[2][:, :5], *t[3:]], ValueError, "v must be .* like q but for the last size"),
        (lambda t: [*t[:3], t[3][:, :5], t[4]], ValueError, r"beta must be \(2, 6, 2\), got \(2, 5, 2\)"),
        (lambda t: [*t[:4], t[4].long()], TypeError, "g must be a floating-point tensor on cpu, got torch.int64"),
        (lambda t: [t[0].int(), *t[1:]], TypeError, "q must be float32, bfloat16, float16 or float64, got torch.int32"),
        (lambda t: ["q", *t[1:]], TypeError, "q must be a tensor, got str"),
    ],
)
def test_tensors_of_tokens(change, error, says):
    op, tensors = case()
    with pytest.raises(error, match=says):
        op.run(*change(tensors), size=4)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"form": "fast"}, ValueError, "form must be one of auto, chunk, reference, got 'fast'"),
        ({"size": 0}, ValueError, "(chunk_size|mini_batch) must be at least 1, got 0"),
        ({"size": 2.0}, TypeError, "(chunk_size|mini_batch) must be a whole number, got float 2.0"),
        ({"cu_seqlens": [0, 6]}, TypeError, "cu_seqlens must be an int32 or int64 tensor, got list"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "cu_seqlens packs .* a batch of 1, got a batch of 2"),
        ({"initial_state": 3}, TypeError, "initial_state must be"),
    ],
)
@pytest.mark.parametrize("name", [OP, "TTT-Linear", "LaCT", "In-Place TTT"])
def test_options(name, options, error, says):
    op, tensors = case(name)
    with pytest.raises(error, match=says):
        op.run(*tensors, **{"size": 4, **options})


@pytest.mark.parametrize("bounds", [[0], [1, 6], [0, 4, 3, 6], [0, 5]])
def test_bounds_of_packed_sequences(bounds):
    op, tensors = case()
    with pytest.raises(ValueError, match=r"cu_seqlens must (rise from 0 to the 6 tokens|hold at least 2 numbers)"):
        op.run(*(t[:1] for t in tensors), size=4, cu_seqlens=torch.tensor(bounds))


@pytest.mark.parametrize("name", OPS)
def test_states_that_do_not_fit(name):
    op, tensors = case(name)
    for state in (op.begin(3), op.begin(2, torch.float32)):
        with pytest.raises((TypeError, ValueError), match="initial_state must"):
            op.run(*tensors, size=4, initial_state=state)
        copy = own(state)
        with pytest.raises((TypeError, ValueError), match="state must"):
            op.step(*(t[:, 0] for t in tensors), size=4, state=state)
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(state), tensors_of(copy), strict=True))
    with pytest.raises((TypeError, ValueError), match="state must"):
        op.step(*(t[:, 0] for t in tensors), size=4, state=None)


def test_first_weights_that_do_not_fit():
    q, k, v, rate = OPS["TTT-Linear"]().inputs(1, 3)
    weight, bias = torch.zeros(H, D, D), torch.zeros(H, D)
    for weights, says in (
        ([weight], "weights must be a weight and a bias for each layer, got 1 tensors"),
        ([weight[0], bias], r"weight 1 must be \(H, I, O\)"),
        ([weight[:, :3], bias], "weight 1 must be"),
        ([weight, bias[:1]], "bias 1 must be"),
    ):
        with pytest.raises(ValueError, match=says):
            ops.memory(q, k, v, rate, weights)
    with pytest.raises(ValueError, match="v must have the width of q, 5, got 4"):
        ops.memory(q, k, v[..., :4], rate, [weight, bias])
    with pytest.raises(ValueError, match=r"norm.bias must be \(2, 5\), got \(2, 4\)"):
        ops.memory(q, k, v, rate, [weight, bias], norm=ops.Norm(bias, bias[:, :4]))
    with pytest.raises(ValueError, match="weights must be two weights and two biases, got 2 tensors"):
        ops.ttt_mlp(q, k, v, rate, [weight, bias], ops.Norm(bias, bias))


def test_a_step_needs_a_contiguous_state():
    op, tensors = case()
    state = op.begin(2).transpose(-1, -2).contiguous().transpose(-1, -2)
    with pytest.raises(
        ValueError, match="state must be contiguous and no negative view, because it is changed in place"
    ):
        op.step(*(t[:, 0] for t in tensors), size=4, state=state)


@pytest.mark.parametrize("form", ["auto", "chunk", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["TTT-Linear", "TTT-MLP", "Titans", "LaCT", "In-Place TTT"])
def test_a_state_within_a_chunk_that_is_longer_than_the_present_ones(name, dtype, form):
    op = OPS[name]()
    tensors = op.inputs(2, 11, dtype)
    run = {"output_final_state": True}
    weights = [w.to(dtype) for w in op.begin(1, dtype).weights]
    if name == "In-Place TTT":
        run["weight"] = weights[0][0]
    else:
        run["weights"] = [w[0] for w in weights]
    _, state = op.run(*tensors, size=16, **run)
    assert state.position.tolist() == [11, 11]
    kept = own(state)
    with pytest.raises(ValueError, match=r"initial_state.position must be at least 0 and below .*, 8, got 11"):
        op.run(*tensors, size=8, initial_state=state, form=form, **run)
    state.position[1] = -1
    with pytest.raises(ValueError, match=r"initial_state.position must be at least 0 and below .*, 16, got -1"):
        op.run(*tensors, size=16, initial_state=state, form=form, **run)
    for a, b in zip(tensors_of(state)[:-1], tensors_of(kept)[:-1], strict=True):
        assert torch.equal(a, b)
