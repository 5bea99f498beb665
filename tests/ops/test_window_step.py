"""The learning step of a layer that counts on the device: the Triton kernel and the op, beside commit and append."""

import itertools

import pytest
import torch

from ttt.ops import backends, log8, reference
from ttt.ops.arguments import WindowStepArguments
from ttt.ops.composite import window_step as by_two_ops
from ttt.ops.triton import append, commit
from ttt.ops.triton import window_step as fused
from ttt.ops.triton.common import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
HALF = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter rounds to bfloat16 wrongly


def by_kernel(*args):
    a = WindowStepArguments(*args)
    assert fused.why_not(a) == ""
    fused.window_step(a)


def by_two_kernels(*args):
    a = WindowStepArguments(*args)
    full, at = a.counters[1:2].clone(), 0 if int(a.counters[1]) else int(a.counters[0])
    if a.win_weight is not None and (a.gate is None or int(a.gate)):
        a.win_weight[at : at + len(a.row_weight)] = a.row_weight
    commit.commit(*a.commit._replace(gate=full if a.gate is None else full * a.gate))
    append.window_append(*a.append)


def by_reference(*args):
    """The definition: what the gate and the counters say is read by the host."""
    a = WindowStepArguments(*args)
    if a.gate is not None and not int(a.gate):
        return
    full, at = int(a.counters[1]), 0 if int(a.counters[1]) else int(a.counters[0])
    a.win_weight[at : at + len(a.row_weight)] = a.row_weight
    if full:
        reference.commit(*a.commit)
    reference.window_append(*a.append)


def by_op(*args):
    torch.ops.ttt.window_step(*args)


def count(*values):
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def layer_of(m, n, window, rows, dtype, state, traced=False, momentum=None, **options):
    """The arguments of a step, by name, for a layer whose window is empty."""

    def stored(t):
        return log8.encode(t) if state == torch.uint8 else t.to(state)

    w = torch.randn(m, n, device=DEVICE)
    full = {
        "win_x": torch.zeros(window, n, device=DEVICE, dtype=dtype),
        "win_delta": torch.zeros(window, m, device=DEVICE, dtype=dtype),
        "win_eta": torch.zeros(window, device=DEVICE),
        "win_trace": torch.zeros(window, m, device=DEVICE, dtype=dtype) if traced else None,
        "x": None, "delta": None, "eta": None, "trace_delta": None,
        "counters": count(0, 0, 0), "tokens": count(5), "gate": None,
        "win_weight": torch.randn(window, device=DEVICE), "row_weight": None, "held": window // rows * rows,
        "weight": w.to(dtype), "anchor": (w + 0.1 * torch.randn_like(w)).to(dtype),
        "importance": stored(torch.rand_like(w)), "trace": stored(torch.rand_like(w)),
        "memory": None, "seen": None, "step": count(3), "seed": 11, "replay_rows": 0,
        "beta": 0.3, "eps": 1e-3, "lam": 0.5, "gamma": 0.97, "kind": "fisher", "trace_every": 1,
        "momentum": None if momentum is None else (0.05 * torch.randn_like(w)).to(momentum),
        "mu": 0.0 if momentum is None else 0.8, "decay": 0.0,
    }  # fmt: skip
    return {**full, **options}


def copied(case):
    return {k: t.clone() if torch.is_tensor(t) else t for k, t in case.items()}


def with_rows(case, rows, n, m, gate=None):
    """``case`` with new rows, whose products have sums of few digits: any order of addition gives the same bits."""
    dtype = case["weight"].dtype
    x, delta, p = (torch.randint(-3, 4, (rows, k), device=DEVICE).to(dtype) for k in (n, m, m))
    eta = torch.full((rows,), 2.0**-9, device=DEVICE)
    return {
        **case,
        "x": x,
        "delta": delta,
        "eta": eta,
        "trace_delta": None if case["win_trace"] is None else p,
        "gate": gate,
        "row_weight": torch.randn(rows, device=DEVICE),
    }


def check(step, twin, case, rows, n, m, steps, gates=(None,)):
    """Make ``steps`` steps by ``step`` and by ``twin``; all state agrees to the bit after each of them."""
    ours, theirs, commits = copied(case), copied(case), 0
    for _, gate in zip(range(steps), itertools.cycle(gates), strict=False):
        new = with_rows(ours, rows, n, m, None if gate is None else count(gate))
        commits += bool(ours["counters"][1]) and gate != 0
        step(*new.values())
        twin(*{**theirs, **{k: new[k] for k in ("x", "delta", "eta", "trace_delta", "gate", "row_weight")}}.values())
        for name, t in ours.items():
            if torch.is_tensor(t):
                assert torch.equal(t, theirs[name]), name
    assert commits == int(ours["step"]) - int(case["step"]) > 0
    return ours


