"""The C++ kernels that train the delta rule and memories: gradients against float64, and which calls they serve."""

import pytest
import torch
from helpers import assert_close
from sequence_cases import between, doubled, memory_case
from test_sequence_kernels import inputs

from ttt.ops import cpu
from ttt.ops import sequence as ops
from ttt.ops.backends import calls
from ttt.ops.sequence.states import MemoryState, tensors_of

pytestmark = pytest.mark.skipif(cpu._C is None, reason="the C++ kernels are not built")


def leaves(tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def weight_of(out):
    """Random numbers of the shape of ``out``, as float64, which its dtype holds exactly: a gradient is not rounded."""
    return torch.randn(out.shape).to(out.dtype).double()


def gradients(run, tensors, weights):
    """The outputs of ``run``, and the gradients of their sum with these weights by the tensors; None gives none."""
    given = leaves(tensors)
    outs = run(*given)
    total = sum((o.double() * w).sum() for o, w in zip(outs, weights, strict=True))
    found = torch.autograd.grad(total, [t for t in given if t is not None], materialize_grads=True)
    return [*(o.detach() for o in outs), *found]


def compare_all(found, exact, plain, isa):
    for n, (a, b, c) in enumerate(zip(found, exact, plain, strict=True)):
        assert a.dtype == c.dtype
        assert_close(a, b, c, f"tensor {n} of {isa}")


def delta_runs(bounds=None):
    def run(form):
        def of(q, k, v, beta, g, state):
            return ops.gated_delta_rule(
                q, k, v, beta, g, initial_state=state, output_final_state=True, cu_seqlens=bounds, form=form
            )

        return of

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "gated"), [
    ((1, 1, 4, 3, 5), True), ((2, 33, 3, 5, 7), False), ((1, 70, 2, 64, 64), True), ((2, 32, 1, 19, 130), True),
    ((1, 300, 1, 40, 24), True), ((1, 31, 1, 64, 16), False), ((2, 0, 2, 8, 8), True),
])  # fmt: skip
def test_gradients_of_the_delta_rule(each_isa, dtype, shape, gated):
    q, k, v, beta, g = inputs(*shape, dtype)
    tensors = (q, k, v, beta, g if gated else None, torch.randn(shape[0], shape[2], *shape[3:]))
    weights = weight_of(v), torch.randn(tensors[-1].shape).double()
    run = delta_runs()
    exact = gradients(run("reference"), doubled(tensors), weights)
    plain = gradients(run("chunk"), tensors, weights)
    for isa in each_isa():
        before = calls["gated_delta_rule_backward", "cpu", ""]
        compare_all(gradients(run("auto"), tensors, weights), exact, plain, isa)
        assert calls["gated_delta_rule_backward", "cpu", ""] == before + 1, isa


def test_gradients_of_packed_texts_of_the_delta_rule(each_isa):
    lengths = [5, 0, 1, 300, 256, 31]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v, beta, g = inputs(1, int(bounds[-1]), 2, 9, 6, torch.float32)
    tensors = (q, k, v, beta, g, torch.randn(len(lengths), 2, 9, 6))
    weights = weight_of(v), torch.randn(tensors[-1].shape).double()
    run = delta_runs(bounds)
    exact = gradients(run("reference"), doubled(tensors), weights)
    plain = gradients(run("chunk"), tensors, weights)
    for isa in each_isa():
        compare_all(gradients(run("auto"), tensors, weights), exact, plain, isa)


def test_a_gate_that_is_closed(isa):
    """A logarithm of -inf: what lies before gets no gradient from what comes later, and nothing is NaN."""
    q, k, v, beta, g = inputs(1, 80, 1, 8, 8, torch.float32)
    g[:, 40] = -torch.inf
    given = leaves((q, k, v, beta, g))
    out, _ = ops.gated_delta_rule(*given)
    found = torch.autograd.grad(out[:, 40:].sum(), given)
    for t in found:
        assert t.isfinite().all()
        assert not t[:, :40].abs().max() > 1e-5


