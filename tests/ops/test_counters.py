"""Counters and row numbers that would make a kernel read or write outside of a buffer are refused by name."""

import pytest
import torch
from helpers import ISAS
from test_replay_rows import case_of

from ttt import ops
from ttt.ops import cpu, reference
from ttt.ops.arguments import CommitArguments

OPTIONS = {"seed": 7, "beta": 0.3, "eps": 1e-3, "lam": 0.5, "replay_rows": 3}
D = torch.float64


@pytest.fixture(params=[*ISAS, "no extension", "float64"])
def dtype(request, monkeypatch):
    """The dtype of the tensors: float64 and a missing extension have the reference do the work."""
    if request.param in ISAS:
        before = cpu._C.active_isa()
        cpu._C.set_isa(request.param)
        yield torch.float32
        cpu._C.set_isa(before)
    else:
        if request.param == "no extension":
            monkeypatch.setitem(cpu.unavailable, "cpu", "taken away by a test")
            monkeypatch.setattr(cpu, "_C", None)
        yield D if request.param == "float64" else torch.float32


def state_of(m, n, tokens, dtype, capacity=5, seen=2):
    case = {**case_of(m, n, tokens, capacity), "seen": torch.tensor([seen]), "momentum": torch.randn(m, n)}
    return {k: t.to(dtype) if t is not None and t.is_floating_point() else t for k, t in case.items()}


def copy_of(case):
    return {k: None if t is None else t.clone() for k, t in case.items()}


def assert_same(case, before):
    for name, t in before.items():
        assert t is None or torch.equal(case[name], t), name


@pytest.mark.parametrize("seen", [-1, -(10**6), -(2**63)])
def test_a_commit_refuses_a_negative_count_of_rows(dtype, seen):
    case = state_of(4, 7, 3, dtype, seen=seen)
    before = copy_of(case)
    with pytest.raises(ValueError, match=f"seen must be at least 0, got {seen}"):
        ops.commit(**case, **OPTIONS)
    assert_same(case, before)
    ops.commit(**case, **{**OPTIONS, "replay_rows": 0})  # nothing is drawn: the counter is not read
    assert int(case["step"]) == int(before["step"]) + 1


@pytest.mark.parametrize("seen", [-1, -(10**6), -(2**63)])
def test_an_insert_refuses_a_negative_count_of_rows(dtype, seen):
    case = {"memory": torch.randn(4, 7, dtype=dtype), "seen": torch.tensor([seen])}
    before, x = copy_of(case), torch.randn(3, 7, dtype=dtype)
    with pytest.raises(ValueError, match=f"seen must be at least 0, got {seen}"):
        ops.reservoir_insert(**case, x=x)
    assert_same(case, before)


@pytest.mark.parametrize(("m", "n"), [(0, 7), (4, 0), (0, 0)])
@pytest.mark.parametrize("rows", ["drawn", "given"])
def test_a_matrix_without_elements_moves_the_counter_alone(dtype, m, n, rows):
    case = state_of(m, n, 3, dtype, capacity=OPTIONS["replay_rows"])
    case["seen"] = case["seen"] if rows == "drawn" else None
    before = copy_of(case)
    ops.commit(**case, **OPTIONS)
    assert int(case["step"]) == int(before["step"]) + 1
    assert_same(case, {**before, "step": None})


def test_a_memory_without_rows_is_an_empty_one(dtype):
    case = state_of(4, 7, 3, dtype, capacity=0, seen=2)
    plain = copy_of(case)
    ops.commit(**case, **OPTIONS)
    ops.commit(**plain, **{**OPTIONS, "replay_rows": 0})
    assert_same(case, plain)
    ops.reservoir_insert(case["memory"], case["seen"], case["x"])
    assert int(case["seen"]) == 5


def test_a_gpu_never_writes_in_front_of_the_memory():
    """The host does not wait for a counter on the device: rows in front of the memory are dropped."""
    reservoir = pytest.importorskip("ttt.ops.triton.reservoir")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    around = torch.randn(9, 6, device=device)
    before, x = around.clone(), torch.randn(5, 6, device=device)
    reservoir.reservoir_insert(around[3:7], torch.tensor([-3], device=device), x, 11)
    want = before.clone()
    want[3:5] = x[3:]
    assert torch.equal(around, want)


def window_of(rows, dtype=torch.float32, device="cpu"):
    shapes = {"win_x": (rows, 6), "win_delta": (rows, 3), "win_eta": (rows,), "win_trace": (rows, 3)}
    return {k: torch.rand(shape, dtype=dtype, device=device) for k, shape in shapes.items()}


@pytest.mark.parametrize("full", [0, 1])
@pytest.mark.parametrize("held", [-1, -3, -(2**40)])
def test_an_append_refuses_a_negative_number_of_rows(dtype, held, full):
    case = {**window_of(5, dtype), "counters": torch.tensor([held, full, 0]), "tokens": torch.tensor([9])}
    before, new = copy_of(case), window_of(2, dtype)
    with pytest.raises(ValueError, match=f"counters must hold a number of rows of at least 0, got {held}"):
        ops.window_append(**case, x=new["win_x"], delta=new["win_delta"], eta=new["win_eta"])
    assert_same(case, before)


def test_a_gpu_never_writes_in_front_of_the_window():
    append = pytest.importorskip("ttt.ops.triton.append")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    around, new = window_of(11, device=device), window_of(4, device=device)
    before = copy_of(around)
    window = [around[k][3:8] for k in ("win_x", "win_delta", "win_eta", "win_trace")]
    counters = torch.tensor([-2, 0, 0], device=device)
    append.window_append(*window, new["win_x"], new["win_delta"], new["win_eta"], new["win_trace"], 0, counters)
    for name, t in before.items():
        assert torch.equal(around[name][:3], t[:3]), name
        assert torch.equal(around[name][8:], t[8:]), name


