"""Replay rows that are given instead of drawn: every backend replays exactly these rows."""

import exact
import pytest
import torch
from helpers import ISAS, ORDER, as_double, assert_close

from ttt import _C, ops
from ttt.ops import reference

fused = pytest.importorskip("ttt.ops.triton.commit")
panels = pytest.importorskip("ttt.ops.triton.panels")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("seed", "replay_rows", "beta", "eps", "lam", "gamma", "kind", "trace_every", "gate")
OPTIONS = {
    "seed": 2**63 - 9, "beta": 0.3, "eps": 1e-3, "lam": 0.5, "gamma": 0.9, "kind": "fisher",
    "trace_every": 1, "gate": None,
}  # fmt: skip
BACKENDS = ["reference", *ISAS, "fused", "panels"]


@pytest.fixture(params=BACKENDS)
def commit(request, monkeypatch):
    """A function of (case, options) that commits a copy of the case and returns its state."""
    name, active = request.param, _C.active_isa()
    if name in ("fused", "panels"):
        monkeypatch.setattr(fused, "FEW_TOKENS", 10**9 if name == "fused" else 0)
        monkeypatch.setattr(panels, "PANEL_BYTES", 1)
        function, device = fused.commit, DEVICE
    elif name == "reference":
        function, device = reference.commit, "cpu"
    else:
        _C.set_isa(name)
        function, device = torch.ops.ttt.commit, "cpu"

    def run(case, options):
        after = {k: None if t is None else t.to(device, copy=True) for k, t in case.items()}
        gate = None if options["gate"] is None else options["gate"].to(device)
        function(*[after[k] for k in ORDER], *(options[k] for k in NAMES[:-1]), gate)
        return {k: None if t is None else t.cpu() for k, t in after.items()}

    # The interpreter rounds float32 to bfloat16 wrongly.
    run.half = torch.float16 if function is fused.commit and DEVICE == "cpu" else torch.bfloat16
    run.rounds_eta_delta = name == "panels" and DEVICE == "cuda"  # to bfloat16, for bfloat16 weights
    yield run
    _C.set_isa(active)


def case_of(m, n, tokens, rows, dtype=torch.float32):
    weight = torch.randn(m, n)
    return {
        "weight": weight.to(dtype),
        "anchor": (weight + 0.1 * torch.randn(m, n)).to(dtype),
        "importance": 3 * torch.rand(m, n),
        "trace": torch.rand(m, n),
        "x": torch.randn(tokens, n).to(dtype),
        "delta": torch.randn(tokens, m).to(dtype),
        "eta": 0.02 * torch.rand(tokens),
        "trace_delta": None,
        "memory": torch.randn(rows, n).to(dtype),
        "seen": None,
        "step": torch.tensor([5]),
    }


def plain(case, options):
    after = {k: None if t is None else t.clone() for k, t in case.items()}
    reference.commit(*[after[k] for k in ORDER], *(options[k] for k in NAMES))
    return after


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "tokens", "rows"), [(1, 1, 1, 1), (7, 33, 5, 3), (33, 127, 0, 4), (35, 70, 17, 17), (5, 70, 2, 33)]
)
def test_given_rows(commit, m, n, tokens, rows, half):
    dtype = commit.half if half else torch.float32
    case, options = case_of(m, n, tokens, rows, dtype), {**OPTIONS, "replay_rows": rows}
    ours, baseline = commit(case, options), plain(case, options)
    truth = exact.commit(case, rows=case["memory"], **options)
    changes = [t.double() - case["weight"].double() for t in (ours["weight"], truth, baseline["weight"])]
    assert_close(*changes, "weight")
    assert torch.equal(ours["memory"], case["memory"])
    assert int(ours["step"]) == 6


@pytest.mark.parametrize("rows", [3, 16])
def test_rows_that_the_memory_would_have_drawn_give_the_same_bits(commit, rows):
    case, options = case_of(19, 45, 6, 50), {**OPTIONS, "replay_rows": rows}
    drawn = commit({**case, "seen": torch.tensor([70])}, options)
    index = ops.reservoir_draw(torch.tensor([70]), case["step"], capacity=50, rows=rows, seed=OPTIONS["seed"])
    given = commit({**case, "memory": case["memory"][index]}, options)
    assert torch.equal(drawn["weight"], given["weight"])
    assert torch.equal(drawn["trace"], given["trace"])
    assert not torch.equal(given["weight"], commit(case | {"memory": case["memory"][:rows]}, options)["weight"])


def test_rows_of_zeros_have_no_effect(commit):
    """Rows of zeros stand for sources that are still empty. They have no effect, except on the ridge."""
    case, options = case_of(9, 40, 5, 4), {**OPTIONS, "replay_rows": 4, "eps": 0.0}
    case["memory"][2:] = 0
    with_zeros = commit(case, {**options, "eps": 1e-7})
    without = commit({**case, "memory": case["memory"][:2]}, {**options, "replay_rows": 2, "eps": 1e-7})
    torch.testing.assert_close(with_zeros["weight"], without["weight"], rtol=1e-5, atol=1e-5)


def test_a_closed_gate_holds_for_given_rows(commit):
    case = case_of(9, 40, 5, 4)
    ours = commit(case, {**OPTIONS, "replay_rows": 4, "gate": torch.tensor([0])})
    assert all(t is None or torch.equal(ours[k], t) for k, t in case.items())


def test_float64_takes_given_rows():
    case = {k: as_double(t, 21) for k, t in case_of(6, 21, 4, 5).items()}
    options = {**OPTIONS, "replay_rows": 5}
    expected = exact.commit(case, rows=case["memory"], **options)
    ops.commit(**case, **options)
    torch.testing.assert_close(case["weight"], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"memory": torch.zeros(5, 7)}, r"memory must have shape \(4, 7\), got \(5, 7\)"),
     ({"memory": torch.zeros(3, 7)}, r"memory must have shape \(4, 7\), got \(3, 7\)"),
     ({"memory": None}, "replay_rows = 4 needs memory and anchor"), ({"anchor": None, "lam": 0.0}, "needs memory and")],
)  # fmt: skip
def test_refused_rows_change_nothing(change, message):
    case = {**case_of(3, 7, 2, 4), **OPTIONS, "replay_rows": 4, **change}
    before = {k: t.clone() for k, t in case.items() if torch.is_tensor(t)}
    with pytest.raises(ValueError, match=message):
        ops.commit(**case)
    assert all(torch.equal(case[k], t) for k, t in before.items())


def test_opcheck_of_given_rows():
    case = case_of(4, 5, 3, 2)
    args = tuple(case[k] for k in ORDER) + tuple({**OPTIONS, "replay_rows": 2}[k] for k in NAMES[:8])
    torch.library.opcheck(torch.ops.ttt.commit.default, args)
