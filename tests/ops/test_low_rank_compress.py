"""low_rank_compress at the kernels' dtypes against the SVD of what a user learnt, as a dense float64 matrix."""

import itertools

import numpy as np
import pytest
import torch
from test_low_rank import delta_of, isa, pool_of  # noqa: F401

import ttt
from ttt.ops import backends, cpu, philox
from ttt.ops.low_rank import reference
from ttt.ops.rounding import rounding_bits, stochastic_round_

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(9, 33, 20, 4), (12, 7, 40, 5), (12, 40, 5, 3), (6, 1, 3, 2), (80, 530, 1100, 16), (21, 1030, 65, 20)]
SHAPES += [(128, 300, 200, 96), (37, 90, 70, 36)]  # most rows stay
# Of the change's norm. float32: rows are rounded, and so are what they are made of; 16 bits: rounded stochastically.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.5e-2}


def state_of(slots, capacity, n, m, dtype, full=True):
    """(a, b, rows, eta_sum, lost, step): rows of a size that learning gives them; NaN where nothing was written."""
    a, b, rows = pool_of(slots, capacity, n, m, dtype, full=full)
    b *= 0.01
    return [a, b, rows, torch.rand(slots), torch.rand(slots), torch.randint(0, 1000, (slots,))]


def compress(state, slots, **options):
    after = [t.clone() for t in state]
    ttt.ops.low_rank_compress(*after, torch.tensor(slots), **options)
    return after


def truncated(delta, rank):
    """(the approximation, |change|_F) of a dense matrix, by numpy's SVD."""
    u, s, vt = np.linalg.svd(delta.numpy(), full_matrices=False)
    kept = np.where(np.arange(len(s)) < rank, s, 0)
    return torch.from_numpy((u * kept) @ vt), float(np.linalg.norm(s - kept))


def assert_near(state, slot, want, scale, dtype):
    error = (delta_of(*state[:3], slot) - want).norm()
    assert error <= TOLERANCE[dtype] * scale, f"off by {float(error / scale):.3g} of the change's norm"