def bound_layer(m=4, n=7, window=5, recent_seen=0, seen=2, tokens=0):
    """A ``_C.Layer`` and its tensors, each with room behind it, so that a wrong write is seen and does no harm."""
    space = {
        "weight": (m, n), "win_x": (window, n), "win_delta": (window, m), "win_trace": (window, m),
        "recent": (6, n), "recent_delta": (6, m), "memory": (6, n), "anchor": (m, n),
        "importance": (m, n), "trace": (m, n),
    }  # fmt: skip
    whole = {name: torch.rand(3 * rows, columns) for name, (rows, columns) in space.items()}
    tensors = {name: t[len(t) // 3 : 2 * len(t) // 3] for name, t in whole.items()}
    whole["win_eta"] = torch.rand(3 * window)
    tensors["win_eta"] = whole["win_eta"][window : 2 * window]
    numbers = {"recent_seen": recent_seen, "seen": seen, "step": 5, "tokens": tokens}
    counters = {name: torch.tensor([number]) for name, number in numbers.items()}
    bound = ("weight", "win_x", "win_delta", "win_eta", "win_trace", "recent", "recent_delta")
    layer = cpu._C.Layer(
        **{name: tensors[name].data_ptr() for name in bound}, bias=0, basis=0, output_basis=0,
        recent_seen=counters["recent_seen"].data_ptr(), tokens=counters["tokens"].data_ptr(), m=m, n=n, window=window,
        capacity=6, directions=0, output_directions=0, seed=7, dtype=0,
    )  # fmt: skip
    layer.prepare(
        cpu._bound_commit(
            CommitArguments(
                weight=tensors["weight"], anchor=tensors["anchor"], importance=tensors["importance"],
                trace=tensors["trace"], x=tensors["win_x"], delta=tensors["win_delta"], eta=tensors["win_eta"],
                trace_delta=tensors["win_trace"], memory=tensors["memory"], seen=counters["seen"],
                step=counters["step"], **OPTIONS,
            )
        )
    )  # fmt: skip
    return layer, {**whole, **counters}, tensors


@pytest.mark.skipif(cpu._C is None, reason="there is no kernel")
@pytest.mark.parametrize(("at", "rows"), [(-1, 1), (0, 6), (4, 2), (5, 1), (2, -1), (2**62, 2**62), (-(2**63), 1)])
def test_a_bound_layer_appends_no_rows_outside_of_its_window(at, rows):
    layer, state, _ = bound_layer()
    before = copy_of(state)
    x, delta, eta = torch.rand(6, 7), torch.rand(6, 4), torch.rand(6)
    with pytest.raises(
        ValueError, match=f"rows to append must lie in the window of 5 rows, got {rows} rows from row {at} on"
    ):
        layer.append(x.data_ptr(), delta.data_ptr(), eta.data_ptr(), delta.data_ptr(), at, rows, 1)
    assert_same(state, before)
    layer.append(x.data_ptr(), delta.data_ptr(), eta.data_ptr(), delta.data_ptr(), 3, 2, 1)
    assert torch.equal(state["win_x"][8:10], x[:2])
    assert torch.equal(state["win_eta"][8:10], eta[:2])


@pytest.mark.skipif(cpu._C is None, reason="there is no kernel")
def test_a_bound_layer_refuses_a_negative_count_of_recent_inputs():
    layer, state, _ = bound_layer(recent_seen=-2)
    before = copy_of(state)
    x, delta, eta = torch.rand(1, 7), torch.rand(1, 4), torch.rand(1)
    with pytest.raises(ValueError, match="recent_seen must be at least 0, got -2"):
        layer.append(x.data_ptr(), delta.data_ptr(), eta.data_ptr(), delta.data_ptr(), 0, 1, 1)
    assert_same(state, before)


@pytest.mark.skipif(cpu._C is None, reason="there is no kernel")
@pytest.mark.parametrize(
    ("rows", "seen", "message"),
    [(6, 2, "rows to commit must lie in the window of 5 rows, got 6 rows from row 0 on"),
     (-1, 2, "rows to commit must lie in the window of 5 rows, got -1 rows"),
     (3, -4, "seen must be at least 0, got -4")],
)  # fmt: skip
def test_a_bound_layer_commits_no_rows_outside_of_its_window(rows, seen, message):
    layer, state, _ = bound_layer(seen=seen, tokens=11)
    before = copy_of(state)
    with pytest.raises(ValueError, match=message):
        layer.commit_window(rows, 1)
    assert_same(state, before)


@pytest.mark.skipif(cpu._C is None, reason="there is no kernel")
def test_a_bound_layer_commits_what_the_reference_commits():
    layer, state, tensors = bound_layer(tokens=11)
    case = {
        **{name: tensors[name].clone() for name in ("weight", "anchor", "importance", "trace", "memory")},
        **{name: state[name].clone() for name in ("seen", "step")},
        "x": tensors["win_x"][:3].clone(), "delta": tensors["win_delta"][:3].clone(),
        "eta": tensors["win_eta"][:3].clone(), "trace_delta": tensors["win_trace"][:3].clone(),
    }  # fmt: skip
    reference.commit(*CommitArguments(**case, **OPTIONS))
    layer.commit_window(3, 1)
    for name in ("weight", "trace"):
        torch.testing.assert_close(tensors[name], case[name], rtol=1e-5, atol=1e-5)
    assert int(state["tokens"]) == 14
    assert int(state["step"]) == 6
    assert not tensors["win_eta"].any()
