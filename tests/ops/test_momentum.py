"""Momentum and decay of the commit: the recurrence of Titans in float64, and every backend."""

import exact
import pytest
import torch
from helpers import ORDER, as_double, assert_close, assert_commit, multiplies_pairs, trace_of_rounded_factors
from test_replay_rows import BACKENDS, DEVICE, fused, panels

from ttt import _C, ops
from ttt.ops import log8, reference
from ttt.ops.momentum import coefficients
from ttt.ops.rounding import momentum_rounding_bits, rounding_bits, trace_rounding_bits

NAMES = ("seed", "replay_rows", "beta", "eps", "lam", "gamma", "kind", "trace_every", "gate")
OPTIONS = {
    "seed": 987654321, "replay_rows": 0, "beta": 0.3, "eps": 1e-3, "lam": 0.5, "gamma": 0.9,
    "kind": "fisher", "trace_every": 1, "gate": None, "mu": 0.8, "decay": 0.3,
}  # fmt: skip
D = torch.float64


def call(function, case, options, device="cpu"):
    after = {k: None if t is None else t.to(device, copy=True) for k, t in case.items()}
    arguments = [after[k] for k in ORDER] + [options[k] for k in NAMES[:-1]]
    arguments.append(None if options["gate"] is None else options["gate"].to(device))
    function(*arguments, after["momentum"], options["mu"], options["decay"])
    return {k: None if t is None else t.cpu() for k, t in after.items()}


@pytest.fixture(params=BACKENDS)
def commit(request, monkeypatch):
    """A function of (case, options) that commits a copy of the case and returns its state."""
    name, active = request.param, _C.active_isa()
    function, device = reference.commit, "cpu"
    if name in ("fused", "panels"):
        monkeypatch.setattr(fused, "FEW_TOKENS", 10**9 if name == "fused" else 0)
        monkeypatch.setattr(panels, "PANEL_BYTES", 1)
        function, device = fused.commit, DEVICE
    elif name != "reference":
        _C.set_isa(name)
        function = torch.ops.ttt.commit

    def run(case, options):
        return call(function, case, options, device)

    # The interpreter rounds float32 to bfloat16 wrongly.
    run.half = torch.float16 if function is fused.commit and DEVICE == "cpu" else torch.bfloat16
    run.parts = {"fused": 2, "panels": 1}.get(name) if DEVICE == "cuda" else None
    run.pairs = multiplies_pairs(name) or function is fused.commit
    yield run
    _C.set_isa(active)


def case_of(m, n, tokens, dtype=torch.float32, state=torch.float32, moving=torch.float32):
    weight = torch.randn(m, n)
    omega, trace = 3 * torch.rand(m, n), torch.rand(m, n)
    return {
        "weight": weight.to(dtype),
        "anchor": (weight + 0.1 * torch.randn(m, n)).to(dtype),
        "importance": log8.encode(omega) if state == torch.uint8 else omega.to(state),
        "trace": log8.encode(trace) if state == torch.uint8 else trace.to(state),
        "x": torch.randn(tokens, n).to(dtype),
        "delta": torch.randn(tokens, m).to(dtype),
        "eta": 0.02 * torch.rand(tokens),
        "trace_delta": None,
        "memory": torch.randn(11, n).to(dtype),
        "seen": torch.tensor([25]),
        "step": torch.tensor([5]),
        "momentum": (0.05 * torch.randn(m, n)).to(moving),
    }


def doubled(case):
    return {k: as_double(t, case["x"].shape[1]) for k, t in case.items()}


def momentum_of_rounded_factors(case, mu, parts):
    """The momentum after a commit of bfloat16 weights if eta delta is rounded to ``parts`` bfloat16 numbers."""
    rest, left = case["eta"].unsqueeze(1) * case["delta"].float(), 0
    for _ in range(parts):
        left = left + rest.bfloat16().double()
        rest = rest - rest.bfloat16().float()
    remember, share, *_ = coefficients(mu, len(rest))
    momentum = remember * case["momentum"].double() + share * (left.T @ case["x"].double())
    return momentum.to(case["momentum"].dtype)


def check(commit, case, options):
    """Compared with the reference in float64, with the tolerance of the reference at the same dtypes."""
    ours, plain = commit(case, options), call(reference.commit, case, options)
    exactly = call(reference.commit, doubled(case), options)
    if case["weight"].dtype == torch.bfloat16 and commit.pairs and case["trace"] is not None:
        plain["trace"] = trace_of_rounded_factors(case, options)
    assert_commit({k: case[k] for k in ORDER}, ours, exactly, plain)
    if case["weight"].dtype == torch.bfloat16 and commit.parts and len(case["eta"]):
        plain["momentum"] = momentum_of_rounded_factors(case, options["mu"], commit.parts)
    change = [t["momentum"].double() - case["momentum"].double() for t in (ours, exactly, plain)]
    assert_close(*change, "momentum")
    assert ours["momentum"].dtype == case["momentum"].dtype
    return ours


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.97])
@pytest.mark.parametrize("tokens", [1, 2, 9, 40])
def test_the_reference_is_the_recurrence_of_titans(mu, tokens):
    """This is exact for one token, and for many tokens with equal gradients."""
    case = doubled(case_of(5, 7, tokens))
    options = {**OPTIONS, "mu": mu}
    ours = call(reference.commit, case, options)
    weight, momentum = exact.steps(case, **options)
    torch.testing.assert_close(ours["weight"], weight, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours["momentum"], momentum, rtol=1e-12, atol=1e-13)


