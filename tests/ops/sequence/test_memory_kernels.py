"""The C++ kernels of memories that learn, TTT-Linear, TTT-MLP and Titans, for each instruction set, against float64."""

import itertools

import pytest
import torch
from sequence_cases import between, compare, doubled, memory_case, wide_norm

from ttt.ops import cpu
from ttt.ops import sequence as ops
from ttt.ops.backends import calls
from ttt.ops.sequence import dual_form
from ttt.ops.sequence.cpu_steps import memory_op
from ttt.ops.sequence.states import own, tensors_of

pytestmark = pytest.mark.skipif(cpu._C is None, reason="the C++ kernels are not built")
MEMORIES = [(3,), (20,), (64,), (3, 5), (20, 33), (16, 64), (48, 100), (9, 6, 17)]
"""The width of a head, and those between its layers."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 16, 64])
@pytest.mark.parametrize("widths", MEMORIES)
def test_a_text_in_two_pieces_and_then_steps(each_isa, dtype, size, widths):
    """The first piece ends within a mini-batch."""
    tensors, weights, norm = memory_case(2, 47, 2, dtype, *widths)
    options = {"norm": norm, "mini_batch": size, "scale": 0.8}
    wide = {**options, "norm": wide_norm(norm)}

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

    op = memory_op(weights, None, None, norm.weight)
    copies = [t.clone() for t in (*tensors, *weights)]
    exact = read(doubled(tensors), doubled(weights), wide, "reference")
    plain = read(tensors, weights, options, "chunk")
    for isa in each_isa():
        before = calls[op, "cpu", ""], calls[f"{op}_step", "cpu", ""]
        found = read(tensors, weights, options, "auto")
        assert (calls[op, "cpu", ""], calls[f"{op}_step", "cpu", ""]) == (before[0] + 2, before[1] + 7)
        compare(found, exact, plain, isa)
        for t, copy in zip((*tensors, *weights), copies, strict=True):
            assert torch.equal(t, copy), isa


@pytest.mark.parametrize(("gated", "moving", "normed"), list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("widths", [(3,), (20,), (64,), (20, 33), (9, 6, 17)])
def test_steps_with_gates_and_momenta(each_isa, gated, moving, normed, dtype, size, widths):
    """As of Titans, which has both and no norm: outputs, weights, those of before the mini-batch, and velocities."""
    tensors, weights, norm = memory_case(3, 12, 2, dtype, *widths)
    shape = tensors[3].shape
    tensors[3].mul_(0.1 if moving else 1)  # momentum makes steps longer: rounding errors would grow from token to token
    gate = between(0.7, 1, *shape, dtype=torch.float32) if gated else None
    momentum = between(0, 0.4, *shape, dtype=torch.float32) if moving else None
    norm = norm if normed else None
    exact_norm = wide_norm(norm) if normed else None
    text = {"gate": gate, "momentum": momentum, "norm": norm, "mini_batch": size, "output_final_state": True}
    cut = {name: t[:, :4] for name, t in (("gate", gate), ("momentum", momentum)) if t is not None}
    _, state = ops.memory(*(t[:, :4] for t in tensors), weights, form="chunk", **{**text, **cut})
    plain_state = own(state)
    exact_state = ops.MemoryState(*(tuple(doubled(part)) for part in state[:3]), state.position.clone())
    given = []
    for t in range(4, 12):
        extra = [None if x is None else x[:, t] for x in (gate, momentum)]
        given.append(([x[:, t] for x in tensors], extra))
    plains, exacts = [], []
    for token, extra in given:
        scaled = [token[0].float() * 0.8, *(x.float() for x in token[1:])]
        plains.append(dual_form.step_(*scaled, *extra, plain_state, norm, size).to(dtype))
        options = dict(zip(("gate", "momentum"), doubled(extra), strict=True)) | {"mini_batch": size, "scale": 0.8}
        exacts.append(ops.memory_step(*doubled(token), norm=exact_norm, state=exact_state, **options))
    exact, plain = (torch.stack(exacts), exact_state), (torch.stack(plains), plain_state)
    op = f"{memory_op(weights, gate, momentum, norm and norm.weight)}_step"
    for isa in each_isa():
        before, held, outs = calls[op, "cpu", ""], own(state), []
        for token, extra in given:
            options = dict(zip(("gate", "momentum"), extra, strict=True)) | {"mini_batch": size, "scale": 0.8}
            copies = [x.clone() for x in token]
            outs.append(ops.memory_step(*token, norm=norm, state=held, **options))
            assert all(map(torch.equal, token, copies)), isa
        assert calls[op, "cpu", ""] == before + 8, isa
        compare((torch.stack(outs), held), exact, plain, isa)
        assert len(held.velocity) == (len(weights) if moving else 0)


@pytest.mark.parametrize(("gated", "moving", "normed"), list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 5, 16, 40])
@pytest.mark.parametrize("widths", [(3,), (20,), (64,), (20, 33), (9, 6, 17)])
def test_texts_with_gates_and_momenta(each_isa, gated, moving, normed, dtype, size, widths):
    """In three pieces, of which one is empty and the first ends within a mini-batch."""
    tensors, weights, norm = memory_case(2, 37, 2, dtype, *widths)
    shape = tensors[3].shape
    tensors[3].mul_(0.1 if moving else 1)  # momentum makes steps longer: rounding errors would grow from token to token
    extra = {"gate": between(0.7, 1, *shape, dtype=torch.float32)} if gated else {}
    extra |= {"momentum": between(0, 0.4, *shape, dtype=torch.float32)} if moving else {}
    norm = norm if normed else None

    def read(tensors, weights, extra, norm, form):
        outs, state = [], None
        for begin, end in ((0, 18), (18, 18), (18, 37)):
            part = [t[:, begin:end] for t in tensors]
            cut = {name: t[:, begin:end] for name, t in extra.items()}
            options = {"norm": norm, "mini_batch": size, "scale": 0.8, "output_final_state": True, "form": form}
            out, state = ops.memory(*part, weights, initial_state=state, **options, **cut)
            outs.append(out)
        return torch.cat(outs, 1), state

    op = memory_op(weights, extra.get("gate"), extra.get("momentum"), norm and norm.weight)
    copies = [t.clone() for t in (*tensors, *weights, *extra.values())]
    wide = {name: t.double() for name, t in extra.items()}
    exact = read(doubled(tensors), doubled(weights), wide, wide_norm(norm) if normed else None, "reference")
    plain = read(tensors, weights, extra, norm, "chunk")
    for isa in each_isa():
        before = calls[op, "cpu", ""]
        compare(read(tensors, weights, extra, norm, "auto"), exact, plain, isa)
        assert calls[op, "cpu", ""] == before + 3, isa
        assert all(map(torch.equal, (*tensors, *weights, *extra.values()), copies)), isa


def test_packed_texts_of_titans_are_single_ones(isa):
    bounds = torch.tensor([0, 5, 5, 6, 13, 40])
    tensors, weights, _ = memory_case(1, 40, 2, torch.float32, 9, 21)
    named = {"gate": between(0.7, 1, 1, 40, 2, dtype=torch.float32)}
    named |= {"momentum": between(0, 0.6, 1, 40, 2, dtype=torch.float32)}
    options = {"mini_batch": 7, "output_final_state": True}
    out, state = ops.memory(*tensors, weights, cu_seqlens=bounds, **options, **named)
    for row, (begin, end) in enumerate(itertools.pairwise(bounds.tolist())):
        cut = {name: t[:, begin:end] for name, t in named.items()}
        alone, final = ops.memory(*(t[:, begin:end] for t in tensors), weights, **options, **cut)
        assert torch.equal(out[:, begin:end], alone)
        for packed, single in zip(tensors_of(state), tensors_of(final), strict=True):
            assert torch.equal(packed[row], single[0])


def test_a_step_of_titans_is_its_text(isa):
    """Steps of the kernel after a text in the form for chunks: the layer's own way to decode."""
    tensors, weights, _ = memory_case(2, 24, 2, torch.float32, 16, 24)
    gate, momentum = between(0.7, 1, 2, 24, 2, dtype=torch.float32), between(0, 0.6, 2, 24, 2, dtype=torch.float32)
    named = {"gate": gate, "momentum": momentum}
    whole, final = ops.memory(*tensors, weights, mini_batch=4, output_final_state=True, **named)
    part = {name: t[:, :9] for name, t in named.items()}
    _, state = ops.memory(*(t[:, :9] for t in tensors), weights, mini_batch=4, output_final_state=True, **part)
    outs = [
        ops.memory_step(
            *(x[:, t] for x in tensors), **{name: x[:, t] for name, x in named.items()}, mini_batch=4, state=state
        )
        for t in range(9, 24)
    ]
    torch.testing.assert_close(torch.stack(outs, 1), whole[:, 9:], rtol=1e-4, atol=1e-4)
    for found, wanted in zip(tensors_of(state), tensors_of(final), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_calls_are_counted_by_the_name_of_the_layer():
    one = torch.ones(1)
    names = [memory_op([one] * 2 * depth, None, None, one) for depth in (1, 2, 3)]
    assert names == ["ttt_linear", "ttt_mlp", "memory"]
    assert [memory_op([one] * 2 * depth, one, one, None) for depth in (1, 2)] == ["titans", "titans"]
    for gate, momentum, norm in ((None, None, None), (one, None, None), (None, one, None), (one, one, one)):
        assert memory_op([one] * 2, gate, momentum, norm) == "memory"


@pytest.mark.parametrize("widths", [(12,), (12, 30)])
@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 17])
@pytest.mark.parametrize("position", [0, 1, 7])
def test_texts_of_any_length_from_any_position(each_isa, widths, tokens, position):
    """Mini-batches of 8; the state too, also where nothing is read."""
    tensors, weights, norm = memory_case(3, position + tokens, 2, torch.float32, *widths)
    options = {"norm": norm, "mini_batch": 8, "output_final_state": True}
    wide = {**options, "norm": wide_norm(norm)}
    first, rest = [t[:, :position] for t in tensors], [t[:, position:] for t in tensors]
    _, state = ops.memory(*first, weights, form="chunk", **options)
    copies = [t.clone() for t in tensors_of(state)]
    _, exact_state = ops.memory(*doubled(first), doubled(weights), form="reference", **wide)
    exact = ops.memory(*doubled(rest), doubled(weights), initial_state=exact_state, form="reference", **wide)
    plain = ops.memory(*rest, weights, initial_state=state, form="chunk", **options)
    for isa in each_isa():
        found = ops.memory(*rest, weights, initial_state=state, **options)
        assert found[0].shape == rest[2].shape
        assert found[1].position.tolist() == [(position + tokens) % 8] * 3
        compare(found, exact, plain, isa)
        for t, copy in zip(tensors_of(state), copies, strict=True):
            assert torch.equal(t, copy), isa