def test_some_gradients_only():
    q, k, v, beta, g = inputs(1, 40, 2, 8, 8, torch.float32)
    all_of_them = leaves((q, k, v, beta, g))
    full = torch.autograd.grad(ops.gated_delta_rule(*all_of_them)[0].sum(), all_of_them)
    for n in range(5):
        some = [t.detach() for t in (q, k, v, beta, g)]
        some[n].requires_grad_()
        (alone,) = torch.autograd.grad(ops.gated_delta_rule(*some)[0].sum(), [some[n]])
        assert torch.equal(alone, full[n])


def memory_runs(case, bounds=None):
    """``run(form)`` is the memory of ``case`` as a function of its tensors."""
    norm, mini_batch, layers = case

    def run(form):
        def of(q, k, v, rate, gate, momentum, norm_weight, norm_bias, *states):
            weights, start, velocity = (states[n : n + 2 * layers] for n in range(0, 6 * layers, 2 * layers))
            state = None
            if start:
                state = MemoryState(weights, start, velocity, torch.zeros(len(start[0]), dtype=torch.int64))
            out, final = ops.memory(
                q, k, v, rate, [w[0] for w in weights], gate=gate, momentum=momentum,
                norm=norm and ops.Norm(norm_weight, norm_bias, norm.eps), mini_batch=mini_batch, scale=0.7,
                initial_state=state, output_final_state=True, cu_seqlens=bounds, form=form,
            )  # fmt: skip
            return [out, *tensors_of(final)[:-1]]

        return of

    return run


def memory_tensors(shape, mini_batch, dtype, middles=(), rows=None, begun=True, normed=True, gated=False, moving=False):
    """The tensors of a memory with layers of ``middles`` in between, and its case for `memory_runs`.

    Args:
        shape: B, T, H, D.
        rows: how many sequences there are; B by default.
        begun: whether a state is given; if not, the sequences are new.
        normed, gated, moving: whether it has an inner norm, a gate and a momentum.
    """
    batch, tokens, heads, width = shape
    tensors, weights, norm = memory_case(batch, tokens, heads, dtype, width, *middles)
    rows = batch if rows is None else rows
    states = [w.expand(rows, *w.shape).contiguous() for w in weights] if begun else [w.unsqueeze(0) for w in weights]
    begin = [w.clone() for w in states] if begun else []
    begin += [0.1 * torch.randn(w.shape) for w in states] if begun and moving else []
    factors = [between(low, high, *shape[:3], dtype=torch.float32) for low, high in ((0.7, 1), (0, 0.8))]
    factors = [f if given else None for f, given in zip(factors, (gated, moving), strict=True)]
    case = (norm if normed else None, mini_batch, len(weights) // 2)
    return (*tensors, *factors, *(norm[:2] if normed else (None, None)), *states, *begin), case


def memory_weights(tensors, case, rows):
    """Random numbers of the shapes of what `memory_runs` returns."""
    shapes = [(rows, *t.shape[1:]) for t in tensors[8 : 8 + 2 * case[2]]]
    parts = 2 if tensors[5] is None else 3
    return [weight_of(tensors[0]), *(torch.randn(shape).double() for shape in shapes * parts)]


def check_memory(each_isa, op, tensors, case, rows, bounds=None):
    """The kernels' outputs, final states and gradients, of one call each, against the reference in float64."""
    weights, run = memory_weights(tensors, case, rows), memory_runs(case, bounds)
    exact = gradients(run("reference"), doubled(tensors), weights)
    plain = gradients(run("chunk"), tensors, weights)
    for isa in each_isa():
        before = [calls[name, "cpu", ""] for name in (op, f"{op}_backward")]
        compare_all(gradients(run("auto"), tensors, weights), exact, plain, isa)
        assert [calls[name, "cpu", ""] for name in (op, f"{op}_backward")] == [n + 1 for n in before], isa


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "mini_batch"), [
    ((1, 1, 2, 5), 4), ((2, 33, 2, 20), 7), ((1, 64, 1, 64), 16), ((1, 63, 1, 32), 16), ((1, 65, 2, 24), 16),
    ((1, 40, 1, 16), 1), ((1, 100, 1, 64), 64), ((2, 0, 2, 20), 4), ((1, 15, 1, 20), 16),
])  # fmt: skip
def test_gradients_of_ttt_linear(each_isa, dtype, shape, mini_batch):
    check_memory(each_isa, "ttt_linear", *memory_tensors(shape, mini_batch, dtype), shape[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "middle", "mini_batch"), [
    ((1, 1, 2, 24), 40, 16), ((2, 33, 2, 20), 37, 7), ((1, 64, 1, 64), 256, 16), ((1, 63, 1, 24), 96, 16),
    ((1, 65, 2, 24), 33, 16), ((1, 40, 1, 16), 20, 1), ((1, 100, 1, 64), 128, 64), ((2, 0, 2, 20), 24, 4),
    ((1, 300, 1, 20), 24, 16),
])  # fmt: skip
def test_gradients_of_ttt_mlp(each_isa, dtype, shape, middle, mini_batch):
    """Texts that end before, at and after the ends of mini-batches and of the pieces that are read again."""
    check_memory(each_isa, "ttt_mlp", *memory_tensors(shape, mini_batch, dtype, (middle,)), shape[0])