@pytest.mark.parametrize("step", [by_kernel, by_op])
@pytest.mark.parametrize(("m", "n", "window", "rows"), [(7, 33, 4, 1), (65, 130, 5, 2), (33, 1100, 6, 3), (1, 1, 2, 1)])
@pytest.mark.parametrize("state", [torch.float32, torch.uint8])
def test_a_step_is_a_commit_of_a_full_window_and_an_append(step, m, n, window, rows, state):
    case = layer_of(m, n, window, rows, torch.float32, state, lam=0.0, gamma=1.0)
    case["weight"] = torch.randint(-512, 513, (m, n), device=DEVICE).float() / 64
    trace = torch.randint(0, 100, (m, n), device=DEVICE).float()
    case["trace"] = log8.encode(trace) if state == torch.uint8 else trace
    check(step, by_reference, case, rows, n, m, 2 * (window // rows) + 2)


@pytest.mark.parametrize("options", [
    {"lam": 0.0}, {"importance": None, "lam": 0.0, "decay": 0.5, "win_weight": None}, {"kind": "si"},
    {"kind": "mas", "trace": None},
    {"trace_every": 2}, {"momentum": torch.float32}, {"momentum": HALF, "decay": 0.1}, {"traced": True},
])  # fmt: skip
def test_options(options):
    if options.get("momentum") == torch.float16:
        options = {**options, "momentum": torch.float32}
    check(
        by_kernel,
        by_two_kernels,
        layer_of(34, 70, 4, 1, HALF, torch.float32, **options),
        1,
        70,
        34,
        10,
        gates=(1, 1, 0),
    )


@pytest.mark.parametrize("step", [by_kernel, by_op])
def test_a_closed_gate_changes_nothing(step):
    case = with_rows(layer_of(9, 20, 4, 2, torch.float32, torch.float32), 2, 20, 9, count(0))
    for full in (0, 1):
        case["counters"] = count(4 * full, full, 0)
        before = copied(case)
        step(*case.values())
        assert all(torch.equal(t, before[k]) for k, t in case.items() if torch.is_tensor(t))


def test_a_small_grid_writes_every_tile(monkeypatch):
    """Each program writes several tiles and several parts of rows."""
    monkeypatch.setattr(fused, "multiprocessors", lambda: 1)
    check(by_kernel, by_two_kernels, layer_of(130, 3000, 6, 3, torch.float32, torch.float32), 3, 3000, 130, 6)


@pytest.mark.parametrize("parts", [0, 10**9])
def test_rows_of_a_launch_of_their_own_have_the_same_bits(parts, monkeypatch):
    """However many rows the launch of the commit may write, state is that of the two kernels."""
    monkeypatch.setattr(fused, "MOST_PARTS", parts)
    check(by_kernel, by_two_kernels, layer_of(33, 2100, 8, 3, torch.float32, torch.float32), 3, 2100, 33, 8, (1, 1, 0))
    check(by_kernel, by_two_kernels, layer_of(70, 40, 9, 4, torch.float32, torch.float32, traced=True), 4, 40, 70, 7)


def test_what_one_launch_cannot_do_is_done_by_two_ops():
    memory = {"memory": torch.randn(8, 20, device=DEVICE), "seen": count(8), "replay_rows": 2}
    case = layer_of(9, 20, 4, 1, torch.float32, torch.float32, **memory)
    assert "replay rows" in fused.why_not(WindowStepArguments(**case))
    backends.calls.clear()
    check(by_op, by_two_ops, case, 1, 20, 9, 6)
    assert {op for op, *_ in backends.calls} >= {"commit", "window_append"}
    case = layer_of(9, 20, 600, 1, torch.float32, torch.float32)
    assert "holds 600 rows" in fused.why_not(WindowStepArguments(**case))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"counters": torch.zeros(2, dtype=torch.int64)}, ValueError, r"counters must have shape \(3,\), got \(2,\)"),
        ({"held": 5}, ValueError, r"held must be in \[0, 4\], got 5"),
        ({"held": -1}, ValueError, r"held must be in \[0, 4\], got -1"),
        ({"row_weight": None}, ValueError, "win_weight needs row_weight"),
        ({"win_weight": torch.zeros(3)}, ValueError, r"win_weight must have shape \(4,\), got \(3,\)"),
        ({"lam": -1.0}, ValueError, "lam must be >= 0, got -1.0"),
        ({"delta": torch.zeros(1, 8)}, ValueError, r"delta must have shape \(1, 9\), got \(1, 8\)"),
    ],
)
def test_refusals_change_nothing(change, error, message):
    case = with_rows(layer_of(9, 20, 4, 1, torch.float32, torch.float32), 1, 20, 9)
    case |= {k: t.to(DEVICE) if torch.is_tensor(t) else t for k, t in change.items()}
    before = copied(case)
    with pytest.raises(error, match=message):
        by_op(*case.values())
    assert all(torch.equal(t, before[k]) for k, t in case.items() if torch.is_tensor(t))


@pytest.mark.parametrize(("m", "n", "rows"), [(7, 33, 4), (2, 5, 3), (3, 1030, 2)])
def test_more_rows_than_the_layer_has_tiles(m, n, rows):
    """A small layer has fewer tiles than the new rows have parts."""
    check(by_kernel, by_two_kernels, layer_of(m, n, 3 * rows, rows, torch.float32, torch.float32), rows, n, m, 9)