@pytest.mark.parametrize("widths", [(12,), (12, 30)])
def test_sequences_at_different_positions(isa, widths):
    """Of a text, and of a step, which ends the mini-batch of some: only there its first weights change."""
    tensors, weights, norm = memory_case(4, 11, 2, torch.float32, *widths)
    options = {"norm": norm, "mini_batch": 5, "output_final_state": True}
    state = ops.new_memory_state(weights, 4)
    for row, read in enumerate((0, 2, 4, 5)):
        part = [t[row : row + 1, :read] for t in tensors]
        _, one = ops.memory(*part, weights, form="chunk", **options)
        for whole, found in zip(tensors_of(state), tensors_of(one), strict=True):
            whole[row] = found[0]
    rest = [t[:, 5:] for t in tensors]
    exact_state = ops.MemoryState(*(tuple(doubled(part)) for part in state[:3]), state.position.clone())
    exact = ops.memory(*doubled(rest), doubled(weights), initial_state=exact_state, form="reference",
                       **{**options, "norm": wide_norm(norm)})  # fmt: skip
    plain = ops.memory(*rest, weights, initial_state=state, form="chunk", **options)
    compare(ops.memory(*rest, weights, initial_state=state, **options), exact, plain)

    token = [t[:, 6] for t in tensors]
    before, plain_state = own(state), own(state)
    out = ops.memory_step(*token, norm=norm, mini_batch=5, state=state)
    plain = dual_form.step_(*token, None, None, plain_state, norm, 5)
    exact = ops.memory_step(*doubled(token), norm=wide_norm(norm), mini_batch=5, state=exact_state)
    compare((out, state), (exact, exact_state), (plain, plain_state))
    for start, old, weight in zip(state.start, before.start, state.weights, strict=True):
        assert torch.equal(start[[0, 1, 3]], old[[0, 1, 3]])
        assert torch.equal(start[2], weight[2])