def test_one_token_at_a_time_is_titans_with_its_forget_gate_towards_the_anchor():
    """S_t = mu S_{t-1} - theta g_t; M_t = (1 - alpha_t) (M_{t-1} + S_t), with M = W - W*.

    The decay is an implicit step, which uses the new weights; that of the paper is explicit.
    """
    mu, decay = 0.7, 0.4
    case = doubled(case_of(4, 6, 1))
    case["momentum"].zero_()
    surprise, moved = torch.zeros(4, 6, dtype=D), case["weight"] - case["anchor"]
    for _ in range(12):
        case |= {"x": torch.randn(1, 6, dtype=D), "delta": torch.randn(1, 4, dtype=D), "eta": torch.rand(1, dtype=D)}
        surprise = mu * surprise - case["eta"] * torch.outer(case["delta"][0], case["x"][0])
        moved = (moved + surprise) / (1 + case["eta"] * decay)
        case = call(reference.commit, case, {**OPTIONS, "lam": 0.0, "mu": mu, "decay": decay})
        torch.testing.assert_close(case["weight"] - case["anchor"], moved, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(case["momentum"], -surprise, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mu", [0.0, 0.3, 0.99])
def test_a_gradient_finally_moves_the_weight_by_its_multiple_for_any_window(mu):
    for tokens in (1, 3, 64):
        _, share, _, gain = coefficients(mu, tokens)
        assert gain + share * mu / (1 - mu) == pytest.approx(1 / (1 - mu))
    assert coefficients(mu, 0)[:3] == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("moving", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "tokens", "rows"), [(1, 1, 1, 0), (7, 33, 5, 3), (33, 127, 1, 0), (35, 70, 17, 4), (5, 9, 0, 2)]
)
def test_commit(commit, m, n, tokens, rows, half, moving):
    if commit.half == torch.float16 and moving == torch.bfloat16:
        moving = torch.float32 if half else moving  # rounding of the momentum is tested below, on exact sums
    dtype = commit.half if half else torch.float32
    check(commit, case_of(m, n, tokens, dtype, moving=moving), {**OPTIONS, "replay_rows": rows})


@pytest.mark.parametrize("kind", ["fisher", "mas", "si"])
@pytest.mark.parametrize(("lam", "decay"), [(0.0, 0.0), (0.0, 2.0), (0.7, 0.0)])
def test_kinds_and_pulls(commit, kind, lam, decay):
    options = {**OPTIONS, "kind": kind, "lam": lam, "decay": decay, "replay_rows": 2}
    case = case_of(19, 45, 6)
    if lam == 0:
        case["importance"] = None
    check(commit, case, options)


def test_state_in_8_bits(commit):
    check(commit, case_of(9, 65, 4, state=torch.uint8), OPTIONS)


@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_decay_alone(commit, tokens):
    """Without momentum, importance and trace, W - W* is divided by 1 + decay sum eta."""
    case = case_of(6, 35, tokens) | {"importance": None, "trace": None, "momentum": None}
    case["delta"].zero_()
    options = {**OPTIONS, "lam": 0.0, "mu": 0.0, "decay": 5.0}
    ours = commit(case, options)
    left = (ours["weight"].double() - case["anchor"].double()) / (case["weight"].double() - case["anchor"].double())
    expected = 1 / (1 + 5.0 * float(case["eta"].double().sum()))
    assert float((left - expected).abs().median()) < 1e-5
    assert torch.equal(ours["anchor"], case["anchor"])


def test_replay_corrects_the_momentum_too(commit):
    """With beta = 1 and no ridge, the outputs on the rows are those of the anchor for any momentum."""
    case = case_of(6, 50, 5) | {"seen": None, "importance": None}
    case["memory"] = case["memory"][:4]
    ours = commit(case, {**OPTIONS, "lam": 0.0, "decay": 0.0, "beta": 1.0, "eps": 1e-9, "replay_rows": 4})
    drift = case["memory"].double() @ (ours["weight"].double() - case["anchor"].double()).T
    assert float(drift.abs().max()) < 1e-4
    assert float((ours["momentum"] - case["momentum"]).abs().max()) > 1e-3


@pytest.mark.parametrize("n", [1, 31, 130])
@pytest.mark.parametrize("half", [False, True])
def test_a_16_bit_momentum_is_rounded_with_the_reference_s_bits(commit, n, half):
    """All sums are exact in float32, so every backend must store the same bits."""
    case = case_of(19, n, 4, commit.half if half else torch.float32, moving=torch.bfloat16)
    for name in ("x", "delta"):
        case[name] = torch.randint(-3, 4, case[name].shape).to(case[name].dtype)
    case["eta"] = torch.full((4,), 2.0**-6)
    case["weight"] = torch.randint(-64, 65, case["weight"].shape).to(case["weight"].dtype)
    case["momentum"] = torch.randint(-100, 101, case["momentum"].shape).bfloat16()
    case |= {"importance": None, "trace": None}
    options = {**OPTIONS, "lam": 0.0, "decay": 0.0, "mu": 0.5}
    ours, theirs = commit(case, options), call(reference.commit, case, options)
    assert torch.equal(ours["momentum"], theirs["momentum"])
    assert torch.equal(ours["weight"], theirs["weight"])


def test_rounding_of_the_momentum_is_unbiased_and_shares_no_bits_with_the_element_s_weight_and_trace():
    step = torch.tensor([3])
    ours = momentum_rounding_bits(50, 203, step, 9)
    for other in (rounding_bits(50, 203, step, 9), trace_rounding_bits(50, 203, step, 9)):
        assert abs(float((ours.double() - 32767.5).mul(other.double() - 32767.5).mean())) < 0.05 * 65536**2 / 12
        assert float((ours == other).double().mean()) < 0.001
    case = doubled(case_of(3, 5, 1)) | {"importance": None, "trace": None}
    case = {k: t.float() if torch.is_tensor(t) and t.dtype == D else t for k, t in case.items()}
    case["momentum"] = torch.full((3, 5), 1.0).bfloat16()
    case["delta"].zero_()
    kept = []
    for count in range(400):
        case["step"].fill_(count)
        kept.append(call(torch.ops.ttt.commit, case, {**OPTIONS, "lam": 0.0, "mu": 0.999, "decay": 0.0})["momentum"])
    assert float(torch.stack(kept).double().mean()) == pytest.approx(0.999, abs=2e-4)


def test_without_tokens_the_momentum_stays(commit):
    case = case_of(7, 40, 0, moving=torch.bfloat16)
    ours = commit(case, {**OPTIONS, "replay_rows": 3})
    assert torch.equal(ours["momentum"], case["momentum"])
    assert not torch.equal(ours["weight"], case["weight"])


def test_a_closed_gate_changes_nothing(commit):
    case = case_of(7, 40, 3)
    for count in (0, 1):
        ours = commit(case, {**OPTIONS, "replay_rows": 3, "gate": torch.tensor([count])})
        assert all(t is None or torch.equal(ours[k], t) for k, t in case.items()) == (count == 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [({"mu": 1.0}, ValueError, r"mu must be in \[0, 1\), got 1.0"), ({"mu": -0.1}, ValueError, "mu must be in"),
     ({"decay": -1.0}, ValueError, "decay must be >= 0, got -1.0"),
     ({"momentum": None}, ValueError, "mu = 0.8 needs momentum, which is None"),
     ({"anchor": None, "lam": 0.0}, ValueError, "decay = 0.3 needs anchor, which is None"),
     ({"momentum": torch.zeros(3, 6)}, ValueError, r"momentum must have shape \(3, 7\), got \(3, 6\)"),
     ({"momentum": torch.zeros(3, 7, dtype=torch.float16)}, TypeError, "momentum must be torch.float32 or"),
     ({"momentum": torch.zeros(3, 7, dtype=torch.uint8)}, TypeError, "momentum must be torch.float32 or"),
     ({"momentum": torch.zeros(7, 3).T}, ValueError, "momentum must be contiguous")],
)  # fmt: skip
def test_refused_calls_change_nothing(change, error, message):
    case = {**case_of(3, 7, 2), **OPTIONS, **change}
    before = {k: t.clone() for k, t in case.items() if torch.is_tensor(t)}
    with pytest.raises(error, match=message):
        ops.commit(**case)
    assert all(torch.equal(case[k], t) for k, t in before.items())


def test_opcheck_and_versions():
    case = case_of(4, 5, 3)
    o = {**OPTIONS, "replay_rows": 2}
    args = tuple(case[k] for k in ORDER) + tuple(o[k] for k in NAMES[:8])
    more = {"momentum": case["momentum"], "mu": 0.5, "decay": 0.1}
    torch.library.opcheck(torch.ops.ttt.commit.default, args, more)
    versions = {k: t._version for k, t in case.items() if t is not None}
    ops.commit(**case, **o)
    moved = {k for k, version in versions.items() if case[k]._version > version}
    assert moved == {"weight", "trace", "step", "momentum"}