def test_gradients_of_a_memory_of_three_layers(each_isa):
    check_memory(each_isa, "memory", *memory_tensors((1, 37, 2, 20), 8, torch.float32, (24, 17)), 1)


@pytest.mark.parametrize("middles", [(), (33,)])
def test_gradients_of_a_memory_without_a_norm(each_isa, middles):
    check_memory(each_isa, "memory", *memory_tensors((2, 37, 2, 20), 8, torch.float32, middles, normed=False), 2)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_gradients_do_not_depend_on_the_default_dtype(default):
    tensors, case = memory_tensors((2, 33, 2, 20), 8, torch.float32, (24,))
    q, k, v, beta, g = inputs(2, 40, 2, 8, 8, torch.float32)
    cases = (memory_runs(case), tensors), (delta_runs(), (q, k, v, beta, g, torch.randn(2, 2, 8, 8)))
    for run, given in cases:
        with torch.no_grad():
            weights = [torch.randn(out.shape).double() for out in run("auto")(*given)]
        expected = gradients(run("auto"), given, weights)
        before = torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            found = gradients(run("auto"), given, weights)
        finally:
            torch.set_default_dtype(before)
        assert [t.dtype for t in found] == [t.dtype for t in expected]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


TITANS = {"normed": False, "gated": True, "moving": True}
KINDS = [("ttt_linear", (), {}), ("ttt_mlp", (24,), {}), ("titans", (), TITANS), ("titans", (24,), TITANS)]
"""Names under which calls are counted, layers in between, and options of `memory_tensors`."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "middles", "mini_batch"), [
    ((1, 1, 2, 24), (), 16), ((2, 33, 2, 20), (), 7), ((1, 64, 1, 64), (), 16), ((1, 63, 1, 16), (), 16),
    ((1, 65, 2, 24), (33,), 16), ((1, 40, 1, 16), (), 1), ((1, 100, 1, 64), (), 64), ((2, 0, 2, 20), (24,), 4),
    ((1, 300, 1, 20), (), 16), ((2, 33, 2, 20), (24, 17), 7),
])  # fmt: skip
def test_gradients_of_titans(each_isa, dtype, shape, middles, mini_batch):
    check_memory(each_isa, "titans", *memory_tensors(shape, mini_batch, dtype, middles, **TITANS), shape[0])


@pytest.mark.parametrize("middles", [(), (24,)])
@pytest.mark.parametrize(("normed", "gated", "moving"), [
    (True, True, False), (True, False, True), (True, True, True), (False, True, False), (False, False, True),
])  # fmt: skip
def test_gradients_with_a_gate_or_a_momentum(each_isa, middles, normed, gated, moving):
    options = {"normed": normed, "gated": gated, "moving": moving}
    check_memory(each_isa, "memory", *memory_tensors((1, 37, 2, 20), 8, torch.float32, middles, **options), 1)


def test_gates_and_momenta_that_are_zero(each_isa):
    """What lies before a closed gate gets no gradient from what comes later, and no factor is divided by another."""
    tensors, case = memory_tensors((1, 37, 2, 20), 8, torch.float32, **TITANS)
    for factor in tensors[4:6]:
        factor[:, 11] = 0.0
        factor[:, 20, 0] = 0.0
    check_memory(each_isa, "titans", tensors, case, 1)


@pytest.mark.parametrize(("op", "middles", "options"), KINDS)
def test_gradients_of_packed_texts_of_memories(each_isa, op, middles, options):
    lengths = [5, 0, 1, 70, 64, 3]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    tensors, case = memory_tensors((1, int(bounds[-1]), 2, 20), 4, torch.float32, middles, len(lengths), **options)
    check_memory(each_isa, op, tensors, case, len(lengths), bounds)


@pytest.mark.parametrize(("middles", "options"), [kind[1:] for kind in KINDS])
def test_a_packed_text_gets_the_gradients_of_a_single_one(middles, options):
    """To the bit: of the norm, whose gradients are sums over the texts, those of texts of which one is empty."""
    tensors, case = memory_tensors((1, 37, 2, 20), 4, torch.float32, middles, 2, **options)
    weights = memory_weights(tensors, case, 2)
    packed = gradients(memory_runs(case, torch.tensor([0, 37, 37]))("auto"), tensors, weights)
    alone = [t if t is None or n < 8 else t[:1] for n, t in enumerate(tensors)]
    single = gradients(memory_runs(case)("auto"), alone, [w[:1] for w in weights])
    assert len(packed) == len(single)
    for a, b in zip(packed, single, strict=True):
        assert torch.equal(a[:1] if a.shape != b.shape else a, b)


@pytest.mark.parametrize(("op", "middles", "options"), KINDS)
def test_gradients_of_the_first_weights(each_isa, op, middles, options):
    """Those of new sequences, of which all begin with them."""
    tensors, case = memory_tensors((3, 37, 2, 20), 8, torch.float32, middles, begun=False, **options)
    check_memory(each_isa, op, tensors, case, 3)


def test_second_derivatives_are_those_of_the_torch_form():
    q, k, v, beta, g = inputs(1, 40, 2, 8, 8, torch.float32)
    runs = [(delta_runs(), (q, k, v, beta, g, torch.randn(1, 2, 8, 8)))]
    for _, middles, options in KINDS[:3]:
        tensors, case = memory_tensors((1, 21, 2, 20), 8, torch.float32, middles, **options)
        runs.append((memory_runs(case), tensors))
    for run, given in runs:
        found = []
        for form in ("auto", "chunk"):
            leaf = leaves(given)
            by = [t for t in leaf if t is not None]
            first = torch.autograd.grad(run(form)(*leaf)[0].square().sum(), by, create_graph=True, allow_unused=True)
            used = [t for t in first if t is not None]
            found.append(torch.autograd.grad(sum(t.square().sum() for t in used), by, materialize_grads=True))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@pytest.mark.parametrize("made", ["q", "v", "beta"])
def test_inputs_that_are_made_from_one_another_have_the_derivatives_of_their_own_shares(made):
    """Also where they can be differentiated again; compared with the torch form in float64."""
    drawn = *inputs(1, 40, 2, 8, 8, torch.float32), torch.randn(1, 40, 2, 8), torch.randn(1, 2, 8, 8)
    found = []
    for form, dtype in (("chunk", torch.float64), ("auto", torch.float32)):
        q, k, v, beta, g, weight, state = (t.to(dtype) for t in drawn)
        leaf = k.clone().requires_grad_()
        q, v = (leaf if made == "q" else q), (2 * leaf + v if made == "v" else v)
        beta = leaf.sum(-1).sigmoid() if made == "beta" else beta
        out, _ = delta_runs()(form)(q, leaf, v, beta, g, state)
        (first,) = torch.autograd.grad((out * weight).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        found.append([first.detach().double(), second.double()])
    for a, b in zip(*found, strict=True):
        assert_near(b, a)


@pytest.mark.parametrize(("op", "middles", "options"), KINDS[:3])
def test_layers_have_one_first_derivative(op, middles, options):
    """By the weights that memories begin with and are compared with: the state has them twice."""
    tensors, case = memory_tensors((2, 37, 2, 20), 8, torch.float32, middles, begun=False, **options)
    weights = None
    found = []
    for again in (False, True):
        given = leaves(tensors)
        outs = memory_runs(case)("auto")(*given)
        weights = weights or [torch.randn_like(out) for out in outs]
        total = sum((out * weight).sum() for out, weight in zip(outs, weights, strict=True))
        by = [t for t in given if t is not None]
        found.append(torch.autograd.grad(total, by, create_graph=again, materialize_grads=True))
    for a, b in zip(*found, strict=True):
        assert_near(b.detach(), a)


def assert_near(found, exact):
    torch.testing.assert_close(found.double(), exact.double(), rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


def all_runs():
    """A run of each kind of op that is trained, with its tensors."""
    q, k, v, beta, g = inputs(1, 21, 2, 8, 8, torch.float32)
    runs = [(delta_runs(), (q, k, v, beta, g, torch.randn(1, 2, 8, 8)))]
    for _, middles, options in KINDS:
        tensors, case = memory_tensors((1, 21, 2, 20), 8, torch.float32, middles, **options)
        runs.append((memory_runs(case), tensors))
    return runs


def test_second_derivatives_where_the_query_alone_has_a_gradient():
    """A gradient penalty: the final states, which no query reaches, have no gradient then."""
    for run, (q, *others) in all_runs():
        found = []
        for form in ("auto", "chunk"):
            leaf = q.clone().requires_grad_()
            (first,) = torch.autograd.grad(run(form)(leaf, *others)[0].square().sum(), leaf, create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), leaf)[0])
        a, b = found
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_several_gradients_at_once():
    """By vmap over the gradients of the output, as `torch.autograd.functional.jacobian` takes them."""
    for run, given in all_runs():
        leaf = leaves(given)
        by = [t for t in leaf if t is not None]
        out = run("auto")(*leaf)[0]
        d_outs = torch.randn(3, *out.shape)
        options = {"retain_graph": True, "materialize_grads": True}
        found = torch.autograd.grad(out, by, d_outs, is_grads_batched=True, **options)
        for n, d_out in enumerate(d_outs):
            for a, b in zip(found, torch.autograd.grad(out, by, d_out, **options), strict=True):
                torch.testing.assert_close(a[n], b, rtol=1e-3, atol=1e-4 * (1e-3 + float(b.abs().max())))


def test_negative_views_have_their_values_in_training_and_texts():
    for run, given in all_runs():
        for n, t in enumerate(given[:4]):
            changed = [*given[:n], torch._neg_view(-t), *given[n + 1 :]]
            for a, b in zip(run("auto")(*changed), run("auto")(*given), strict=True):
                assert torch.equal(a, b)
            q, q_too = (ts[0 if n else 1].clone().requires_grad_() for ts in (given, given))
            at = 0 if n else 1
            outs = [run("auto")(*ts[:at], leaf, *ts[at + 1 :])[0] for ts, leaf in ((changed, q), (given, q_too))]
            d_out = torch.randn_like(outs[0])
            a, b = (torch.autograd.grad(o, leaf, d)[0] for o, leaf, d in (
                (outs[0], q, torch._neg_view(-d_out)), (outs[1], q_too, d_out)))  # fmt: skip
            assert torch.equal(a, b)


def test_transforms_of_torch_func_take_the_torch_form():
    """Gradients of each sequence of a batch at once."""
    q, k, v, beta, g = inputs(3, 10, 2, 8, 8, torch.float32)
    tensors, weights, norm = memory_case(3, 10, 2, torch.float32, 20)
    _, two_layers, _ = memory_case(3, 10, 2, torch.float32, 20, 24)

    def delta(q, *others):
        out, _ = ops.gated_delta_rule(q[None], *(t[None] for t in others))
        return out.square().sum()

    def linear(q, *others):
        out, _ = ops.ttt_linear(q[None], *(t[None] for t in others), *weights, norm, mini_batch=4)
        return out.square().sum()

    def mlp(q, *others):
        out, _ = ops.ttt_mlp(q[None], *(t[None] for t in others), two_layers, norm, mini_batch=4)
        return out.square().sum()

    for op, given in ((delta, (q, k, v, beta, g)), (linear, tensors), (mlp, tensors)):
        found = torch.func.vmap(torch.func.grad(op))(*given)
        for n in range(3):
            (row, *others) = (t[n] for t in given)
            leaf = row.clone().requires_grad_()
            (exact,) = torch.autograd.grad(op(leaf, *others), leaf)
            torch.testing.assert_close(found[n], exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize(("middles", "options"), [kind[1:] for kind in KINDS])
def test_the_op_of_memories_is_as_torch_requires(middles, options):
    """Its schema, its shapes without numbers, and its derivative under tracing."""
    given, (norm, mini_batch, layers) = memory_tensors((1, 21, 2, 8), 4, torch.float32, middles, **options)
    tokens, states = leaves(given[:8]), leaves(given[8:])
    parts = [states[n : n + 2 * layers] for n in range(0, 6 * layers, 2 * layers)]
    arguments = (*tokens, norm.eps if norm else 0.0, *parts, None, mini_batch, 1.0)
    torch.library.opcheck(torch.ops.ttt.sequence_memory_in_training.default, arguments)


@pytest.mark.parametrize(("op", "middles"), [kind[:2] for kind in KINDS[:2]])
def test_within_a_mini_batch_the_torch_form_trains(op, middles):
    (q, k, v, rate), weights, norm = memory_case(1, 10, 1, torch.float32, 20, *middles)
    options = {"norm": norm, "mini_batch": 4, "output_final_state": True}
    with torch.no_grad():
        _, state = ops.memory(q, k, v, rate, weights, **options)
    assert state.position.tolist() == [2]
    before = calls[op, "cpu", ""]
    given = leaves((q, k, v, rate))
    out, _ = ops.memory(*given, weights, initial_state=state, **options)
    exact, _ = ops.memory(*leaves((q, k, v, rate)), weights, initial_state=state, form="chunk", **options)
    assert torch.equal(out, exact)
    assert calls[op, "cpu", ""] == before


def test_compiled_training_equals_eager():
    q, k, v, beta, g = inputs(1, 20, 2, 8, 8, torch.float32)
    (mq, mk, mv, rate), weights, norm = memory_case(1, 20, 2, torch.float32, 8)
    _, two_layers, _ = memory_case(1, 20, 2, torch.float32, 8, 12)

    def run(q, k, v, beta, g, weight, bias, *two_layers):
        out, state = ops.gated_delta_rule(q, k, v, beta, g, output_final_state=True)
        learnt, _ = ops.ttt_linear(mq + q, mk, mv, rate, weight, bias, norm, mini_batch=8)
        learnt, _ = ops.ttt_mlp(learnt, mk, mv, rate, two_layers, norm, mini_batch=8)
        learnt, _ = ops.titans(learnt, mk, mv, rate, 0.2 * beta, 0.5 * beta, (weight, bias), mini_batch=8)
        return out.sum() + state.square().sum() + learnt.square().sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    found = []
    for function in (run, compiled):
        given = leaves((q, k, v, beta, g, *weights, *two_layers))
        found.append(torch.autograd.grad(function(*given), given))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