def assert_bookkeeping(before, after, slots, rank, losses):
    """Counters, freed rows, and not a bit elsewhere."""
    (a, b, rows, eta_sum, lost, step), capacity = after, after[0].shape[1]
    small = min(rank, a.shape[2], b.shape[2])
    for u in range(len(rows)):
        held, was = int(rows[u]), int(before[2][u])
        if u not in slots:
            for old, new in zip(before, after, strict=True):
                assert torch.equal(old[u].nan_to_num(7.0), new[u].nan_to_num(7.0))
            continue
        assert held == (small if was > rank else was)
        assert (float(eta_sum[u]), int(step[u])) == (0, int(before[5][u]) + 1)
        np.testing.assert_allclose(float(lost[u] - before[4][u]), losses.get(u, 0.0), rtol=1e-5, atol=1e-6)
        for t in (a, b):
            assert bool((t[u, held:was] == 0).all()), "what a user said stays"
            assert bool(torch.isfinite(t[u, :was]).all())
            assert bool(t[u, was:].isnan().all()), "rows that were never in use"
            assert t.shape[1] == capacity


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("capacity", "n", "m", "rank"), SHAPES)
def test_the_largest_singular_values_stay(isa, dtype, capacity, n, m, rank):  # noqa: F811
    state = state_of(4, capacity, n, m, dtype)
    state[2][:] = torch.tensor([capacity, capacity - 1, rank, 0])
    state[0][1, capacity - 1], state[1][1, capacity - 1] = torch.nan, torch.nan
    state[0][2, rank:], state[1][2, rank:] = torch.nan, torch.nan
    state[0][3], state[1][3] = torch.nan, torch.nan
    after, losses = compress(state, [3, 0, 2], rank=rank, seed=5), {}
    for u in (0, 2, 3):
        delta = delta_of(*state[:3], u)
        want, lost = truncated(delta, rank) if int(state[2][u]) > rank else (delta, 0.0)
        losses[u] = lost
        assert_near(after, u, want, delta.norm(), dtype)
    assert_bookkeeping(state, after, [0, 2, 3], rank, losses)
    for old, new in zip(state[:2], after[:2], strict=True):
        assert torch.equal(old[2, :rank], new[2, :rank])  # nothing to do


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kind",
    [
        "repeated",
        "one row",
        "orthogonal",
        "pairs",
        "zero rows",
        "zero factor",
        "graded",
        "unlike sizes",
        "low rank",
        "few alike",
    ],
)
@pytest.mark.parametrize("rank", [6, 34])
def test_factors_that_are_hard_to_decompose(isa, dtype, kind, rank):  # noqa: F811
    capacity, n, m = 40, 200, 150
    state = state_of(1, capacity, n, m, dtype)
    a, b = state[0][0], state[1][0]
    if kind == "repeated":  # identical tokens
        a[7:] = a[:7].repeat(5, 1)[: capacity - 7]
        b[20:] = b[:20]
    elif kind == "one row":
        a[:] = a[:1].clone()
    elif kind == "orthogonal":  # all singular values alike
        a[:], b[:] = torch.eye(capacity, n), torch.eye(capacity, m) * 0.5
    elif kind == "pairs":  # of equal singular values
        a[:] = 0
        a[:20, :100] = a[20:, 100:] = torch.randn(20, 100)
        b[:] = 0
        b[:20, :75] = b[20:, 75:] = torch.randn(20, 75)
    elif kind == "zero rows":
        a[::2], b[::3] = 0, 0
    elif kind == "zero factor":
        b[:] = 0
    elif kind == "graded":
        a *= torch.logspace(0, -12, capacity).unsqueeze(1)
    elif kind == "unlike sizes":  # though their products are not
        scale = torch.logspace(-17, 17, capacity).unsqueeze(1)
        a *= scale
        b /= scale
    elif kind == "few alike":  # fewer than stay
        a[:], b[:] = 0, 0
        a[:10], b[:10] = torch.eye(10, n), torch.eye(10, m) * 0.5
    else:
        a[:] = (torch.randn(capacity, 3) @ torch.randn(3, n)).to(dtype)
        b[:] = (torch.randn(capacity, 3) @ torch.randn(3, m)).to(dtype)
    delta = delta_of(*state[:3], 0)
    after = compress(state, [0], rank=rank)
    want, lost = truncated(delta, rank)
    assert_near(after, 0, want, delta.norm(), dtype)
    assert abs(float(after[4] - state[4]) - lost) <= 1e-6 + 1e-6 * float(delta.norm())
    assert after[2].tolist() == [rank]
    assert all(bool(torch.isfinite(t[0, :rank]).all()) for t in after[:2])
    assert all(bool((t[0, rank:] == 0).all()) for t in after[:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("in_a", "in_b"), [(1e30, 1e-30), (1e-30, 1e25), (1e-20, 1e-18), (1e15, 1e20), (3e38, 3e38)])
def test_huge_and_tiny_rows_stay_finite(isa, dtype, in_a, in_b):  # noqa: F811
    """Their squares leave float32's range. Where the product does, too, its factors stand at the range's end."""
    state = state_of(1, 20, 70, 50, dtype)
    state[0], state[1] = (
        (torch.rand_like(t) - 0.5).clamp(-1, 1) * size for t, size in zip(state, (in_a, in_b), strict=False)
    )
    delta = delta_of(*state[:3], 0)
    after = compress(state, [0], rank=4)
    assert all(bool(torch.isfinite(t[0]).all()) for t in (after[0], after[1], after[4]))
    want, lost = truncated(delta, 4)
    if in_a * in_b < 1e60:
        assert_near(after, 0, want, delta.norm(), dtype)
        np.testing.assert_allclose(
            float(after[4]), min(float(state[4]) + lost, torch.finfo(torch.float32).max), rtol=1e-5
        )
    else:
        assert float(after[4]) == torch.finfo(torch.float32).max


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lam", [0.0, 0.9])
@pytest.mark.parametrize(
    ("capacity", "n", "m", "rank"), [(9, 33, 20, 4), (26, 530, 300, 7), (5, 40, 31, 8), (6, 1, 3, 2)]
)
def test_replay_and_pull(isa, dtype, lam, capacity, n, m, rank):  # noqa: F811
    """Against the formulas on dense matrices: each step by itself."""
    rows, filled, beta, eps, seed = 5, 11, 0.3, 1e-2, 77
    state = state_of(3, capacity, n, m, dtype)
    state[3] *= 0.1
    memory, seen = (torch.randn(20, n) / n**0.5).to(dtype), torch.tensor([filled])
    rho, kappa = torch.rand(m) ** 3 * 4, torch.rand(n) ** 3 * 4
    after = compress(
        state, [2, 0], rank=rank, lam=lam, importance_m=rho, importance_n=kappa, memory=memory, seen=seen, seed=seed,
        replay_rows=rows, beta=beta, eps=eps,
    )  # fmt: skip
    losses = {}
    for u in (0, 2):
        before = delta_of(*state[:3], u)
        word = torch.stack(philox.philox(torch.arange(2), 0, int(state[5][u]), philox.DRAW, seed), -1).flatten()[:rows]
        xr = memory[(word * filled) >> 32].double()
        gram = xr @ xr.T
        v = beta * torch.linalg.solve(gram + eps * gram.diagonal().mean() * torch.eye(rows), xr)
        want = before - (before @ xr.T) @ v
        losses[u] = 0.0
        if capacity > rank:
            want, losses[u] = truncated(want, rank)
        if lam:
            squares, strength = want.square(), lam * float(state[3][u])
            mean_m = torch.nan_to_num((squares @ kappa.double()) / squares.sum(1))
            mean_n = torch.nan_to_num((rho.double() @ squares) / squares.sum(0))
            p, q = (1 + strength * rho * mean_m) ** -0.5, (1 + strength * kappa * mean_n) ** -0.5
            want = p.unsqueeze(1) * want * q
        assert_near(after, u, want, before.norm(), dtype)
    assert_bookkeeping(state, after, [0, 2], rank, losses)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_slots_bits_are_its_own(isa, dtype, threads):  # noqa: F811
    """Whoever else is compressed, in whichever order, whatever they hold, by however many threads."""
    state = state_of(5, 30, 600, 1100, dtype)
    memory, seen = torch.randn(9, 600).to(dtype), torch.tensor([9])
    options = {"rank": 5, "lam": 0.3, "importance_m": torch.rand(1100), "importance_n": torch.rand(600),
               "memory": memory, "seen": seen, "replay_rows": 3}  # fmt: skip
    for chosen in ({"rank": 5}, options):
        want = compress(state, [2], **chosen)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for slots in ([0, 1, 2, 3, 4], [4, 2], [3, 2, 1]):
                other = [t.clone() for t in state]
                other[0][3] *= 1e20
                other[1][4] = 0
                got = compress(other, slots, **chosen)
                assert all(torch.equal(s[2], t[2]) for s, t in zip(got, want, strict=True))
        finally:
            torch.set_num_threads(before)


@pytest.mark.skipif(cpu._C is None, reason="there is no kernel to agree with the reference")
def test_16_bit_rows_are_rounded_by_the_references_bits(isa):  # noqa: F811
    """All elements but those that another order of sums puts across a rounding's edge."""
    state = state_of(1, 20, 530, 300, torch.bfloat16)
    options = {"rank": 20, "lam": 0.5, "importance_m": torch.rand(300), "importance_n": torch.rand(530), "seed": 9}
    wide = [t.float() if t.dtype == torch.bfloat16 else t for t in state]
    got, exact = compress(state, [0], **options), compress(wide, [0], **options)
    for new, value in zip(got[:2], exact[:2], strict=False):
        want = torch.empty_like(new[0])
        stochastic_round_(want, value[0], rounding_bits(20, value.shape[2], state[5], 9))
        assert float((want != new[0]).float().mean()) < 2e-3


def test_rows_that_are_not_finite_are_refused_and_stay(isa):  # noqa: F811
    for dtype, bad in itertools.product(DTYPES, (torch.inf, torch.nan)):
        state = state_of(3, 8, 40, 30, dtype)
        state[1][1, 3, 7] = bad
        after = [t.clone() for t in state]
        with pytest.raises(RuntimeError, match=r"slot 1|non-finite"):
            ttt.ops.low_rank_compress(*after, torch.tensor([1]), rank=3)
        for old, new in zip(state, after, strict=True):
            assert torch.equal(old.nan_to_num(7.0), new.nan_to_num(7.0))


def test_the_backend_is_reported():
    state = state_of(1, 5, 9, 7, torch.float32)
    backends.calls.clear()
    compress(state, [0], rank=2)
    after = compress([t.double() if t.is_floating_point() else t for t in state], [0], rank=2)
    kinds = sorted((backend, why) for op, backend, why in backends.calls if op == "low_rank_compress")
    if cpu._C is not None:
        assert kinds == [("cpu", ""), ("reference", "no C++ kernel for torch.float64")]
    want, _ = truncated(delta_of(*state[:3], 0), 2)
    assert (delta_of(*after[:3], 0) - want).norm() < 1e-12


def test_the_reference_takes_float16():
    state = state_of(1, 9, 33, 20, torch.float16)
    delta = delta_of(*state[:3], 0)
    after = [t.clone() for t in state]
    reference.low_rank_compress(*after, torch.tensor([0]), 4, 0.0, None, None, None, None, 0, 0, 0.3, 1e-3)
    assert (delta_of(*after[:3], 0) - truncated(delta, 4)[0]).norm() < 3e-3 * delta.norm()
