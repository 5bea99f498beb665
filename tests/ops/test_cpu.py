"""The C++ kernels against the reference: every dtype, odd shapes, each instruction set forced in turn."""

import pytest
import torch
from helpers import (
    ORDER,
    as_double,
    assert_close,
    assert_commit,
    multiplies_pairs,
    trace_of_rounded_factors,
)

from ttt import _C, ops
from ttt.ops import log8, reference
from ttt.ops.arguments import CommitArguments

DTYPES = [torch.float32, torch.bfloat16]


def wide(tensors):
    return [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "tokens", "window"),
    [(1, 1, 1, 1), (7, 33, 1, 3), (64, 127, 4, 16), (129, 1000, 9, 5), (33, 1, 2, 7), (1, 64, 70, 4), (16, 32, 0, 2)],
)
def test_window_linear(isa, dtype, m, n, tokens, window):
    x, weight, bias = torch.randn(tokens, n), torch.randn(m, n), torch.randn(m)
    win_x, win_delta, win_eta = torch.randn(window, n), torch.randn(window, m), torch.rand(window)
    win_eta[0] = 0
    win_x[0] = win_delta[0] = float("nan")  # an empty row is never read
    args = [t.to(dtype) for t in (x, weight, bias, win_x, win_delta)] + [win_eta]
    before = [t.clone() for t in args]
    y = ops.window_linear(*args)
    assert y.shape == (tokens, m)
    assert y.dtype == dtype
    assert_close(y, reference.window_linear(*wide(args)), reference.window_linear(*args), "y")
    for t, old in zip(args, before, strict=True):
        assert torch.equal(t.nan_to_num(7.0), old.nan_to_num(7.0))


def test_window_linear_takes_any_leading_shape_and_no_bias(isa):
    w, wx, wd, we = torch.randn(5, 6), torch.randn(2, 6), torch.randn(2, 5), torch.rand(2)
    for shape in ((6,), (3, 6), (2, 3, 6), (0, 6), (2, 0, 6)):
        x = torch.randn(shape)
        y = ops.window_linear(x, w, None, wx, wd, we)
        expected = reference.window_linear(*wide((x, w, None, wx, wd, we)))
        assert y.shape == (*shape[:-1], 5)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def stored(values, state):
    return log8.encode(values) if state == torch.uint8 else values.to(state)


def commit_case(m, n, tokens, dtype, state):
    weight = torch.randn(m, n)
    return {
        "weight": weight.to(dtype),
        "anchor": (weight + 0.1 * torch.randn(m, n)).to(dtype),
        "importance": stored(torch.rand(m, n) * 3, state),
        "trace": stored(torch.rand(m, n), state),
        "x": torch.randn(tokens, n).to(dtype),
        "delta": torch.randn(tokens, m).to(dtype),
        "eta": torch.rand(tokens) * 0.02,
        "trace_delta": torch.randn(tokens, m).to(dtype),
        "memory": torch.randn(10, n).to(dtype),
        "seen": torch.tensor([25]),
        "step": torch.tensor([5]),
    }


def run_reference(case, options):
    reference.commit(*CommitArguments(**case, **options))


def check_commit(case, options):
    """Runs the kernel, the reference at the same dtype and in float64; compares all state."""
    n = case["x"].shape[1]
    exact = {k: None if t is None else as_double(t, n).clone() for k, t in case.items()}
    plain = {k: None if t is None else t.clone() for k, t in case.items()}
    ours = {k: None if t is None else t.clone() for k, t in case.items()}
    ops.commit(**ours, **options)
    run_reference(plain, options)
    run_reference(exact, options)
    pairs = multiplies_pairs(_C.active_isa()) and case["weight"].dtype == torch.bfloat16
    if pairs and options["kind"] != "si" and case["trace"] is not None and len(case["x"]):
        plain["trace"] = trace_of_rounded_factors(case, options)
    assert_commit(case, ours, exact, plain)


OPTIONS = {"seed": 123456789123, "beta": 0.3, "eps": 1e-3, "gamma": 0.99, "kind": "fisher"}


