"""Calls of the commit and of window_linear with wrong arguments are refused by name, and change nothing."""

import pytest
import torch
from test_cpu import OPTIONS, commit_case

from ttt import ops
from ttt.ops import log8

BAD_COMMITS = {
    "strided weight": ({"weight": torch.randn(5, 4).T}, ValueError, "weight must be contiguous"),
    "strided trace": ({"trace": torch.zeros(4, 10)[:, ::2]}, ValueError, "trace must be contiguous"),
    "integer x": ({"x": torch.zeros(3, 5, dtype=torch.int32)}, TypeError, "x must be torch.float32"),
    "half trace": ({"trace": torch.zeros(4, 5, dtype=torch.float16)}, TypeError, "trace must be"),
    "short delta": ({"delta": torch.zeros(2, 4)}, ValueError, r"delta must have shape \(3, 4\), got \(2, 4\)"),
    "wide eta": ({"eta": torch.zeros(3, dtype=torch.float64)}, TypeError, "eta must be torch.float32"),
    "float step": ({"step": torch.zeros(1)}, TypeError, "step must be torch.int64"),
    "wide memory": ({"memory": torch.zeros(9, 6)}, ValueError, "memory must have shape"),
    "8-bit trace": (
        {"trace": torch.zeros(4, 5, dtype=torch.uint8)},
        ValueError,
        r"trace must have shape \(4, 6\), got \(4, 5\)",
    ),
    "8-bit si": ({"trace": log8.zeros(4, 5), "kind": "si"}, ValueError, "with kind = 'si' it has both signs"),
    "float gate": ({"gate": torch.ones(1)}, TypeError, "gate must be torch.int64, got torch.float32"),
    "scalar gate": ({"gate": torch.tensor(1)}, ValueError, r"gate must have shape \(1,\), got \(\)"),
    "every": ({"trace_every": 0}, ValueError, "trace_every must be >= 1, got 0"),
    "no anchor": ({"anchor": None}, ValueError, "needs memory and anchor"),
    "no importance": ({"importance": None}, ValueError, "lam = 0.5 needs anchor and importance"),
    "rows": ({"replay_rows": 65}, ValueError, r"replay_rows must be in \[0, 64\], got 65"),
    "kind": ({"kind": "ewc"}, ValueError, "kind must be one of"),
    "lam": ({"lam": float("nan")}, ValueError, "lam must be >= 0"),
    "gamma": ({"gamma": 0.0}, ValueError, "gamma must be in"),
    "eps": ({"eps": -1.0}, ValueError, "eps must be >= 0"),
    "grad": ({"x": torch.zeros(3, 5, requires_grad=True)}, RuntimeError, "x requires grad"),
}


@pytest.mark.parametrize("name", BAD_COMMITS)
def test_refused_commits_change_nothing(name):
    change, error, message = BAD_COMMITS[name]
    case = {**commit_case(4, 5, 3, torch.float32, torch.float32), **OPTIONS, "replay_rows": 2, "lam": 0.5, **change}
    before = {k: v.clone() for k, v in case.items() if torch.is_tensor(v)}
    with pytest.raises(error, match=message):
        ops.commit(**case)
    for k, v in before.items():
        assert torch.equal(case[k], v)


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, torch.randn(3, 6), ValueError, r"x must have shape \(\.\.\., 5\), got \(3, 6\)"),
        (0, torch.randn(5, 3).T, ValueError, "x must be contiguous"),
        (0, torch.randn(3, 5).double(), TypeError, "x must be torch.float32"),
        (0, torch.randn(3, 5, requires_grad=True), RuntimeError, "x requires grad"),
        (1, torch.randn(20), ValueError, r"weight must have shape \(m, n\)"),
        (3, torch.randn(2, 4), ValueError, "win_x must have shape"),
        (5, torch.rand(2).bfloat16(), TypeError, "win_eta must be torch.float32"),
    ],
)
def test_refused_window_linear(position, value, error, message):
    args = [torch.randn(3, 5), torch.randn(4, 5), None, torch.randn(2, 5), torch.randn(2, 4), torch.rand(2)]
    args[position] = value
    with pytest.raises(error, match=message):
        ops.window_linear(*args)
