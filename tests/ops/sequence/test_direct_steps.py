"""Steps that call the C++ kernels without torch's dispatcher: what they compute, what they refuse, and who must not."""

import re

import pytest
import torch
from helpers import assert_close
from sequence_cases import OPS, compare
from torch.utils._python_dispatch import TorchDispatchMode

from ttt.ops import cpu
from ttt.ops import sequence as ops
from ttt.ops.backends import calls
from ttt.ops.sequence import cpu_steps, kernels
from ttt.ops.sequence.states import map_state, own, tensors_of

pytestmark = pytest.mark.skipif(cpu._C is None, reason="the C++ kernels are not built")
TOKENS, SIZE = 7, 4
STEPS = ("gated_delta_rule_step", "memory_step", "large_chunk_step")
"""The functions that choose an op where a step did not call a kernel itself."""
COUNTED = {
    "DeltaNet": "gated_delta_rule_step", "gated delta rule": "gated_delta_rule_step", "TTT-Linear": "ttt_linear_step",
    "TTT-MLP": "ttt_mlp_step", "Titans": "titans_step", "Titans, two layers": "titans_step",
    "memory with a gate": "memory_step", "memory with momentum": "memory_step", "LaCT": "lact_step",
    "LaCT, plain": "lact_step", "In-Place TTT": "in_place_ttt_step",
}  # fmt: skip


def case(name, dtype=torch.float32, rows=3):
    """The op, tokens in ``dtype`` with rates and gates in float32, and a float32 state of rows at two positions."""
    op = OPS[name]()
    tensors = [t.to(dtype) if n < 3 else t for n, t in enumerate(op.inputs(rows, TOKENS, torch.float32))]
    state = op.begin(rows, torch.float32)
    if hasattr(state, "position"):
        state.position[1] = 1
    return op, tensors, state


def wide_of(state):
    return map_state(lambda t: t.double() if t.is_floating_point() else t.clone(), state)


def read(op, tensors, state):
    return torch.stack([op.step(*(t[:, n] for t in tensors), size=SIZE, state=state) for n in range(TOKENS)], 1)


def forbid(monkeypatch):
    """Lets no step reach the choice of an op."""

    def fail(*_):
        raise AssertionError("the step went through torch's dispatcher")

    for step in STEPS:
        monkeypatch.setattr(kernels, step, fail)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_outputs_and_states(isa, monkeypatch, name, dtype):
    """Without gradients no op is called. The tokens are parts of a text: sequences are apart from each other."""
    op, tensors, state = case(name, dtype)
    exact, through_ops, plain = wide_of(state), own(state), own(state)
    with monkeypatch.context() as without:
        without.setattr(cpu_steps, "_C", None)
        for step in STEPS:
            without.setattr(kernels, step, lambda *_: None)
        in_torch = read(op, tensors, plain)
    again = read(op, tensors, through_ops)
    wanted = read(op, [t.double() for t in tensors], exact)
    versions = [t._version for t in tensors_of(state)]
    before, copies = calls[COUNTED[name], "cpu", ""], [t.clone() for t in tensors]
    forbid(monkeypatch)
    with torch.no_grad():
        found = read(op, tensors, state)
    assert calls[COUNTED[name], "cpu", ""] == before + TOKENS
    assert found.dtype == dtype
    assert all(map(torch.equal, tensors, copies))
    for a, b in zip((found, *tensors_of(state)), (again, *tensors_of(through_ops)), strict=True):
        assert torch.equal(a, b)
    if name == "LaCT":  # Newton-Schulz steps carry rounding into all digits of what follows a chunk
        first = SIZE - 1  # of a row, which began at its chunk's second token
        assert_close(found[:, :first], wanted[:, :first], in_torch[:, :first], "o")
    else:
        compare((found, state), (wanted, exact), (in_torch, plain))
    changed = [a != t._version for a, t in zip(versions, tensors_of(state), strict=True)]
    kept = len(state.velocity) + len(state.norms) if isinstance(state, ops.LargeChunkState) else 0
    assert sum(changed) >= len(changed) - kept