@pytest.mark.parametrize("widths", [(9,), (9, 21)])
def test_packed_texts_are_single_ones(isa, widths):
    bounds = torch.tensor([0, 5, 5, 6, 13, 40])
    tensors, weights, norm = memory_case(1, 40, 2, torch.float32, *widths)
    options = {"norm": norm, "mini_batch": 7, "output_final_state": True}
    out, state = ops.memory(*tensors, weights, cu_seqlens=bounds, **options)
    for row, (begin, end) in enumerate(itertools.pairwise(bounds.tolist())):
        alone, final = ops.memory(*(t[:, begin:end] for t in tensors), weights, **options)
        assert torch.equal(out[:, begin:end], alone)
        for packed, single in zip(tensors_of(state), tensors_of(final), strict=True):
            assert torch.equal(packed[row], single[0])


@pytest.mark.parametrize("scale", [1e-4, 1.0, 8.0, 1000.0])
def test_gelu_of_small_and_of_great_numbers(isa, scale):
    """Where GELU is nearly linear, where its slope is neither 0 nor 1, and where it is one of them."""
    tensors, weights, norm = memory_case(1, 40, 2, torch.float32, 16, 64)
    weights[0] *= scale
    options = {"norm": norm, "output_final_state": True}
    found = ops.memory(*tensors, weights, **options)
    wide = {**options, "norm": wide_norm(norm), "form": "reference"}
    compare(found, ops.memory(*doubled(tensors), doubled(weights), **wide),
            ops.memory(*tensors, weights, form="chunk", **options))  # fmt: skip


