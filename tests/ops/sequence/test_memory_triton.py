"""The Triton kernels of memories that learn (in the interpreter, without a GPU) against the float64 recurrence."""

import contextlib
import itertools

import pytest
import torch
from sequence_cases import between, compare, doubled, memory_case, wide_norm

from ttt.ops import sequence as ops
from ttt.ops.backends import calls
from ttt.ops.sequence import cuda, dual_form
from ttt.ops.sequence.states import own, tensors_of
from ttt.ops.triton import common, memory
from ttt.ops.triton.common import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
KINDS = {  # whether it has an inner norm, gates, momenta
    "TTT": (True, False, False),
    "Titans": (False, True, True),
    "gates": (True, True, False),
    "momenta": (True, False, True),
}
TEXTS = [*itertools.product([(16,), (16, 48)], KINDS, (1, 7, 16, 40))]
TEXTS += itertools.product([(48,), (64,), (32, 16), (48, 80)], ("TTT", "Titans"), (16,))
TOKENS = [*itertools.product([(5,), (16, 64)], KINDS, (1, 3, 16), (torch.float32,))]
TOKENS += itertools.product([(64,), (128,), (7, 9)], ("TTT", "Titans"), (3,), (torch.float32, torch.bfloat16))


@pytest.fixture(autouse=True)
def on_any_device(monkeypatch):
    """Lets the launches of CUDA tensors run on tensors of the CPU, in the interpreter."""
    if INTERPRETED:
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


def case(kind, batch, tokens, dtype, *widths):
    """Tokens (q, k, v, rate, gate, momentum), the first weights and the norm, on the device."""
    normed, gated, moving = KINDS[kind]
    (q, k, v, rate), weights, norm = memory_case(batch, tokens, 2, dtype, *widths)
    shape = (batch, tokens, 2)
    gate = between(0.7, 1, *shape, dtype=torch.float32) if gated else None
    momentum = between(0, 0.5, *shape, dtype=torch.float32) if moving else None
    tensors = [q, k, v, rate * (0.3 if moving else 1.0), gate, momentum]
    norm = ops.Norm(norm.weight.to(DEVICE), norm.bias.to(DEVICE), norm.eps) if normed else None
    return [None if t is None else t.to(DEVICE) for t in tensors], [w.to(DEVICE) for w in weights], norm


def by_kernel(tensors, norm, state, size, scale, begins=None):
    given = (*tensors, *(norm or (None, None, 0.0)), *state, begins, size, scale)
    out, weights, start, velocity, position = cuda.memory(*given)
    return out, ops.MemoryState(tuple(weights), tuple(start), tuple(velocity), position)


def by_kernel_step(tensors, norm, state, size, scale):
    return cuda.memory_step(*tensors, *(norm or (None, None, 0.0)), *state, size, scale)


def by_form(form, tensors, norm, state, size, scale):
    """The op in float64 (``form`` "reference"), or in float32 by the dual form."""
    convert = doubled if form == "reference" else (lambda ts: [None if t is None else t.float() for t in ts])
    q, k, v, rate, gate, momentum = convert(tensors)
    parts = [tuple(convert(part)) for part in state[:3]]
    norm = norm and (wide_norm(norm) if form == "reference" else norm)
    options = {"gate": gate, "momentum": momentum, "norm": norm, "mini_batch": size, "scale": scale, "form": form}
    state = ops.MemoryState(*parts, state.position)
    return ops.memory(q, k, v, rate, [w[0] for w in parts[0]], initial_state=state, output_final_state=True, **options)


def cut(tensors, begin, end):
    return [None if t is None else t[:, begin:end] for t in tensors]


def check(found, exact, plain, dtype):
    if INTERPRETED and dtype == torch.bfloat16:
        torch.testing.assert_close(found[0].double(), exact[0], rtol=2**-7, atol=1e-3)
        found = (plain[0].to(dtype), found[1])
    compare(found, exact, (plain[0].to(dtype), plain[1]))


