"""The C++ kernel of LaCT and In-Place TTT on texts, for each instruction set, against float64."""

import itertools

import pytest
import torch
from helpers import assert_close
from sequence_cases import between, compare, draw, unit

from ttt.ops import cpu
from ttt.ops import sequence as ops
from ttt.ops.backends import calls
from ttt.ops.sequence import kernels
from ttt.ops.sequence.large_chunk import newton_schulz
from ttt.ops.sequence.states import map_state, own, tensors_of

pytestmark = pytest.mark.skipif(cpu._C is None, reason="the C++ kernels are not built")


def case(batch, tokens, heads, sizes, dtype=torch.float32, moving=True):
    """(q, k, v, rates[, momentum]) and first weights: of LaCT for sizes (D, F), of In-Place TTT for (I, O, 1)."""
    width, out = (sizes[0], sizes[0]) if len(sizes) == 2 else sizes[:2]
    shape = (batch, tokens, heads)
    q, k, v = draw(*shape, width), unit(*shape, width), draw(*shape, out)
    count = 3 if len(sizes) == 2 else 1
    numbers = [between(0, 0.1, *shape, count)]
    numbers += [between(0, 1, *shape)] if count == 3 and moving else []
    matrices = [(width, sizes[1]), (sizes[1], width), (width, sizes[1])] if count == 3 else [(width, out)]
    weights = [(draw(heads, *m) / m[0] ** 0.5).float() for m in matrices]
    return [t.to(dtype) for t in (q, k, v)] + [t.float() for t in numbers], weights


def read(tensors, weights, size, form="auto", state=None, orthogonal=False, **options):
    q, k, v, rates, *momentum = tensors
    options |= {"chunk_size": size, "scale": 0.7, "output_final_state": True, "form": form, "initial_state": state}
    if len(weights) == 1:
        return ops.in_place_ttt(q, k, v, rates[..., 0], weights[0], **options)
    return ops.lact(
        q, k, v, rates, weights, momentum=momentum[0] if momentum else None, orthogonal=orthogonal, **options
    )


def wide(tensors):
    return [t.double() for t in tensors]


def name_of(weights):
    return "lact" if len(weights) == 3 else "in_place_ttt"


SIZES = [(1, 1), (3, 5), (20, 33), (64, 128), (33, 20), (1, 4, 1), (17, 70, 1), (64, 64, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "tokens"), [(1, 3), (20, 70), (60, 131), (500, 70)])
@pytest.mark.parametrize(("sizes", "moving"), [(s, m) for s in SIZES for m in (False, True) if len(s) == 2 or not m])
def test_texts(each_isa, dtype, size, tokens, sizes, moving):
    """Outputs and states of two sequences; nothing that is given changes."""
    tensors, weights = case(2, tokens, 2, sizes, dtype, moving)
    copies = [t.clone() for t in (*tensors, *weights)]
    exact = read(wide(tensors), wide(weights), size, "reference")
    plain = read(tensors, weights, size, "chunk")
    for isa in each_isa():
        before = calls[name_of(weights), "cpu", ""]
        compare(read(tensors, weights, size), exact, plain, isa)
        assert calls[name_of(weights), "cpu", ""] == before + 1, isa
        assert all(map(torch.equal, (*tensors, *weights), copies)), isa


@pytest.mark.parametrize("sizes", [(16, 32), (33, 20), (64, 128)])
def test_orthogonal_updates(isa, sizes):
    """Two ends of chunks. Newton-Schulz steps are compared where their first matrix is the same."""
    tensors, weights = case(1, 48, 2, sizes)
    found = read(tensors, weights, 24, orthogonal=True)
    exact = read(wide(tensors), wide(weights), 24, "reference", orthogonal=True)
    plain = read(tensors, weights, 24, "chunk", orthogonal=True)
    assert_close(found[0][:, :24], exact[0][:, :24], plain[0][:, :24], "o")
    for a, b, c in zip((found[0], *found[1].velocity), (exact[0], *exact[1].velocity), (plain[0], *plain[1].velocity),
                       strict=True):  # fmt: skip
        error, other = float((a - b).norm() / b.norm()), float((c - b).norm() / b.norm())
        assert error <= 4 * other + 1e-5