@pytest.mark.parametrize("widths", [(9,), (9, 21)])
def test_values_that_are_not_finite_stay_in_their_head(isa, widths):
    tensors, weights, norm = memory_case(2, 40, 3, torch.float32, *widths)
    expected, state = ops.memory(*tensors, weights, norm=norm, output_final_state=True)
    tensors[2][0, 35, 1] = torch.nan
    spoilt, spoilt_state = ops.memory(*tensors, weights, norm=norm, output_final_state=True)
    assert spoilt[0, 35:, 1].isnan().all()
    assert all(t[0, 1].isnan().any() for t in spoilt_state.weights)
    spoilt[0, 32:, 1] = expected[0, 32:, 1]  # the tokens before it in its mini-batch may be spoilt too
    assert torch.equal(spoilt, expected)
    for a, b in zip(spoilt_state.weights, state.weights, strict=True):
        others = torch.tensor([[True, False, True], [True, True, True]])
        assert torch.equal(a[others], b[others])


@pytest.mark.parametrize("widths", [(12,), (12, 30)])
def test_strides_and_threads_change_no_bit(widths):
    tensors, weights, norm = memory_case(2, 33, 3, torch.float32, *widths)
    options = {"norm": norm, "output_final_state": True}
    expected = ops.memory(*tensors, weights, **options)
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in tensors]
    turned = [w.transpose(0, 1).contiguous().transpose(0, 1) for w in weights]
    assert not any(t.is_contiguous() for t in (*strided, *turned))
    threads = torch.get_num_threads()
    for count in (1, 3):
        try:
            torch.set_num_threads(count)
            found = ops.memory(*strided, turned, **options)
        finally:
            torch.set_num_threads(threads)
        for a, b in zip(tensors_of(found), tensors_of(expected), strict=True):
            assert torch.equal(a, b)


def test_who_is_served():
    """Memories with and without gradients; none that is float64, and none in long mini-batches."""

    def counted():
        return calls["ttt_mlp", "cpu", ""], calls["titans", "cpu", ""]

    tensors, weights, norm = memory_case(1, 4, 1, torch.float32, 8, 12)
    learned, gate = [w.clone().requires_grad_() for w in weights], torch.full((1, 4, 1), 0.5)
    why, before = "no C++ kernel for torch.float64", counted()
    ops.memory(*tensors, weights, norm=norm, mini_batch=257)
    ops.memory(*tensors, learned, norm=norm, mini_batch=257)
    for given in (weights, learned):
        refused = calls["ttt_mlp", "torch", why]
        ops.memory(*doubled(tensors), doubled(given), norm=wide_norm(norm))
        assert calls["ttt_mlp", "torch", why] == refused + 1
    assert counted() == before
    for given in (weights, learned):
        ops.memory(*tensors, given, norm=norm)
        ops.memory(*tensors, given, gate=gate, momentum=gate)
    assert counted() == (before[0] + 2, before[1] + 2)


@pytest.mark.parametrize("widths", [(8,), (8, 12)])
def test_compiled_calls_equal_eager_ones(widths):
    tensors, weights, norm = memory_case(1, 20, 2, torch.float32, *widths)
    _, state = ops.memory(*tensors, weights, norm=norm, output_final_state=True)

    def run(q, k, v, rate, state):
        out, state = ops.memory(q, k, v, rate, weights, norm=norm, initial_state=state, output_final_state=True)
        state = own(state)
        token = ops.memory_step(q[:, 0], k[:, 0], v[:, 0], rate[:, 0], norm=norm, state=state)
        return out + token.unsqueeze(1), tensors_of(state)

    with torch.no_grad():
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        for a, b in zip(*map(tensors_of, (compiled(*tensors, state), run(*tensors, state))), strict=True):
            assert torch.equal(a, b)


def test_a_step_with_shorter_mini_batches_than_before_ends_the_present_one(isa):
    tensors, weights, norm = memory_case(1, 12, 2, torch.float32, 8, 12)
    _, state = ops.memory(
        *(t[:, :11] for t in tensors), weights, norm=norm, mini_batch=16, output_final_state=True
    )  # fmt: skip
    token = [t[:, 11] for t in tensors]
    plain, wide = own(state), ops.MemoryState(*(tuple(doubled(part)) for part in state[:3]), state.position.clone())
    found = ops.memory_step(*token, norm=norm, mini_batch=8, state=state)
    assert state.position.tolist() == [0]
    exact = ops.memory_step(*doubled(token), norm=wide_norm(norm), mini_batch=8, state=wide)
    compare((found, state), (exact, wide), (dual_form.step_(*token, None, None, plain, norm, 8), plain))