@pytest.mark.parametrize("state", [*DTYPES, torch.uint8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "tokens", "rows"),
    [(1, 1, 1, 1), (7, 33, 1, 3), (64, 128, 16, 4), (129, 200, 9, 0), (33, 1, 2, 1), (1, 1000, 70, 16), (50, 70, 0, 5),
     (127, 1000, 33, 7)],
)  # fmt: skip
def test_commit(isa, dtype, state, m, n, tokens, rows):
    check_commit(commit_case(m, n, tokens, dtype, state), {**OPTIONS, "replay_rows": rows, "lam": 0.5})


@pytest.mark.parametrize("kind", ["fisher", "mas", "si"])
@pytest.mark.parametrize("lam", [0.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_commit_modes(isa, kind, lam, dtype):
    case = commit_case(34, 45, 13, dtype, torch.float32)
    check_commit(case, {**OPTIONS, "kind": kind, "lam": lam, "replay_rows": 4, "beta": 0.05})


@pytest.mark.parametrize("missing", ["trace", "importance", "anchor", "memory", "trace_delta"])
def test_commit_without_optional_state(isa, missing):
    case = commit_case(19, 37, 5, torch.float32, torch.float32)
    case[missing] = None
    options = {**OPTIONS, "replay_rows": 3, "lam": 0.5}
    if missing in ("importance", "anchor"):
        options["lam"] = 0.0
    if missing in ("memory", "anchor"):
        options["replay_rows"] = 0
    check_commit(case, options)


@pytest.mark.parametrize(("tokens", "n"), [(150, 2060), (300, 1030), (530, 1030)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_commit_over_several_cache_groups(isa, dtype, tokens, n):
    # X is larger than 1 MB, so panels are processed in groups, and rows in several blocks.
    case = commit_case(100, n, tokens, dtype, torch.float32)
    check_commit(case, {**OPTIONS, "replay_rows": 5, "lam": 0.5})


@pytest.mark.parametrize("every", [2, 3, 50])
@pytest.mark.parametrize("kind", ["fisher", "mas", "si"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_commit_with_a_sampled_trace(isa, kind, dtype, every):
    case = commit_case(34, 75, 41, dtype, torch.float32)
    check_commit(case, {**OPTIONS, "kind": kind, "lam": 0.3, "replay_rows": 2, "trace_every": every})


@pytest.mark.parametrize("dtype", DTYPES)
def test_commit_with_one_rate_for_all_tokens(isa, dtype):
    case = commit_case(34, 75, 41, dtype, torch.float32)
    case["eta"].fill_(0.013)
    check_commit(case, {**OPTIONS, "lam": 0.3, "replay_rows": 2})


@pytest.mark.parametrize("state", [torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_with_the_same_bits_as_the_reference(isa, dtype, state):
    """Products of small integers are exact in float32 and in bfloat16, so every backend must store the same state."""
    m, n, tokens = 33, 127, 8
    case = commit_case(m, n, tokens, dtype, state)
    case["x"] = torch.randint(-3, 4, (tokens, n)).to(dtype)
    case["delta"] = torch.randint(-3, 4, (tokens, m)).to(dtype)
    case["eta"] = torch.full((tokens,), 2.0**-9)
    case["weight"] = torch.randint(-64, 64, (m, n)).to(dtype)
    case["trace"] = stored(torch.randint(0, 99, (m, n)).float(), state)
    case["trace_delta"] = None
    ours, theirs = ({k: None if t is None else t.clone() for k, t in case.items()} for _ in range(2))
    options = {**OPTIONS, "replay_rows": 0, "lam": 0.0, "gamma": 1.0}
    ops.commit(**ours, **options)
    run_reference(theirs, options)
    assert torch.equal(ours["weight"], theirs["weight"])
    assert torch.equal(ours["trace"], theirs["trace"])
    assert float((ours["weight"] != case["weight"]).float().mean()) > 0.05


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_of_every_exponent_are_read_and_written_as_they_are(isa, dtype):
    """Blocks with all exponents, with smallest codes from 2^-141 on, to which a commit adds zeros."""
    m, n = 254, 95
    case = commit_case(m, n, 3, dtype, torch.uint8)
    codes = torch.randint(256, (m, n), dtype=torch.uint8)
    codes[:, [5, 32, 70]] = 255  # the maximum of a block, which determines its exponent
    codes[:, [6, 33, 71]] = torch.tensor([0, 1, 2], dtype=torch.uint8)
    case["trace"] = torch.cat([codes, torch.arange(m).clamp_min(2).to(torch.uint8).view(-1, 1).expand(m, 3)], dim=1)
    case["trace_delta"] = torch.zeros(3, m, dtype=dtype)
    before = case["trace"].clone()
    ops.commit(**case, **{**OPTIONS, "replay_rows": 0, "lam": 0.5, "gamma": 1.0})
    assert torch.equal(case["trace"], before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_of_values_that_become_small_in_their_block(isa, dtype):
    """One column of each block grows by 2^18; the rest falls below the smallest code, is rounded to it or to 0."""
    m, n, tokens = 40, 150, 8
    case = commit_case(m, n, tokens, dtype, torch.uint8)
    case["x"] = torch.where(torch.arange(n) % 32 == int(torch.randint(22, ())), 64.0, 0.0).expand(tokens, n).to(dtype)
    case["x"] = case["x"].contiguous()
    case["trace_delta"] = torch.randint(-3, 4, (tokens, m)).to(dtype)
    case["trace"] = log8.encode((1 + torch.randint(16, (m, n)) / 16) * 2.0 ** torch.randint(-16, 5, (m, n)))
    ours, theirs = ({k: t.clone() for k, t in case.items()} for _ in range(2))
    options = {**OPTIONS, "replay_rows": 0, "lam": 0.5, "gamma": 1.0}
    ops.commit(**ours, **options)
    run_reference(theirs, options)
    assert torch.equal(ours["trace"], theirs["trace"])
    assert float((ours["trace"][:, :n] <= 1).float().mean()) > 0.5
    assert bool((ours["trace"][:, :n] == 1).any())


@pytest.mark.parametrize("state", DTYPES)
@pytest.mark.parametrize("rows", [0, 2])
def test_numbers_that_are_not_finite_stay_so(isa, state, rows):
    """Rounding must not turn a NaN into zero, whatever its bits, and must not change other rows."""
    m, n = 20, 70
    case = commit_case(m, n, 5, torch.bfloat16, state)
    options = {**OPTIONS, "replay_rows": rows, "lam": 0.5}
    good, bad = ({k: t.clone() for k, t in case.items()} for _ in range(2))
    bad["weight"].view(torch.int16)[3, [0, 9, 33, 69]] = torch.tensor([0x7FFF, -1, 0x7F80, -128], dtype=torch.int16)
    bad["importance"][4, 10:12] = float("nan")
    if state == torch.float32:
        bad["importance"].view(torch.int32)[5, 7] = -1
    for one in (good, bad):
        ops.commit(**one, **options)
    assert bool(bad["weight"][3, [0, 9]].isnan().all())
    assert not bool(bad["weight"][3, [33, 69]].isfinite().any())
    assert bool(bad["weight"][4, 10:12].isnan().all())
    assert state != torch.float32 or bool(bad["weight"][5, 7].isnan())
    same = torch.ones(m, n, dtype=torch.bool)
    same[3] = False
    same[4, 10:12] = same[5, 7] = False
    assert torch.equal(good["weight"][same], bad["weight"][same])


@pytest.mark.parametrize("bits", [-1, 0x7FFFFFFF])
def test_a_nan_with_all_bits_set_stays_one_wherever_it_comes_from(isa, bits):
    """Other devices make such NaNs; rounding must not turn them into zero."""
    case = commit_case(20, 70, 5, torch.bfloat16, torch.float32)
    case["momentum"] = torch.randn(20, 70)
    rated, moved = ({k: t.clone() for k, t in case.items()} for _ in range(2))
    rated["eta"].view(torch.int32)[3] = bits
    moved["momentum"].view(torch.int32)[6, [0, 37, 69]] = bits
    for one in (rated, moved):
        ops.commit(**one, **OPTIONS, replay_rows=0, lam=0.5, mu=0.5)
    assert bool(rated["weight"].isnan().all())
    assert moved["weight"].isnan().nonzero().tolist() == [[6, 0], [6, 37], [6, 69]]
    del rated["momentum"]
    rated["weight"] = case["weight"].clone()
    ops.commit(**rated, **OPTIONS, replay_rows=2, lam=0.5)
    assert bool(rated["weight"].isnan().all())


def test_mixed_state_dtypes_use_the_reference_and_say_so():
    from ttt.ops.backends import calls

    calls.clear()
    case = commit_case(5, 7, 3, torch.float32, torch.float32)
    check_commit({**case, "trace": case["trace"].bfloat16()}, {**OPTIONS, "replay_rows": 0, "lam": 0.5})
    assert calls["commit", "reference", "no C++ kernel for importance and trace of different dtypes"] == 1


def test_zero_rate_changes_no_bit_of_the_weight(isa):
    case = commit_case(20, 30, 5, torch.float32, torch.float32)
    case["eta"].zero_()
    before = case["weight"].clone()
    ops.commit(**case, **{**OPTIONS, "replay_rows": 0, "lam": 3.0})
    assert torch.equal(case["weight"], before)


def test_result_does_not_depend_on_threads():
    case = commit_case(200, 300, 20, torch.bfloat16, torch.bfloat16)
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        one = {k: t.clone() for k, t in case.items()}
        ops.commit(**one, **{**OPTIONS, "replay_rows": 4, "lam": 0.5})
        results.append(one)
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(results[0]["weight"], other["weight"])
        assert torch.equal(results[0]["trace"], other["trace"])


def test_version_counters_move():
    case = commit_case(4, 5, 2, torch.float32, torch.float32)
    versions = {k: case[k]._version for k in ORDER}
    ops.commit(**case, **{**OPTIONS, "replay_rows": 2, "lam": 0.5})
    moved = {k for k in ORDER if case[k]._version > versions[k]}
    assert moved == {"weight", "trace", "step"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gate(dtype):
    """A closed gate changes no bit and no version, in the kernel and in the reference; an open one has no effect."""
    case = commit_case(9, 40, 5, torch.float32, torch.float32)
    case = {k: as_double(t, 40) if dtype == torch.float64 else t for k, t in case.items()}
    options = {**OPTIONS, "replay_rows": 2, "lam": 0.5}
    state = {k: t.clone() for k, t in case.items()}
    versions = {k: t._version for k, t in state.items()}
    ops.commit(**state, **options, gate=torch.tensor([0]))
    ops.reservoir_insert(state["memory"], state["seen"], state["x"], gate=torch.tensor([0]))
    assert all(torch.equal(t, case[k]) and t._version == versions[k] for k, t in state.items())
    opened, plain = ({k: t.clone() for k, t in case.items()} for _ in range(2))
    for one, gate in ((opened, {"gate": torch.tensor([3])}), (plain, {})):
        ops.commit(**one, **options, **gate)
        ops.reservoir_insert(one["memory"], one["seen"], one["x"], **gate)
    assert all(torch.equal(opened[k], plain[k]) for k in case)
    assert int(opened["step"]) == int(case["step"]) + 1
    assert int(opened["seen"]) == int(case["seen"]) + 5


def test_opcheck():
    case = commit_case(4, 5, 3, torch.float32, torch.float32)
    args = (case["x"], case["weight"], None, torch.randn(2, 5), torch.randn(2, 4), torch.rand(2))
    torch.library.opcheck(torch.ops.ttt.window_linear.default, args)
    o = {**OPTIONS, "replay_rows": 2, "lam": 0.5}
    args = tuple(case[k] for k in ORDER) + tuple(
        o[k] for k in ("seed", "replay_rows", "beta", "eps", "lam", "gamma", "kind")
    )
    torch.library.opcheck(torch.ops.ttt.commit.default, args)
    torch.library.opcheck(torch.ops.ttt.commit.default, args, {"trace_every": 2, "gate": torch.tensor([1])})
    memory, seen = torch.zeros(3, 5), torch.tensor([2])
    torch.library.opcheck(torch.ops.ttt.reservoir_insert.default, (memory, seen, torch.randn(4, 5), 1))
    gated = {"gate": torch.tensor([1])}
    torch.library.opcheck(torch.ops.ttt.reservoir_insert.default, (memory, seen, torch.randn(4, 5), 1), gated)
    torch.library.opcheck(torch.ops.ttt.reservoir_draw.default, (seen, torch.tensor([3]), 3, 6, 1))


def test_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="isa must be one that this processor has"):
        _C.set_isa("sse9")


def test_other_dtypes_use_the_reference_and_say_so():
    from ttt.ops.backends import calls

    calls.clear()
    args = [t.double() for t in (torch.randn(3, 5), torch.randn(4, 5), torch.randn(2, 5), torch.randn(2, 4))]
    ops.window_linear(args[0], args[1], None, args[2], args[3], torch.rand(2).double())
    assert calls["window_linear", "reference", "no C++ kernel for torch.float64"] == 1