def test_a_text_of_projections_of_which_sequences_are_strided(monkeypatch):
    """q, k and v as layers have them, parts of one projection; rates that all weights share."""
    mixed, rate = torch.randn(2, 1, 3, 2, 5), torch.rand(2, 1, 2, 1).expand(2, 1, 2, 3)
    q, k, v = (t[:, 0] for t in mixed.unbind(2))
    assert not q.is_contiguous()
    weights = [0.4 * torch.randn(2, *sizes) for sizes in ((5, 6), (6, 5), (5, 6))]
    state = ops.new_large_chunk_state(weights, 2)
    exact = wide_of(state)
    wanted = ops.lact_step(*(t.double() for t in (q, k, v, rate[:, 0])), state=exact)
    forbid(monkeypatch)
    with torch.no_grad():
        found = ops.lact_step(q, k, v, rate[:, 0], state=state)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    for a, b in zip(tensors_of(state), tensors_of(exact), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)


def refused(name, change, **options):
    op, tensors, state = case(name)
    token = [t[:, 0] for t in tensors]
    change(token)
    copies = own(state)
    with torch.no_grad(), pytest.raises((TypeError, ValueError)) as raised:
        op.step(*token, size=options.get("size", SIZE), state=options.get("state", state))
    assert all(map(torch.equal, tensors_of(state), tensors_of(copies)))
    return str(raised.value)


@pytest.mark.parametrize("name", OPS)
def test_wrong_tokens_are_named_and_change_no_bit(name):
    """The checks of the ops speak, also where none of them runs before a kernel."""

    def changed(n, make):
        return lambda token: token.__setitem__(n, make(token[n]))

    number = {"LaCT": "rates", "LaCT, plain": "rates", "DeltaNet": "beta", "gated delta rule": "beta"}
    number = number.get(name, "rate")
    for n, says in ((1, "k must have the shape of q"), (2, "v must be")):
        assert says in refused(name, changed(n, lambda t: t[:, :1]))
    for n in range(3):
        assert f"{'qkv'[n]} must be" in refused(name, changed(n, lambda t: t[0]))
        assert f"{'qkv'[n]} must be" in refused(name, changed(n, lambda t: t.int()))
    assert "q must be (B, H, D), got ()" in refused(name, changed(0, lambda t: t[0, 0, 0]))
    assert "q must be (B, H, D) with D of at least 1" in refused(name, changed(0, lambda t: t[..., :0]))
    assert "k must be a tensor, got NoneType" in refused(name, changed(1, lambda t: None))
    assert "k must have the shape of q" in refused(name, changed(1, lambda t: t[..., :3]))
    for make in (lambda t: t[:1], lambda t: t.unsqueeze(-1), lambda t: t.long(), lambda t: 0.5):
        assert f"{number} must be" in refused(name, changed(3, make))


@pytest.mark.parametrize("name", [name for name in OPS if "delta" not in name.lower()])
def test_wrong_sizes_and_states_are_named(name):
    def same(token):
        pass

    for size, says in (
        (0, "must be at least 1, got 0"),
        (2.0, "must be a whole number, got float 2.0"),
        (True, "bool"),
        (1 << 64, "must be at most 9223372036854775807, got 18446744073709551616"),
        (-(1 << 64), "must be at least 1"),
    ):
        assert says in refused(name, same, size=size)
    state = case(name)[2]
    wrong = [
        state._replace(weights=tuple(w.double() for w in state.weights)),
        state._replace(weights=state.weights[:-1]),
        state._replace(weights=tuple(w[:2] for w in state.weights)),
        state._replace(velocity=(*state.velocity, state.weights[0])),
        state._replace(position=state.position.int()),
        state._replace(position=state.position[:2]),
        tuple(state),
        None,
    ]
    for other in wrong:
        assert re.search("state must|weights? (1 )?must", refused(name, same, state=other))


