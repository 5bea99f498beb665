"""What the commit stores, element by element against float64, with the penalty, replay and every kind of trace on.

Weights of bfloat16 in Triton run in its interpreter too, whose arithmetic for that type `true_bfloat16` repairs: the
kernels take the very operands that they take on a GPU.
"""

import numpy as np
import pytest
import torch
from exact import assert_committed
from helpers import ISAS, multiplies_pairs

from ttt import _C, ops
from ttt.ops import log8, reference
from ttt.ops.arguments import CommitArguments

fused = pytest.importorskip("ttt.ops.triton.commit")
panels = pytest.importorskip("ttt.ops.triton.panels")

DTYPES = [torch.float32, torch.bfloat16]
DEVICE = "cpu" if fused.INTERPRETED else "cuda"
# All of them are exact in float32.
OPTIONS = {"seed": 2**40 + 17, "replay_rows": 4, "beta": 0.25, "eps": 2.0**-6, "lam": 0.5, "gamma": 31 / 32}


@pytest.fixture
def true_bfloat16(monkeypatch):
    """Makes Triton's interpreter round to bfloat16 and multiply it as a GPU does.

    It cuts bfloat16 off instead of rounding it, and multiplies its bit patterns as whole numbers; the launchers avoid
    both where `INTERPRETED` is set.
    """
    if not fused.INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast_impl, create_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast_impl(self, src, dst_type)
        value = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16()
        return TensorHandle(value.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    def dot(self, a, b, *rest):
        a, b = (cast_impl(self, t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return create_dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    for module in (fused, panels):
        monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(panels, "product", lambda left, right: left.float() @ right.float())


BACKENDS = ["reference", *ISAS, "fused", "panels"]


@pytest.fixture(params=BACKENDS)
def commit(request, monkeypatch, true_bfloat16):
    """Takes (case, options) and returns the state after the commit."""
    name, active = request.param, _C.active_isa()
    if name in ("fused", "panels"):
        monkeypatch.setattr(fused, "FEW_TOKENS", 10**9 if name == "fused" else 0)
        monkeypatch.setattr(panels, "PANEL_BYTES", 1)
    elif name != "reference":
        _C.set_isa(name)

    function = fused.commit if name in ("fused", "panels") else reference.commit

    def run(case, options):
        after = {k: None if t is None else t.to(device_of(name), copy=True) for k, t in case.items()}
        if name in ISAS:
            ops.commit(**after, **options)
        else:
            function(*CommitArguments(**after, **options))
        return {k: None if t is None else t.cpu() for k, t in after.items()}

    run.name = name
    yield run
    _C.set_isa(active)


def device_of(name):
    return DEVICE if name in ("fused", "panels") else "cpu"


def rounded_factors(name, dtype, tokens):
    """Whether a backend makes the trace of factors in bfloat16: the ways that are possible."""
    if dtype != torch.bfloat16 or name == "reference":
        return [False]
    if name in ("fused", "panels"):
        return [True]
    if not multiplies_pairs(name):
        return [False]
    return [True] if tokens <= 4 else [True, False]  # on Intel's processors many tokens are widened


def flips_of(name, dtype):
    """The share of 16-bit elements that a correct kernel's errors may move by a unit in the last place.

    On a GPU the drift of replay rows is made of differences of bfloat16 weights in tf32.
    """
    return 0.1 if dtype == torch.bfloat16 and name in ("fused", "panels") and DEVICE == "cuda" else 0.01


def case_of(m, n, tokens, dtype, state, moving=None):
    """W is small beside what is written: 16 bits hold a change of 256 units in the last place."""
    weight, omega, trace = 0.05 * torch.randn(m, n), 3 * torch.rand(m, n), torch.rand(m, n)
    case = {
        "weight": weight.to(dtype),
        "anchor": (weight + 0.05 * torch.randn(m, n)).to(dtype),
        "importance": log8.encode(omega) if state == torch.uint8 else omega.to(state),
        "trace": log8.encode(trace) if state == torch.uint8 else trace.to(state),
        "x": torch.randn(tokens, n).to(dtype),
        "delta": torch.randn(tokens, m).to(dtype),
        "eta": 0.05 + 0.05 * torch.rand(tokens),
        "trace_delta": torch.randn(tokens, m).to(dtype),
        "memory": torch.randn(9, n).to(dtype),
        "seen": torch.tensor([25]),
        "step": torch.tensor([5]),
    }
    return case if moving is None else case | {"momentum": (0.05 * torch.randn(m, n)).to(moving)}


def check(commit, case, options):
    after = commit(case, options)
    index = ops.reservoir_draw(
        case["seen"], case["step"], capacity=len(case["memory"]), rows=options["replay_rows"], seed=options["seed"]
    )
    dtype = case["weight"].dtype
    assert_committed(
        case, after, case["memory"][index], options, flips=flips_of(commit.name, dtype),
        rounded_step=commit.name == "panels" and dtype == torch.bfloat16,
        rounded_factors=rounded_factors(commit.name, dtype, len(case["x"])),
        split=commit.name == "fused" and dtype == torch.bfloat16,
    )  # fmt: skip


SHAPES = [(40, 96, 13), (33, 127, 1), (7, 70, 40)]


@pytest.mark.parametrize(
    ("kind", "state"),
    [("fisher", torch.bfloat16), ("mas", torch.float32), ("si", torch.float32), ("si", torch.bfloat16)],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "tokens"), SHAPES)
def test_every_element(commit, dtype, state, kind, m, n, tokens):
    check(commit, case_of(m, n, tokens, dtype, state), {**OPTIONS, "kind": kind})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "tokens"), SHAPES[:2])
def test_every_code_of_8_bits(commit, dtype, m, n, tokens):
    check(commit, case_of(m, n, tokens, dtype, torch.uint8), {**OPTIONS, "kind": "fisher"})


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_rate_for_all_tokens(commit, dtype):
    case = case_of(40, 96, 13, dtype, torch.float32)
    case["eta"].fill_(0.0703125)
    check(commit, case, {**OPTIONS, "kind": "fisher"})


@pytest.mark.parametrize(
    ("dtype", "moving"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
@pytest.mark.parametrize("tokens", [1, 13])
def test_with_momentum_and_decay(commit, dtype, moving, tokens):
    case = case_of(33, 70, tokens, dtype, torch.float32, moving)
    check(commit, case, {**OPTIONS, "kind": "si", "mu": 0.75, "decay": 0.25})


def test_arguments_have_the_order_of_the_schema():
    arguments = torch.ops.ttt.commit.default._schema.arguments
    assert [a.name for a in arguments] == list(CommitArguments._fields)
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    assert defaults.items() <= CommitArguments._field_defaults.items()
