"""The Triton kernels compared with the reference, on a GPU or in Triton's interpreter."""

import pytest
import torch
from helpers import ORDER, as_double, assert_close, assert_commit, trace_of_rounded_factors

from ttt.ops import log8, reference
from ttt.ops.triton import commit as fused
from ttt.ops.triton import panels
from ttt.ops.triton.commit import commit
from ttt.ops.triton.common import INTERPRETED
from ttt.ops.triton.reservoir import reservoir_draw, reservoir_insert
from ttt.ops.triton.window_linear import window_linear

DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter rounds float32 to bfloat16 wrongly, so there bfloat16 is only tested where nothing is rounded.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
SEEDS = [123456789123, 1, 2**64 - 5]


@pytest.fixture(autouse=True)
def scratch_is_nan():
    """Fill uninitialised memory with NaN, to detect reads before writes."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape):
    return torch.randn(shape, device=DEVICE)


def wide(tensors):
    return [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in tensors]


def unchanged(t, old):
    return t is None or torch.equal(t.nan_to_num(7.0), old.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "tokens", "window"),
    [(1, 1, 1, 1), (7, 33, 1, 3), (33, 127, 1, 17), (1, 600, 1, 0), (16, 32, 0, 2), (33, 1, 2, 7), (65, 127, 5, 16),
     (9, 300, 16, 1), (1, 64, 33, 4), (70, 127, 33, 33), (7, 20, 20, 0)],
)  # fmt: skip
def test_window_linear(dtype, m, n, tokens, window):
    args = [t.to(dtype) for t in (randn(tokens, n), randn(m, n), randn(m), randn(window, n), randn(window, m))]
    args.append(torch.rand(window, device=DEVICE))
    if window > 1:
        args[5][window // 2] = 0
        args[3][window // 2] = args[4][window // 2] = float("nan")  # an empty row is never read
    before = [t.clone() for t in args]
    y = window_linear(*args)
    assert (y.shape, y.dtype) == ((tokens, m), dtype)
    assert_close(y, reference.window_linear(*wide(args)), plain_window_linear(*args), "y")
    assert all(unchanged(t, old) for t, old in zip(args, before, strict=True))


def plain_window_linear(x, weight, bias, win_x, win_delta, win_eta):
    """The formula in plain torch at this dtype, without the empty rows."""
    live = win_eta != 0
    wx, wd, eta = win_x[live], win_delta[live], win_eta[live].to(x.dtype)
    return torch.nn.functional.linear(x, weight, bias) - ((x @ wx.T) * eta) @ wd


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (0, 6), (2, 0, 6), (5, 4, 6)])
def test_window_linear_takes_any_leading_shape_and_no_bias(shape):
    args = (randn(*shape), randn(5, 6), None, randn(2, 6), randn(2, 5), torch.rand(2, device=DEVICE))
    y = window_linear(*args)
    assert y.shape == (*shape[:-1], 5)
    assert_close(y, reference.window_linear(*wide(args)), reference.window_linear(*args), "y")


OPTIONS = {
    "seed": SEEDS[0], "replay_rows": 3, "beta": 0.3, "eps": 1e-3, "lam": 0.5, "gamma": 0.9,
    "kind": "fisher",
}  # fmt: skip


@pytest.fixture(params=["fused", "panels"])
def path(request, monkeypatch):
    """The kernel for few tokens, or that for many with panels of 128 columns, used for any number of tokens."""
    monkeypatch.setattr(fused, "FEW_TOKENS", 10**9 if request.param == "fused" else 0)
    monkeypatch.setattr(panels, "PANEL_BYTES", 1)
    return request.param


def stored(values, state):
    return log8.encode(values) if state == torch.uint8 else values.to(state)


def commit_case(m, n, tokens, dtype, state=torch.float32):
    weight = randn(m, n)
    return {
        "weight": weight.to(dtype),
        "anchor": (weight + 0.1 * randn(m, n)).to(dtype),
        "importance": stored(3 * torch.rand(m, n, device=DEVICE), state),
        "trace": stored(torch.rand(m, n, device=DEVICE), state),
        "x": randn(tokens, n).to(dtype),
        "delta": randn(tokens, m).to(dtype),
        "eta": 0.02 * torch.rand(tokens, device=DEVICE),
        "trace_delta": randn(tokens, m).to(dtype),
        "memory": randn(10, n).to(dtype),
        "seen": torch.tensor([25], device=DEVICE),
        "step": torch.tensor([5], device=DEVICE),
    }


NAMES = (*OPTIONS, "trace_every", "gate")


def run(function, case, options, convert=lambda t: t):
    """The state after ``function``, which gets copies of all tensors."""
    after = {k: None if t is None else convert(t).clone() for k, t in case.items()}
    o = {"trace_every": 1, "gate": None} | options
    function(*[after[k] for k in ORDER], *(o[k] for k in NAMES))
    return after


def check_commit(case, options):
    ours = run(commit, case, options)
    plain = run(reference.commit, case, options)
    exact = run(reference.commit, case, options, lambda t: as_double(t, case["x"].shape[1]))
    if case["trace"] is not None and case["weight"].dtype == torch.bfloat16 and options["kind"] != "si":
        plain["trace"] = trace_of_rounded_factors(case, options)
    assert_commit(case, ours, exact, plain)
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "tokens", "rows"),
    [(1, 1, 1, 3), (7, 33, 1, 0), (33, 127, 5, 3), (65, 7, 33, 16), (1, 70, 0, 16), (127, 1, 5, 0), (5, 9, 0, 0),
     (9, 20, 2, 17), (66, 261, 17, 4)],
)  # fmt: skip
def test_commit(path, dtype, m, n, tokens, rows):
    state = torch.float32 if rows else torch.bfloat16
    check_commit(commit_case(m, n, tokens, dtype, state), {**OPTIONS, "replay_rows": rows})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["fisher", "mas", "si"])
@pytest.mark.parametrize("lam", [0.0, 30.0])
@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_commit_kinds(path, dtype, kind, lam, gamma):
    check_commit(commit_case(34, 45, 19, dtype), {**OPTIONS, "kind": kind, "lam": lam, "gamma": gamma})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "tokens"), [(1, 1, 1), (7, 33, 5), (65, 64, 17), (3, 31, 0), (66, 161, 2)])
def test_commit_with_state_in_8_bits(path, dtype, m, n, tokens):
    check_commit(commit_case(m, n, tokens, dtype, torch.uint8), OPTIONS)


def test_mixed_state_dtypes(path):
    for one, other in ((torch.uint8, torch.bfloat16), (torch.float32, torch.uint8)):
        case = commit_case(17, 45, 5, torch.float16, one)
        check_commit({**case, "trace": commit_case(17, 45, 5, torch.float16, other)["trace"]}, OPTIONS)


@pytest.mark.parametrize("every", [2, 3, 50])
@pytest.mark.parametrize("kind", ["fisher", "mas", "si"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_commit_with_a_sampled_trace(path, dtype, kind, every):
    case = commit_case(34, 75, 41, dtype)
    check_commit(case, {**OPTIONS, "kind": kind, "replay_rows": 2, "trace_every": every})


def test_a_drift_of_many_slabs(path, monkeypatch):
    blocks = fused.replay._BLOCKS
    monkeypatch.setitem(blocks, torch.float32, {**blocks[torch.float32], "SLAB": 32})
    check_commit(commit_case(3, 100, 70, torch.float32), {**OPTIONS})


@pytest.mark.parametrize("state", [torch.float32, torch.uint8])
def test_a_closed_gate_changes_nothing_and_an_open_one_everything(path, state):
    case = commit_case(19, 45, 5, torch.float16, state)
    options = {**OPTIONS}
    case["x"][1, 3] = float("nan")
    closed = run(commit, case, {**options, "gate": torch.tensor([0], device=DEVICE)})
    assert all(unchanged(closed[k], case[k]) for k in ORDER)
    case["x"][1, 3] = 1
    opened, plain = (run(commit, case, {**options, "gate": g}) for g in (torch.tensor([7], device=DEVICE), None))
    assert all(torch.equal(opened[k], plain[k]) for k in ORDER)
    assert not torch.equal(opened["weight"], case["weight"])


def test_the_gate_of_a_matrix_without_columns_still_counts():
    case = commit_case(5, 0, 3, torch.float32)
    for gate in (0, 1):
        after = run(commit, case, {**OPTIONS, "gate": torch.tensor([gate], device=DEVICE), "replay_rows": 0})
        assert int(after["step"]) == int(case["step"]) + gate


@pytest.mark.parametrize("missing", ["trace", "importance", "anchor", "memory", "trace_delta"])
def test_commit_without_optional_state(path, missing):
    case = commit_case(19, 37, 5, torch.float32)
    case[missing] = None
    options = dict(OPTIONS)
    if missing in ("importance", "anchor"):
        options["lam"] = 0.0
    if missing in ("memory", "anchor"):
        options["replay_rows"] = 0
        case["seen"] = case["memory"] = None
    check_commit(case, options)


def test_an_empty_memory_replays_nothing(path):
    case = commit_case(9, 17, 5, torch.float32)
    case["seen"].zero_()
    case["memory"].fill_(float("nan"))
    options = {**OPTIONS}
    ours = run(commit, case, options)
    without = run(commit, case, {**options, "replay_rows": 0})
    assert torch.equal(ours["weight"], without["weight"])
    assert torch.equal(ours["trace"], without["trace"])


def test_rows_beyond_those_seen_are_never_read():
    case = commit_case(9, 17, 5, torch.float32)
    case["seen"].fill_(4)
    case["memory"][4:] = float("nan")
    ours = run(commit, case, {**OPTIONS, "replay_rows": 16})
    assert torch.isfinite(ours["weight"]).all()


@pytest.mark.parametrize("eps", [1e-3, 0.0])
def test_degenerate_replay_rows(eps):
    case = commit_case(6, 40, 3, torch.float32)
    case["memory"].zero_()
    check_commit(case, {**OPTIONS, "eps": eps})
    case["memory"][:] = randn(40)  # R copies of one row: the system can be solved only with the ridge
    check_commit(case, {**OPTIONS, "eps": 1e-3})


@pytest.mark.parametrize(("seed", "every"), [(SEEDS[0], 2), (SEEDS[1], 1), (SEEDS[2], 1)])
@pytest.mark.parametrize("kind", ["fisher", "si"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_bits_are_the_reference_s(path, dtype, every, kind, seed):
    """All sums are exact in float32, so every backend must store the same 16-bit weights and traces."""
    m, n, tokens = 33, 135, 5
    case = commit_case(m, n, tokens, dtype, torch.bfloat16)
    for name in ("x", "delta", "trace_delta"):
        case[name] = torch.randint(-3, 4, case[name].shape, device=DEVICE).to(dtype)
    case["weight"] = torch.randint(-512, 513, (m, n), device=DEVICE).div(64).to(dtype)
    case["anchor"] = case["importance"] = case["memory"] = case["seen"] = None
    case["trace"] = torch.randint(0, 100, (m, n), device=DEVICE).bfloat16()
    case["eta"] = torch.full((tokens,), 2.0**-12, device=DEVICE)
    case["step"].fill_(2**32 + 7)
    options = {**OPTIONS, "seed": seed, "replay_rows": 0, "lam": 0.0, "gamma": 1.0, "kind": kind, "trace_every": every}
    ours, theirs = run(commit, case, options), run(reference.commit, case, options)
    assert not torch.equal(ours["weight"], case["weight"])
    for name in ("weight", "trace", "step"):
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("n", [1, 32, 75, 160])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_codes_of_8_bits_are_the_reference_s(path, dtype, n):
    m, tokens = 35, 5
    case = commit_case(m, n, tokens, dtype, torch.uint8)
    for name in ("x", "delta", "trace_delta"):
        case[name] = torch.randint(-3, 4, case[name].shape, device=DEVICE).to(dtype)
    case["weight"] = torch.randint(-512, 513, (m, n), device=DEVICE).div(64).to(dtype)
    case["anchor"] = case["memory"] = case["seen"] = case["importance"] = None
    trace = torch.randint(0, 2000, (m, n), device=DEVICE).float()
    trace[:4] = 0
    case["trace"] = log8.encode(trace)
    case["x"][:, : n // 2] = 0  # blocks of zeros, and codes that must survive
    options = {**OPTIONS, "replay_rows": 0, "lam": 0.0, "gamma": 1.0}
    ours, theirs = run(commit, case, options), run(reference.commit, case, options)
    assert torch.equal(ours["trace"], theirs["trace"])
    assert not torch.equal(ours["trace"], case["trace"])


def test_importance_in_8_bits_is_what_the_reference_decodes(path):
    """One entry of Omega at a time, with powers of two, so that the proximal step is exact."""
    case = commit_case(1, 96, 1, torch.float32, torch.uint8)
    case["x"].zero_()
    case["eta"].fill_(1)
    case["weight"].fill_(2.0)
    case["anchor"].fill_(1.0)
    case["importance"] = log8.encode((2.0 ** torch.arange(-48, 48, device=DEVICE) - 1).clamp_min(0).view(1, 96))
    options = {**OPTIONS, "replay_rows": 0, "lam": 1.0}
    ours, theirs = run(commit, case, options), run(reference.commit, case, options)
    torch.testing.assert_close(ours["weight"], theirs["weight"], rtol=3e-7, atol=0)


def test_weights_that_are_not_finite_stay_so():
    case = commit_case(4, 9, 2, torch.float16)
    case["weight"][0, 0], case["weight"][1, 1] = float("inf"), float("-inf")
    ours = run(commit, case, {**OPTIONS, "replay_rows": 0, "lam": 0.0})
    assert ours["weight"][0, 0] == float("inf")
    assert ours["weight"][1, 1] == float("-inf")
    assert torch.isfinite(ours["weight"]).sum() == 34


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("seen", "capacity", "rows"), [(0, 5, 3), (3, 5, 7), (900, 33, 130), (2**31, 127, 1), (5, 5, 0)]
)
def test_reservoir_draw(seed, seen, capacity, rows):
    for count in (0, 3, 2**32 + 1):
        args = [torch.tensor([v], device=DEVICE) for v in (seen, count)]
        assert torch.equal(
            reservoir_draw(*args, capacity, rows, seed), reference.reservoir_draw(*args, capacity, rows, seed)
        )


@pytest.fixture(params=["first", "last"])
def program_that_runs_first(request, monkeypatch):
    """Whether the first or the last program runs first: a GPU does not run them in order, as the interpreter does."""
    if not INTERPRETED or request.param == "first":
        return
    from triton.runtime.interpreter import interpreter_builder as builder

    run_as = builder.set_grid_idx
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: run_as(builder.grid_dim[0] - 1 - x, y, z))


@pytest.mark.parametrize("gate", [0, -3])
def test_a_gate_of_reservoir_insert(gate):
    memory, seen, x = randn(4, 5), torch.tensor([3], device=DEVICE), randn(6, 5)
    ours, theirs = ((memory.clone(), seen.clone()) for _ in range(2))
    reservoir_insert(*ours, x, 11, torch.tensor([gate], device=DEVICE))
    reference.reservoir_insert(*theirs, x, 11, torch.tensor([gate], device=DEVICE))
    for a, b, start in zip(ours, theirs, (memory, seen), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, start) == (gate == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("capacity", "n", "seed"), [(1, 7, SEEDS[0]), (5, 33, SEEDS[1]), (8, 1, SEEDS[2])])
def test_reservoir_insert(program_that_runs_first, dtype, capacity, n, seed):
    """Many rows are inserted at the same place, and the last of them must stay."""
    ours = torch.zeros(capacity, n, dtype=dtype, device=DEVICE)
    theirs, seen = ours.clone(), [torch.zeros(1, dtype=torch.int64, device=DEVICE) for _ in range(2)]
    for tokens in (3, 1, 0, 33, 140):
        x = randn(tokens, n).to(dtype)
        reservoir_insert(ours, seen[0], x, seed)
        reference.reservoir_insert(theirs, seen[1], x, seed)
        assert torch.equal(ours, theirs)
        assert torch.equal(*seen)