def test_tensors_that_kernels_do_not_read_go_through_the_op():
    """Rates in float64, and a position that is not contiguous: the state is changed all the same."""
    _, tensors, state = case("TTT-Linear")
    norm = ops.Norm(torch.ones(2, 5).bfloat16(), torch.zeros(2, 5).bfloat16())
    spread = state._replace(position=torch.stack([state.position, state.position], 1)[:, 0])
    plain = own(state)
    for n in range(TOKENS):
        q, k, v, rate = (t[:, n] for t in tensors)
        with torch.no_grad():
            found = ops.memory_step(q, k, v, rate.double(), norm=norm, mini_batch=SIZE, state=spread)
            wanted = ops.memory_step(
                q, k, v, rate, norm=ops.Norm(*(t.float() for t in norm[:2])), mini_batch=SIZE, state=plain
            )
        assert torch.equal(found, wanted)
        assert all(map(torch.equal, tensors_of(spread), tensors_of(plain)))


class Seen(TorchDispatchMode):
    """Remembers the names of the ops that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "seen"),
    [("gated delta rule", "delta_rule_step"), ("TTT-MLP", "memory_step"), ("In-Place TTT", "large_chunk_step")],
)
def test_dispatch_modes_see_the_op(name, seen):
    op, tensors, state = case(name)
    copies = own(state)
    with torch.no_grad():
        with Seen() as mode:
            found = read(op, tensors, state)
        assert torch.equal(found, read(op, tensors, copies))
    assert mode.names.count(f"ttt.sequence_{seen}.default") == TOKENS
    assert all(map(torch.equal, tensors_of(state), tensors_of(copies)))


@pytest.mark.parametrize("name", ["gated delta rule", "TTT-Linear", "LaCT"])
def test_subclasses_of_tensors_go_through_the_op(name):
    class Named(torch.Tensor):
        pass

    op, tensors, state = case(name)
    copies = own(state)
    with torch.no_grad():
        found = read(op, [t.as_subclass(Named) for t in tensors], state)
        assert torch.equal(found.as_subclass(torch.Tensor), read(op, tensors, copies))
    assert all(map(torch.equal, tensors_of(state), tensors_of(copies)))


def test_gradients_are_refused_where_they_are_wanted():
    op, tensors, state = case("TTT-Linear")
    token = [t[:, 0] for t in tensors]
    token[0].requires_grad_()
    with pytest.raises(RuntimeError, match="memory_step has no derivative"):
        op.step(*token, size=SIZE, state=state)


def test_threads_share_the_columns_of_a_single_head():
    """A pretrained weight has one head: its columns are split among threads, which changes no bit."""
    state = ops.new_large_chunk_state([torch.randn(1, 300, 331)], 1)
    q, k, v, rate = torch.randn(1, 1, 300), torch.randn(1, 1, 300), torch.randn(1, 1, 331), torch.rand(1, 1)
    copies, threads = own(state), torch.get_num_threads()
    with torch.no_grad():
        found = ops.in_place_ttt_step(q, k, v, rate, state=state)
        try:
            torch.set_num_threads(3)
            again = ops.in_place_ttt_step(q, k, v, rate, state=copies)
        finally:
            torch.set_num_threads(threads)
    assert torch.equal(found, again)
    assert all(map(torch.equal, tensors_of(state), tensors_of(copies)))
    torch.testing.assert_close(found[0], q[0] @ state.weights[0][0, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.sums[0][0, 0], k[0].mT @ (rate * v[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_no_sequences(monkeypatch, name):
    """As where all of a server's users have gone."""
    op, tensors, state = case(name, rows=2)
    none = map_state(lambda t: t[:0], state)
    forbid(monkeypatch)
    with torch.no_grad():
        out = op.step(*(t[:0, 0] for t in tensors), size=SIZE, state=none)
    assert out.shape == (0, *tensors[2].shape[2:])


