"""The sequence ops under the transforms of torch.func and forward-mode autograd, which kernels cannot be seen by."""

import pytest
import torch
from helpers import assert_close
from sequence_cases import OPS, doubled
from torch.autograd import forward_ad

from ttt.ops.sequence.states import map_state, own, tensors_of

TOKENS, SIZE = 7, 4


def text(op, form):
    return lambda *tensors: op.run(*tensors, size=SIZE, form=form)[0]


def with_tangents(run, tensors, tangents):
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(run(*map(forward_ad.make_dual, tensors, tangents)))
        return dual.primal.clone(), dual.tangent.clone()


@pytest.mark.parametrize("transform", [torch.func.jvp, with_tangents])
@pytest.mark.parametrize("name", OPS)
def test_tangents_of_texts(name, transform):
    op = OPS[name]()
    tensors = op.inputs(2, TOKENS, torch.float32)
    tangents = tuple(map(torch.randn_like, tensors))
    found = transform(text(op, "auto"), tensors, tangents)
    plain = transform(text(op, "chunk"), tensors, tangents)
    # The reference calls autograd itself, which gives tangents by a derivative of the derivative.
    exact = torch.autograd.functional.jvp(text(op, "reference"), tuple(doubled(tensors)), tuple(doubled(tangents)))
    # The Newton-Schulz steps of LaCT carry rounding into all digits of what follows its first chunk.
    compared = SIZE if name == "LaCT" else TOKENS
    for what, a, b, c in zip(("output", "tangent"), found, exact, plain, strict=True):
        assert_close(a[:, :compared], b[:, :compared], c[:, :compared], what)
    assert found[1][:, SIZE:].abs().sum() > 0


@pytest.mark.parametrize("name", OPS)
def test_texts_of_a_batch_by_vmap(name):
    """Without gradients, where the kernels for texts would be called."""
    op = OPS[name]()
    tensors = op.inputs(3, TOKENS, torch.float32)
    with torch.no_grad():
        found = torch.func.vmap(lambda *row: text(op, "auto")(*(t[None] for t in row))[0])(*tensors)
        plain = text(op, "chunk")(*tensors)
    exact = text(op, "reference")(*doubled(tensors))
    compared = SIZE if name == "LaCT" else TOKENS
    assert_close(found[:, :compared], exact[:, :compared], plain[:, :compared], "output")


@pytest.mark.parametrize("name", OPS)
def test_steps_by_functionalize(name):
    """Tensors that are wrapped have the type of others, but no numbers that a kernel could read."""
    op = OPS[name]()
    tensors, state = op.inputs(3, 1, torch.float32), op.begin(3, torch.float32)
    copies = own(state)

    def step(state, *token):
        return op.step(*token, size=SIZE, state=state)

    token = [t[:, 0] for t in tensors]
    with torch.no_grad():
        found = torch.func.functionalize(step)(state, *token)
        plain = step(copies, *token)
    wide = map_state(lambda t: t.double() if t.is_floating_point() else t.clone(), op.begin(3, torch.float32))
    exact = step(wide, *doubled(token))
    assert_close(found, exact, plain, "output")
    for a, b, c in zip(tensors_of(state), tensors_of(wide), tensors_of(copies), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gated delta rule", "Titans", "In-Place TTT"])
def test_steps_whose_query_alone_is_wrapped(name):
    """The state, which no query changes, is that of a step without a transform."""
    op = OPS[name]()
    (q, *others), state = (t[:, 0] for t in op.inputs(2, 1, torch.float32)), op.begin(2, torch.float32)
    copies = own(state)
    with torch.no_grad():
        found = torch.func.functionalize(lambda q: op.step(q, *others, size=SIZE, state=state))(q)
        plain = op.step(q, *others, size=SIZE, state=copies)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    for a, b in zip(tensors_of(state), tensors_of(copies), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