@pytest.mark.parametrize(("widths", "kind", "size"), TEXTS)
def test_a_text_from_within_a_mini_batch(widths, kind, size):
    """The second piece begins within a mini-batch of most sizes, and ends within one."""
    ends = (19, 45) if size > 1 else (3, 5)
    batch = 2 if kind in ("TTT", "Titans") else 1
    tensors, weights, norm = case(kind, batch, ends[1], torch.float32, *widths)
    state = ops.new_memory_state(weights, batch, tensors[-1] is not None)
    copies = [t.clone() for t in (*filter(torch.is_tensor, tensors), *weights)]
    found = exact = plain = (None, state)
    outs = [[], [], []]
    for begin, end in ((0, ends[0]), ends):
        piece = cut(tensors, begin, end)
        found = by_kernel(piece, norm, found[1], size, 0.8)
        exact = by_form("reference", piece, norm, exact[1], size, 0.8)
        plain = by_form("chunk", piece, norm, plain[1], size, 0.8)
        for out, kept in zip((found, exact, plain), outs, strict=True):
            kept.append(out[0])
    joined = [torch.cat(out, 1) for out in outs]
    check((joined[0], found[1]), (joined[1], exact[1]), (joined[2], plain[1]), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip((*filter(torch.is_tensor, tensors), *weights), copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["TTT", "Titans"])
@pytest.mark.parametrize("widths", [(32,), (32, 48)])
def test_texts_of_16_bits(kind, dtype, widths):
    tensors, weights, norm = case(kind, 1, 37, dtype, *widths)
    state = ops.new_memory_state(weights, 1, tensors[-1] is not None)
    found = by_kernel(tensors, norm, state, 16, 1.0)
    check(found, *(by_form(form, tensors, norm, state, 16, 1.0) for form in ("reference", "chunk")), dtype)


@pytest.mark.parametrize(
    ("kind", "widths", "size"), [("TTT", (16,), 5), ("TTT", (16, 32), 20), ("Titans", (16, 32), 16)]
)
def test_packed_texts_at_several_positions_of_which_some_are_empty(kind, size, widths, monkeypatch):
    """They equal those read alone, to the bit; whether few or all chunks' weights are kept at once."""
    tensors, weights, norm = case(kind, 1, 61, torch.float32, *widths)
    bounds = torch.tensor([0, 9, 9, 10, 61], device=DEVICE)
    state = ops.new_memory_state(weights, 4, tensors[-1] is not None)
    warm = case(kind, 4, 3, torch.float32, *widths)[0]
    _, state = by_kernel(warm, norm, state, size, 1.0)  # at position 3, with weights of their own
    rows = by_kernel(tensors, norm, state, size, 1.0, bounds)
    monkeypatch.setattr(memory, "BETWEEN", 1)
    parts = by_kernel(tensors, norm, state, size, 1.0, bounds)
    for a, b in zip(tensors_of(rows), tensors_of(parts), strict=True):
        assert torch.equal(a, b)
    for n in range(4):
        begin, end = bounds[n : n + 2].tolist()
        alone = ops.MemoryState(*(tuple(t[n : n + 1] for t in p) for p in state[:3]), state.position[n : n + 1])
        out, final = by_kernel([None if t is None else t[:, begin:end] for t in tensors], norm, alone, size, 1.0)
        assert torch.equal(rows[0][:, begin:end], out)
        for a, b in zip(tensors_of(rows[1]), tensors_of(final), strict=True):
            assert torch.equal(a[n : n + 1], b)


@pytest.mark.parametrize(("widths", "kind", "size", "dtype"), TOKENS)
def test_tokens(widths, kind, size, dtype):
    """Four tokens, of rows at different positions."""
    tensors, weights, norm = case(kind, 3, 4, dtype, *widths)
    state = ops.new_memory_state(weights, 3, tensors[-1] is not None)
    state.position.copy_(torch.arange(3) % size)
    exact = ops.MemoryState(*(tuple(doubled(part)) for part in state[:3]), state.position.clone())
    plain, outs = own(state), [[], [], []]
    for t in range(4):
        token = [None if x is None else x[:, t] for x in tensors]
        outs[0].append(by_kernel_step(token, norm, state, size, 0.8))
        for held, convert, kept in ((exact, torch.Tensor.double, outs[1]), (plain, torch.Tensor.float, outs[2])):
            q, *others = [None if x is None else convert(x) for x in token]
            wide = norm and ops.Norm(convert(norm.weight), convert(norm.bias), norm.eps)
            kept.append(dual_form.step_(q * 0.8, *others, held, wide, size))
    found, wanted, near = (torch.stack(out, 1) for out in outs)
    check((found, state), (wanted, exact), (near, plain), dtype)


def test_what_is_not_served(monkeypatch):
    """It is counted by its reason. Tokens may have any width up to 128, texts some up to 64."""

    def why(*widths, text=True, dtype=torch.float32, layers=None):
        weights = memory_case(1, 1, 1, torch.float32, *widths)[1]
        shape = (1, 1, 1, widths[0]) if text else (1, 1, widths[0])
        return cuda.why_not_memory(torch.zeros(*shape, dtype=dtype), weights if layers is None else weights * layers)

    monkeypatch.setattr(common, "capability", lambda: (9, 0))
    assert not any(why(width) for width in (16, 32, 48, 64))
    assert not why(64, 256)
    assert not any(why(*widths, text=False) for widths in ((1,), (128,), (3, 500)))
    assert why(80) == "no Triton kernel for texts and heads wider than 64, got 80"
    assert why(20) == "no Triton kernel for texts and widths that are no multiples of 16, got 20 and 20"
    assert why(16, 20) == "no Triton kernel for texts and widths that are no multiples of 16, got 16 and 20"
    assert why(16, layers=3) == "no Triton kernel for texts and memories of 3 layers"
    assert why(16, layers=3, text=False) == "no Triton kernel for tokens and memories of 3 layers"
    assert why(129, text=False) == "no Triton kernel for tokens and heads wider than 128, got 129"
    assert why(16, dtype=torch.float64) == "no Triton kernel for torch.float64"
    monkeypatch.setattr(common, "capability", lambda: (8, 0))
    assert not why(64)
    assert why(64, 256) == (
        "no Triton kernel for texts and memories of two layers on GPUs of compute capability below 9.0"
    )
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for found in (why(64), cuda.why_not(*[torch.zeros(1, 1, 1, 16)] * 2)):
        assert found.startswith("no Triton kernel for texts on AMD GPUs")
    assert not why(64, text=False)


def test_calls_are_counted_and_positions_checked():
    tensors, weights, norm = case("TTT", 2, 5, torch.float32, 16)
    state = ops.new_memory_state(weights, 2)
    before = calls["ttt_linear", "triton", ""], calls["ttt_linear_step", "triton", ""]
    _, state = by_kernel(tensors, norm, state, 16, 1.0)
    assert state.position.tolist() == [5, 5]
    versions = [t._version for t in tensors_of(state)]
    by_kernel_step([None if t is None else t[:, 0] for t in tensors], norm, state, 6, 1.0)
    assert state.position.tolist() == [0, 0]
    assert all(t._version > v for t, v in zip(tensors_of(state), versions, strict=True))
    assert (calls["ttt_linear", "triton", ""], calls["ttt_linear_step", "triton", ""]) == (before[0] + 1, before[1] + 1)
    state.position.fill_(4)
    copies = own(state)
    with pytest.raises(ValueError, match=r"position must be at least 0 and below mini_batch, 4, got 4"):
        by_kernel(tensors, norm, state, 4, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(state), tensors_of(copies), strict=True))


def test_no_tokens_and_no_sequences():
    for batch, tokens in ((2, 0), (0, 3)):
        tensors, weights, norm = case("Titans", batch, tokens, torch.float32, 16)
        state = ops.new_memory_state(weights, batch, True)
        out, final = by_kernel(tensors, norm, state, 16, 1.0)
        assert out.shape == tensors[0].shape
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(final), tensors_of(state), strict=True))