@pytest.mark.parametrize("name", OPS)
def test_negative_views_have_their_values(name):
    """Each tensor of a token and of the state in turn, as a view whose numbers in memory have the other sign."""
    op, tensors, begun = case(name)
    token = [t[:, 0] for t in tensors]
    expected = own(begun)
    with torch.no_grad():
        wanted = op.step(*token, size=SIZE, state=expected)
        for n, t in enumerate(token):
            state = own(begun)
            given = [*token[:n], torch._neg_view(-t), *token[n + 1 :]]
            assert given[n].is_neg()
            assert torch.equal(given[n], t)
            assert torch.equal(op.step(*given, size=SIZE, state=state), wanted)
            assert all(map(torch.equal, tensors_of(state), tensors_of(expected)))
        state = map_state(lambda t: torch._neg_view(-t) if t.is_floating_point() else t.clone(), begun)
        if not isinstance(state, ops.LargeChunkState):
            with pytest.raises(ValueError, match=r"state.* must be contiguous and no negative view"):
                op.step(*token, size=SIZE, state=state)
            assert all(map(torch.equal, tensors_of(state), tensors_of(begun)))
            return
        torch.testing.assert_close(op.step(*token, size=SIZE, state=state), wanted, rtol=1e-4, atol=1e-5)
        for a, b in zip(tensors_of(state), tensors_of(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_given_weights_and_states_keep_their_numbers(name):
    """A state that was made from them, for one sequence or by a text of any form, is changed by steps; they are not."""
    op = OPS[name]()
    text, token = op.inputs(1, SIZE + 1, torch.float32), [t[:, 0] for t in op.inputs(1, 1, torch.float32)]
    begun = op.begin(1, torch.float32)
    weights = {} if isinstance(begun, torch.Tensor) else {"weights": [w[0].clone() for w in begun.weights]}
    if name == "In-Place TTT":
        weights = {"weight": weights["weights"][0]}
    given = [*(weights.get("weights") or weights.values()), *tensors_of(begun)]
    copies = [t.clone() for t in given]
    states = []
    if "weights" in weights and len(weights["weights"]) == 3:
        states.append(ops.new_large_chunk_state(weights["weights"], 1, bool(begun.velocity), norms=True))
    elif "weights" in weights:
        states.append(ops.new_memory_state(weights["weights"], 1, bool(begun.velocity)))
    elif weights:
        states.append(ops.new_large_chunk_state([weights["weight"]], 1))
    with torch.no_grad():
        for form in ("auto", "chunk", "reference"):
            for tokens in (0, 1, SIZE + 1):
                for first in (None, begun):
                    options = {"initial_state": first, "output_final_state": True, "form": form, **weights}
                    states.append(op.run(*(t[:, :tokens] for t in text), size=SIZE, **options)[1])
        for state in states:
            for _ in range(SIZE + 1):
                op.step(*token, size=SIZE, state=state)
    assert all(map(torch.equal, given, copies))


@pytest.mark.parametrize("name", ["gated delta rule", "TTT-Linear", "LaCT", "In-Place TTT"])
@pytest.mark.parametrize("table", [None, 3])
def test_a_torch_without_the_table_takes_the_torch_form(monkeypatch, name, table):
    """Nothing is read then, and `ttt.info` says why: there is no table, or it is not one."""
    types = type("Tensor", (), {} if table is None else {"__dlpack_c_exchange_api__": table}), torch.nn.Parameter
    op, tensors, state = case(name)
    copies = own(state)
    with torch.no_grad():
        wanted = read(op, tensors, copies)
        try:
            why = cpu._C.read_tensors(*types)
            assert "__dlpack_c_exchange_api__" in why
            monkeypatch.setattr(cpu_steps, "UNREAD", why)
            before = calls[COUNTED[name], "torch", why]
            found = read(op, tensors, state)
        finally:
            assert not cpu._C.read_tensors(torch.Tensor, torch.nn.Parameter)
    assert calls[COUNTED[name], "torch", why] == before + TOKENS
    if name != "LaCT":
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
