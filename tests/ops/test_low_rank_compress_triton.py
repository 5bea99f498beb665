"""low_rank_compress's Triton kernels (in the interpreter, without a GPU): dense float64 matrices and the reference."""

import pytest
import torch
from test_low_rank_compress import assert_bookkeeping, delta_of, state_of, truncated

from ttt.ops import backends, rounding
from ttt.ops.low_rank import cuda, reference
from ttt.ops.triton.common import INTERPRETED
from ttt.ops.triton.low_rank_compress import MOST_ROWS, low_rank_compress, why_not

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of the change's norm, as for the C++ kernels; of float16 as for the reference.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.5e-2, torch.float16: 3e-3}
PLAIN = {
    "rank": 4, "lam": 0.0, "importance_m": None, "importance_n": None, "memory": None,
    "seen": None, "seed": 5, "replay_rows": 0, "beta": 0.3, "eps": 1e-2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def scratch_is_nan():
    """Fills uninitialised memory with NaN, so that what is read before it is written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def moved(t, device):
    return t.to(device) if torch.is_tensor(t) else t


def compress(state, slots, function=low_rank_compress, device=DEVICE, **options):
    """The state afterwards, on the CPU."""
    after = [t.clone().to(device) for t in state]
    options = {k: moved(v, device) for k, v in (PLAIN | options).items()}
    function(*after, torch.tensor(slots, dtype=torch.int64, device=device), *options.values())
    return [t.cpu() for t in after]


def same(old, new):
    return torch.equal(old.nan_to_num(7.0), new.nan_to_num(7.0))


def assert_near(after, u, want, scale, dtype):
    error = (delta_of(*after[:3], u) - want).norm()
    assert error <= TOLERANCE[dtype] * scale, f"slot {u}: off by {float(error / scale):.3g} of the change's norm"


@pytest.mark.parametrize(
    ("dtype", "capacity", "n", "m", "rank"),
    [(torch.float32, 9, 33, 20, 4), (torch.float32, 7, 40, 130, 3), (torch.float32, 6, 1, 3, 2),
     (torch.float32, 18, 5, 1030, 2), (torch.float32, 70, 3, 9, 20), (torch.bfloat16, 7, 40, 130, 3),
     (torch.bfloat16, 18, 5, 30, 2), (torch.float16, 9, 33, 20, 4)],
)  # fmt: skip
def test_the_largest_singular_values_stay(dtype, capacity, n, m, rank):
    """Slots that are full, partly filled, of no more than ``rank`` rows, empty; one that is not named, and no slot."""
    state = state_of(6, capacity, n, m, dtype)
    state[2][:] = torch.tensor([capacity, capacity - 1, rank, 0, capacity, rank + 1])
    for u, held in enumerate(state[2].tolist()):
        state[0][u, held:], state[1][u, held:] = torch.nan, torch.nan
    chosen, losses = [5, -1, 0, 2, 3, 1], {}
    after = compress(state, chosen, rank=rank)
    for u in (0, 1, 2, 5):
        delta = delta_of(*state[:3], u)
        want, lost = truncated(delta, rank) if int(state[2][u]) > rank else (delta, 0.0)
        losses[u] = lost
        assert_near(after, u, want, delta.norm(), dtype)
    assert_bookkeeping(state, after, [0, 1, 2, 3, 5], rank, losses)
    for old, new in zip(state[:2], after[:2], strict=True):
        assert torch.equal(old[2, :rank], new[2, :rank])  # nothing to do


def test_factors_that_are_hard_to_decompose():
    capacity, n, m, rank, dtype = 8, 20, 30, 3, torch.float32
    state = state_of(9, capacity, n, m, dtype)
    a, b = state[0], state[1]
    a[0, 4:] = a[0, :4].clone()  # identical tokens
    b[0, 6:] = b[0, :2]
    a[1] = a[1, :1].clone()
    a[2], b[2] = torch.eye(capacity, n), torch.eye(capacity, m) * 0.5  # all singular values alike
    a[3, ::2], b[3, ::3] = 0, 0
    b[4] = 0
    a[5] *= torch.logspace(0, -12, capacity).unsqueeze(1)
    scale = torch.logspace(-17, 17, capacity).unsqueeze(1)  # of unlike size, though their products are not
    a[6] *= scale
    b[6] /= scale
    a[7], b[7] = torch.randn(capacity, 2) @ torch.randn(2, n), torch.randn(capacity, 2) @ torch.randn(2, m)
    a[8] += 30 * torch.randn(n)  # rows nearly parallel
    after = compress(state, list(range(9)), rank=rank)
    for u in range(9):
        delta = delta_of(*state[:3], u)
        want, lost = truncated(delta, rank)
        if u != 2:  # any three of equal ones
            assert_near(after, u, want, delta.norm(), dtype)
        assert abs(float(after[4][u] - state[4][u]) - lost) <= 1e-6 + 1e-6 * float(delta.norm())
        assert int(after[2][u]) == rank
        assert all(bool(torch.isfinite(t[u, :rank]).all() and (t[u, rank:] == 0).all()) for t in after[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_and_tiny_rows_stay_finite(dtype):
    sizes = [(1e30, 1e-30), (1e-30, 1e25), (1e-20, 1e-18), (1e15, 1e20), (3e38, 3e38)]
    state = state_of(len(sizes), 8, 20, 15, dtype)
    for u, size in enumerate(sizes):
        for t, factor in zip(state[:2], size, strict=True):
            t[u] = ((torch.rand_like(t[u], dtype=torch.float32) - 0.5) * factor).to(dtype)
    after = compress(state, list(range(len(sizes))), rank=3)
    assert all(bool(torch.isfinite(t).all()) for t in (after[0], after[1], after[4]))
    for u, (in_a, in_b) in enumerate(sizes):
        delta = delta_of(*state[:3], u)
        if in_a * in_b < 1e60:
            assert_near(after, u, truncated(delta, 3)[0], delta.norm(), dtype)
        else:
            assert float(after[4][u]) == torch.finfo(torch.float32).max


def options_of(n, m, dtype, **more):
    return {
        "lam": 0.9, "importance_m": torch.rand(m) ** 3 * 4, "importance_n": torch.rand(n) ** 3 * 4,
        "memory": (torch.randn(20, n) / n**0.5).to(dtype), "seen": torch.tensor([11]), "seed": 2**64 - 5,
        "replay_rows": 5, **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "capacity", "n", "m", "rank", "more"),
    [*((dtype, 7, 33, 20, 4, {}) for dtype in DTYPES), (torch.float32, 5, 140, 31, 8, {}),
     (torch.float32, 7, 33, 20, 4, {"lam": 0.0}),
     (torch.float32, 7, 33, 20, 4, {"replay_rows": 0}), (torch.float32, 7, 33, 20, 4, {"seen": torch.tensor([0])})],
)  # fmt: skip
def test_replay_and_pull(dtype, capacity, n, m, rank, more):
    """Against the reference, which is tested against the formulas on dense matrices."""
    state = state_of(4, capacity, n, m, dtype)
    state[3] *= 0.1
    state[2][1:3] = torch.tensor([3, 0])
    state[0][1, 3:], state[1][1, 3:], state[0][2], state[1][2] = torch.nan, torch.nan, torch.nan, torch.nan
    options = options_of(n, m, dtype, rank=rank, **more)
    after = compress(state, [1, 0, 2], **options)
    want = compress(state, [1, 0, 2], reference.low_rank_compress, "cpu", **options)
    for u in (0, 1):
        assert_near(after, u, delta_of(*want[:3], u), delta_of(*state[:3], u).norm(), dtype)
    assert_bookkeeping(state, after, [0, 1, 2], rank, {0: float(want[4][0] - state[4][0])})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_rows_are_rounded_by_the_references_bits(dtype):
    """All elements but those that another order of sums puts across a rounding's edge."""
    state, options = state_of(1, 12, 130, 75, dtype), options_of(130, 75, dtype, rank=12, replay_rows=0, seed=9)
    wide = [t.float() if t.dtype == dtype else t for t in state]
    got, exact = compress(state, [0], **options), compress(wide, [0], **options)
    for new, value in zip(got[:2], exact[:2], strict=False):
        want = torch.empty_like(new[0])
        rounding.stochastic_round_(want, value[0], rounding.rounding_bits(12, value.shape[2], state[5], 9))
        assert float((want != new[0]).float().mean()) < 2e-3


def test_a_slots_bits_are_its_own():
    """Whoever else is compressed, in whichever order, whatever they hold."""
    n, m = 35, 40
    state, options = state_of(5, 6, n, m, torch.float32), options_of(n, m, torch.float32, rank=3)
    for chosen in ({"rank": 3}, options):
        want = compress(state, [2], **chosen)
        for slots in ([0, 1, 2, 3, 4], [4, -1, 2]):
            other = [t.clone() for t in state]
            other[0][3] *= 1e20
            other[1][4] = 0
            got = compress(other, slots, **chosen)
            assert all(torch.equal(s[2], t[2]) for s, t in zip(got, want, strict=True))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_slots_that_are_not_finite_stay_as_they_are(bad):
    state = state_of(4, 6, 40, 30, torch.float32)
    state[2][3] = 2  # no more than stay: they are pulled
    state[1][1, 3, 7] = state[0][3, 1, 5] = bad
    after = compress(state, [0, 1, 2, 3], **options_of(40, 30, torch.float32, rank=3))
    for old, new in zip(state, after, strict=True):
        assert all(same(old[u], new[u]) for u in (1, 3))
        assert not any(same(old[u], new[u]) for u in (0, 2))


def test_what_the_kernels_do_not_take_is_reported():
    state, options = state_of(1, MOST_ROWS + 1, 2, 3, torch.float32), PLAIN | {"rank": 2}
    why = why_not(*state[:2])
    assert f"{MOST_ROWS + 1} rows" in why
    want = compress(state, [0], reference.low_rank_compress, "cpu", **options)
    backends.calls.clear()
    got = compress(state, [0], cuda.low_rank_compress, **options)
    assert dict(backends.calls) == {("low_rank_compress", "reference", why): 1}
    assert (delta_of(*got[:3], 0) - delta_of(*want[:3], 0)).norm() <= 1e-6 * delta_of(*state[:3], 0).norm()
    assert why_not(torch.zeros(1, 3, 4), torch.zeros(1, 3, 5)) == ""
    assert why_not(torch.zeros(1, 3, 4), torch.zeros(1, 3, 0)) != ""