def test_an_orthogonal_update_is_that_of_newton_schulz(isa):
    """Weights after a chunk are what torch makes of its sums. They have full rank: steps enlarge what is almost 0."""

    def ended(first, total):
        w = first + newton_schulz(total)
        return w * (first.norm(dim=-2, keepdim=True) / (w.norm(dim=-2, keepdim=True) + 1e-5))

    tensors, weights = case(1, 40, 2, (20, 33), moving=False)
    sums = read(tensors, weights, 100)[1].sums
    final = read(tensors, weights, 40, orthogonal=True)[1]
    for first, total, w in zip(weights, sums, final.weights, strict=True):
        found, plain = w[0] - first, ended(first, total[0]) - first
        assert_close(found, ended(first.double(), total[0].double()) - first.double(), plain, "update")


@pytest.mark.parametrize("sizes", [(9, 14), (9, 14, 1)])
def test_pieces_positions_and_packed_texts(isa, sizes):
    """A text in pieces is the whole one; so is one that is packed with others, and one of a row of its own."""
    tensors, weights = case(3, 50, 2, sizes)
    whole, final = read(tensors, weights, 16)
    outs, state = [], None
    for begin, end in ((0, 5), (5, 5), (5, 33), (33, 34), (34, 50)):
        out, state = read([t[:, begin:end] for t in tensors], weights, 16, state=state)
        outs.append(out)
    near = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(torch.cat(outs, 1), whole, **near)
    for a, b in zip(tensors_of(state), tensors_of(final), strict=True):
        torch.testing.assert_close(a, b, **near)
    bounds = torch.tensor([0, 7, 7, 50])
    packed, packed_state = read([t[:1] for t in tensors], weights, 16, cu_seqlens=bounds)
    for row, (begin, end) in enumerate(itertools.pairwise(bounds.tolist())):
        alone, alone_state = read([t[:1, begin:end] for t in tensors], weights, 16)
        assert torch.equal(packed[:, begin:end], alone)
        for a, b in zip(tensors_of(packed_state), tensors_of(alone_state), strict=True):
            assert torch.equal(a[row], b[0])
    state = own(final)
    state.position.copy_(torch.tensor([0, 3, 15]))
    copies = own(state)
    found, after = read(tensors, weights, 16, state=state)
    exact = map_state(lambda t: t.double() if t.is_floating_point() else t, state)
    exact = read(wide(tensors), wide(weights), 16, "reference", state=exact)
    compare((found, after), exact, read(tensors, weights, 16, "chunk", state=state))
    assert all(map(torch.equal, tensors_of(state), tensors_of(copies)))


def test_strided_tokens_and_numbers_that_are_not_finite_stay_in_their_head(isa):
    tensors, weights = case(2, 40, 3, (9, 12))
    expected, _ = read(tensors, weights, 16)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    assert torch.equal(read(strided, weights, 16)[0], expected)
    tensors[2][0, 20, 1] = torch.nan
    spoilt, _ = read(tensors, weights, 16)
    assert spoilt[0, 32:, 1].isnan().all()
    spoilt[0, 32:, 1] = expected[0, 32:, 1]
    assert torch.equal(spoilt, expected)


def test_threads_change_no_bit():
    tensors, weights = case(2, 70, 3, (40, 72))
    found, state = read(tensors, weights, 20, orthogonal=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again, other = read(tensors, weights, 20, orthogonal=True)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found, again)
    assert all(map(torch.equal, tensors_of(state), tensors_of(other)))


def test_who_is_served():
    """Large weights, other dtypes and gradients take the torch form; of the dtype the reason is counted."""
    tensors, weights = case(1, 4, 1, (257, 256, 1))
    assert weights[0].numel() > kernels.MOST_FAST_WEIGHT
    before = dict(calls)
    read(tensors, weights, 4)
    assert dict(calls) == before
    tensors, weights = case(1, 4, 1, (5, 7))
    before = calls["lact", "torch", "no C++ kernel for torch.float64"]
    read(wide(tensors), wide(weights), 4)
    assert calls["lact", "torch", "no C++ kernel for torch.float64"] == before + 1
    tensors[0].requires_grad_()
    served = calls["lact", "cpu", ""]
    read(tensors, weights, 4)[0].sum().backward()
    assert tensors[0].grad.abs().sum() > 0
    assert calls["lact", "cpu", ""] == served


def test_compiled_calls_equal_eager_ones():
    tensors, weights = case(1, 20, 2, (8, 12))
    with torch.no_grad():
        compiled = torch.compile(lambda *ts: read(ts, weights, 6), backend="aot_eager", fullgraph=True)(*tensors)
        for a, b in zip(*map(tensors_of, (compiled, read(tensors, weights, 6))), strict=True):
            assert torch.equal(a, b)
