"""The ops of users' low-rank weights against dense float64 formulas: what a user learnt as an m x n matrix."""

import itertools

import numpy as np
import pytest
import torch
from helpers import assert_close

import ttt
from ttt.ops import cpu
from ttt.ops.low_rank import reference

ISAS = ["reference"] if cpu._C is None else cpu._C.available_isas()
SHAPES = [
    (1, 1, 1, 1, 1),
    (3, 5, 33, 7, 9),
    (2, 19, 127, 1000, 33),
    (7, 4, 64, 65, 40),
    (2, 3, 8, 5, 0),
]  # S, R, n, m, T


@pytest.fixture(params=ISAS)
def isa(request):
    if cpu._C is None:
        yield request.param
        return
    before = cpu._C.active_isa()
    cpu._C.set_isa(request.param)
    yield request.param
    cpu._C.set_isa(before)


def pool_of(slots, capacity, n, m, dtype, full=False):
    """Rows not in use hold NaN: they must never be read."""
    a, b = (torch.randn(slots, capacity, k).to(dtype) for k in (n, m))
    rows = torch.full((slots,), capacity) if full else torch.randint(0, capacity + 1, (slots,))
    empty = torch.arange(capacity) >= rows.unsqueeze(1)
    return a.masked_fill_(empty.unsqueeze(2), torch.nan), b.masked_fill_(empty.unsqueeze(2), torch.nan), rows.int()


def delta_of(a, b, rows, slot):
    """B^T A of one slot, (m, n) float64, as a sum of outer products."""
    return sum(
        (torch.outer(b[slot, r].double(), a[slot, r].double()) for r in range(int(rows[slot]))),
        torch.zeros(b.shape[2], a.shape[2], dtype=torch.float64),
    )


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_token_meets_its_own_users_weights(isa, shape, dtype):
    slots, capacity, n, m, tokens = shape
    a, b, rows = pool_of(slots, capacity, n, m, dtype)
    x, weight, bias = torch.randn(tokens, n).to(dtype), torch.randn(m, n).to(dtype), torch.randn(m).to(dtype)
    users = torch.randint(-1, slots, (tokens,), dtype=torch.int32)
    before = [t.clone() for t in (x, weight, bias, a, b, rows, users)]
    y = ttt.ops.low_rank_linear(x, weight, bias, a, b, rows, users)
    exact, plain, base = [], [], torch.nn.functional.linear(x, weight, bias)
    for t, u in enumerate(users.tolist()):
        w = weight.double() + (delta_of(a, b, rows, u) if u >= 0 else 0)
        exact.append(w @ x[t].double() + bias.double())
        held = slice(0, int(rows[u]) if u >= 0 else 0)
        plain.append(base[t] + (x[t] @ a[u, held].T) @ b[u, held])
        if u < 0:
            assert torch.equal(y[t], base[t])
    assert y.shape == (tokens, m)
    if tokens:
        assert_close(y, torch.stack(exact), torch.stack(plain), "y")
    for t, old in zip((x, weight, bias, a, b, rows, users), before, strict=True):
        assert torch.equal(t.nan_to_num(7.0), old.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_weight_the_low_rank_part_comes_alone(isa, shape, dtype):
    slots, capacity, n, m, tokens = shape
    a, b, rows = pool_of(slots, capacity, n, m, dtype)
    x, users = torch.randn(tokens, n).to(dtype), torch.randint(-1, slots, (tokens,), dtype=torch.int32)
    y = ttt.ops.low_rank_linear(x, None, None, a, b, rows, users)
    assert y.shape == (tokens, m)
    assert torch.equal(y, ttt.ops.low_rank_linear(x, torch.zeros(m, n).to(dtype), None, a, b, rows, users))
    assert not y[users < 0].any()
    with pytest.raises(ValueError, match="bias must be None without a weight"):
        ttt.ops.low_rank_linear(x, None, torch.zeros(m).to(dtype), a, b, rows, users)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_users_tokens_change_no_bit(isa, dtype):
    """Not even where they, or what they learnt, are not finite."""
    slots, capacity, n, m = 3, 6, 65, 130
    a, b, rows = pool_of(slots, capacity, n, m, dtype, full=True)
    weight = torch.randn(m, n).to(dtype)
    x, users = torch.randn(3, 8, n).to(dtype), torch.tensor([0, -1, 1, 2, 1, 0, 1, -1] * 3, dtype=torch.int32)
    y = ttt.ops.low_rank_linear(x, weight, None, a, b, rows, users).view(-1, m)
    mine, x2, a2 = users == 1, x.clone(), a.clone()
    x2.view(-1, n)[~mine] = torch.where(torch.rand(int((~mine).sum()), 1) < 0.5, torch.inf, 3.0).to(dtype)
    a2[0] = torch.nan
    other = ttt.ops.low_rank_linear(x2, weight, None, a2, b, rows, users).view(-1, m)
    assert torch.equal(y[mine], other[mine])
    # Whose the other tokens are does not matter either, nor do their numbers of rows.
    moved = torch.where(mine, users, torch.randint(-1, 1, users.shape, dtype=torch.int32))
    rows2 = torch.tensor([2, capacity, 0], dtype=torch.int32)
    assert torch.equal(y[mine], ttt.ops.low_rank_linear(x2, weight, None, a2, b, rows2, moved).view(-1, m)[mine])


def test_the_transpose_of_a_matrix_serves_as_weight():
    a, b, rows = pool_of(2, 3, 5, 7, torch.float32)
    users = torch.tensor([1, -1, 0], dtype=torch.int32)
    delta, weight = torch.randn(3, 7), torch.randn(7, 5)
    got = ttt.ops.low_rank_linear(delta, weight.T, None, b, a, rows, users)
    exact = torch.stack([
        d @ (weight.double() + (delta_of(a, b, rows, u) if u >= 0 else 0))
        for d, u in zip(delta.double(), users.tolist(), strict=True)
    ])  # fmt: skip
    assert_close(got, exact, exact.float(), "gradient")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_append_is_the_gradient_step(isa, shape, dtype):
    """Against lists of rows; what is not a new row must not change by one bit."""
    slots, capacity, n, m, tokens = shape
    a, b, rows = pool_of(slots, capacity, n, m, dtype)
    eta_sum = torch.rand(slots, dtype=wide(dtype))
    room = (capacity - rows).tolist()
    users = []
    for u in torch.randint(-1, slots, (tokens,)).tolist():
        users.append(u if u >= 0 and room[u] > 0 else -1)
        if users[-1] >= 0:
            room[u] -= 1
    users = torch.tensor(users, dtype=torch.int32)
    x, delta, eta = torch.randn(tokens, n).to(dtype), torch.randn(tokens, m).to(dtype), torch.rand(tokens).to(eta_sum)
    want_a, want_b, want_rows, want_sum = a.clone(), b.clone(), rows.clone(), eta_sum.clone()
    for t, u in enumerate(users.tolist()):
        if u >= 0:
            want_a[u, want_rows[u]] = x[t]
            want_b[u, want_rows[u]] = (-eta[t] * delta[t].to(eta.dtype)).to(dtype)
            want_rows[u] += 1
            want_sum[u] += eta[t]
    ttt.ops.low_rank_append(a, b, rows, eta_sum, x, delta, eta, users)
    for name, got, want in (("a", a, want_a), ("b", b, want_b), ("rows", rows, want_rows), ("eta", eta_sum, want_sum)):
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)), name
    ttt.ops.low_rank_append(a, b, rows, eta_sum, x[:0], delta[:0], eta[:0], users[:0])
    assert torch.equal(rows, want_rows)


def compressed(a, b, rows, slots, *, spent=None, **options):
    eta_sum = torch.full((len(rows),), 0.25, dtype=wide(a.dtype)) if spent is None else spent
    lost, step = torch.zeros_like(eta_sum), torch.zeros(len(rows), dtype=torch.int64)
    ttt.ops.low_rank_compress(a, b, rows, eta_sum, lost, step, torch.tensor(slots), **options)
    return eta_sum, lost, step


@pytest.mark.parametrize(("capacity", "n", "m", "rank"), [(9, 33, 20, 4), (12, 7, 40, 5), (12, 40, 5, 3), (6, 1, 3, 2)])
def test_compress_keeps_the_best_approximation(capacity, n, m, rank):
    """Against numpy's SVD of the dense matrix, and `lost` against the dense difference."""
    a, b, rows = pool_of(3, capacity, n, m, torch.float64, full=True)
    rows[2] = rank
    before = [delta_of(a, b, rows, u).numpy() for u in range(3)]
    old = a.clone(), b.clone()
    eta_sum, lost, step = compressed(a, b, rows, [0, 2], rank=rank)
    u, s, vt = np.linalg.svd(before[0], full_matrices=False)
    tail = s[rank] if rank < len(s) else 0.0
    s[rank:] = 0
    want = (u * s) @ vt
    after = delta_of(a, b, rows, 0).numpy()
    np.testing.assert_allclose(after, want, atol=1e-12 * np.abs(before[0]).max())
    np.testing.assert_allclose(lost[0], np.linalg.norm(before[0] - want), rtol=1e-9, atol=1e-12 * np.linalg.norm(want))
    assert np.linalg.norm(before[0] - after, 2) <= tail * (1 + 1e-9) + 1e-10
    assert rows.tolist() == [min(rank, n, m), capacity, rank]
    assert bool((a[0, rows[0] :] == 0).all() & (b[0, rows[0] :] == 0).all())  # what a user said does not stay
    assert torch.equal(a[1:], old[0][1:])
    assert torch.equal(b[1:], old[1][1:])
    assert (eta_sum.tolist(), step.tolist(), lost[1:].tolist()) == ([0, 0.25, 0], [1, 0, 1], [0, 0])


@pytest.mark.parametrize(("capacity", "n", "m", "rank"), [(9, 33, 20, 4), (12, 7, 40, 5), (12, 40, 5, 3), (6, 1, 3, 2)])
def test_gram_matrices_give_the_same_approximation(capacity, n, m, rank):
    """As QR and SVD, also of rows that repeat and differ in size by six orders of magnitude."""
    a, b, _ = pool_of(1, capacity, n, m, torch.float64, full=True)
    a, b = a[0] * torch.logspace(-3, 3, capacity, dtype=torch.float64).unsqueeze(1), b[0]
    a[1] = a[0]
    (a1, b1, gone1), (a2, b2, gone2) = (f(a, b, rank) for f in (reference.truncate, reference.truncate_by_gram))
    assert a1.shape == a2.shape
    size = float((b.T @ a).norm())
    assert float((b1.T @ a1 - b2.T @ a2).norm()) < 1e-7 * size
    assert abs(float(gone1 - gone2)) < 1e-7 * size


def test_equal_and_empty_rows_are_no_trouble():
    a, b, rows = pool_of(2, 8, 20, 30, torch.float32, full=True)
    a[0, 1:] = a[0, :1]
    b[1] = 0
    want = delta_of(a, b, rows, 0)
    compressed(a, b, rows, [0, 1], rank=3)
    torch.testing.assert_close(delta_of(a, b, rows, 0), want, rtol=1e-5, atol=1e-5)
    assert float(delta_of(a, b, rows, 1).abs().max()) == 0
    rows.zero_()
    compressed(a, b, rows, [0, 1], rank=3)
    assert rows.tolist() == [0, 0]


@pytest.mark.parametrize("lam", [0.5, 1e6])
def test_the_pull_is_the_one_written_down(lam):
    """By its formula on dense matrices; no entry grows, and the penalty falls, at any strength."""
    capacity, n, m, spent = 5, 33, 21, torch.full((1,), 0.3, dtype=torch.float64)
    a, b, rows = pool_of(1, capacity, n, m, torch.float64, full=True)
    rho, kappa = (torch.rand(k, dtype=torch.float64) ** 3 * 4 for k in (m, n))
    d = delta_of(a, b, rows, 0)
    compressed(a, b, rows, [0], spent=spent, rank=capacity, lam=lam, importance_m=rho, importance_n=kappa)
    squares, strength = d.square(), lam * 0.3
    p = (1 + strength * rho * (squares @ kappa) / squares.sum(1)) ** -0.5
    q = (1 + strength * kappa * (rho @ squares) / squares.sum(0)) ** -0.5
    after = delta_of(a, b, rows, 0)
    torch.testing.assert_close(after, p.unsqueeze(1) * d * q, rtol=1e-10, atol=1e-13)
    assert bool((after.abs() <= d.abs()).all())
    omega = torch.outer(rho, kappa)
    assert float((omega * after.square()).sum()) < float((omega * d.square()).sum())


def test_the_pull_agrees_with_the_proximal_step():
    """Exactly for a constant importance; in the loss of |D|^2 to first order for any."""
    n, m = 33, 21
    a, b, rows = pool_of(1, 4, n, m, torch.float64, full=True)
    d = delta_of(a, b, rows, 0)
    rho, kappa = torch.rand(m, dtype=torch.float64), torch.rand(n, dtype=torch.float64)
    for strength, weights in ((3.0, (torch.ones_like(rho), torch.ones_like(kappa))), (1e-6, (rho, kappa))):
        got = reference.pull(a[0], b[0], torch.tensor(strength, dtype=torch.float64), *weights)
        after, want = got[1].T @ got[0], d / (1 + strength * torch.outer(*weights))
        if strength > 1:
            torch.testing.assert_close(after, want, rtol=1e-12, atol=1e-12)
        fall, wanted = (d.square() - t.square() for t in (after, want))
        torch.testing.assert_close(fall.sum(), wanted.sum(), rtol=1e-5, atol=0)


def test_replay_is_that_of_the_commit():
    """The same rows, drift and step as `ttt.ops.commit` makes of the dense W = W* + D with no tokens."""
    n, m, capacity = 17, 9, 5
    a, b, rows = pool_of(2, capacity, n, m, torch.float64, full=True)
    memory, seen = torch.randn(30, n, dtype=torch.float64), torch.tensor([12])
    options = {"seed": 77, "replay_rows": 6, "beta": 0.4, "eps": 1e-2}
    eta_sum = torch.tensor([0.1, 0.5], dtype=torch.float64)
    lost, step = torch.zeros(2, dtype=torch.float64), torch.tensor([4, 9])
    want = []
    for u in range(2):
        weight, anchor = delta_of(a, b, rows, u), torch.zeros(m, n, dtype=torch.float64)
        x, delta = torch.zeros(0, n, dtype=torch.float64), torch.zeros(0, m, dtype=torch.float64)
        ttt.ops.commit(
            weight, anchor, None, None, x, delta, eta_sum[:0], step[u : u + 1].clone(), memory=memory, seen=seen,
            **options,
        )  # fmt: skip
        want.append(weight)
    before = memory.clone()
    ttt.ops.low_rank_compress(
        a, b, rows, eta_sum, lost, step, torch.tensor([1, 0]), rank=capacity, memory=memory, seen=seen, **options
    )
    for u in range(2):
        torch.testing.assert_close(delta_of(a, b, rows, u), want[u], rtol=1e-10, atol=1e-11)
    assert torch.equal(memory, before)
    assert step.tolist() == [5, 10]


def test_slots_are_compressed_each_by_itself():
    """The bits of a slot do not depend on which others are compressed, in which order, or what they hold."""
    a, b, rows = pool_of(4, 20, 96, 80, torch.float32, full=True)
    results = []
    for slots in ([2], [0, 1, 2, 3], [3, 2]):
        copy = [t.clone() for t in (a, b, rows)]
        if len(slots) == 2:
            copy[0][3] *= 1e20
        compressed(*copy, slots, rank=5)
        results.append([t[2].clone() for t in copy])
    for first, second in itertools.pairwise(results):
        assert all(torch.equal(s, t) for s, t in zip(first, second, strict=True))


def test_bfloat16_factors_are_rounded_without_bias():
    a, b, rows = pool_of(1, 6, 40, 30, torch.float32, full=True)
    wide_a, wide_b, wide_rows = a.clone().bfloat16().float(), b.clone().bfloat16().float(), rows.clone()
    start = wide_a.bfloat16(), wide_b.bfloat16(), rows.clone()
    compressed(wide_a, wide_b, wide_rows, [0], rank=3)
    total = torch.zeros(3, 40)
    for step in range(400):
        copy = [t.clone() for t in start]
        zero, count = torch.zeros(1), torch.tensor([step])
        ttt.ops.low_rank_compress(*copy, zero, zero.clone(), count, torch.tensor([0]), rank=3)
        row = copy[0][0, :3].float()
        total += row * (row * wide_a[0, :3]).sum(1, keepdim=True).sign()  # singular vectors have no sign of their own
    error = total / 400 - wide_a[0, :3]
    nearest = wide_a[0, :3].bfloat16().float() - wide_a[0, :3]
    assert float(error.norm()) < 0.2 * float(nearest.norm())


def test_refusals_name_the_argument_and_change_nothing():
    a, b, rows = pool_of(2, 4, 5, 3, torch.float32)
    rows[:] = torch.tensor([3, 0])
    eta_sum = torch.zeros(2)
    x, delta, eta = torch.randn(3, 5), torch.randn(3, 3), torch.rand(3)
    weight = torch.randn(3, 5)
    users = torch.tensor([1, 0, 0], dtype=torch.int32)
    before = [t.clone() for t in (a, b, rows, eta_sum)]
    linear, append = ttt.ops.low_rank_linear, ttt.ops.low_rank_append

    def refused(error, message, op, *args, **options):
        with pytest.raises(error, match=message):
            op(*args, **options)
        for t, old in zip((a, b, rows, eta_sum), before, strict=True):
            assert torch.equal(t.nan_to_num(7.0), old.nan_to_num(7.0))

    refused(
        ValueError, r"slot 0 2 rows more, but 3 of its 4 are in use", append, a, b, rows, eta_sum, x, delta, eta, users
    )
    wrong = torch.tensor([1, 2, 0], dtype=torch.int32)
    refused(ValueError, r"users must be in \[-1, 2\), got 0 to 2", append, a, b, rows, eta_sum, x, delta, eta, wrong)
    refused(ValueError, r"users must be in \[-1, 2\), got 0 to 2", linear, x, weight, None, a, b, rows, wrong)
    refused(TypeError, "users must be torch.int32", linear, x, weight, None, a, b, rows, users.long())
    refused(ValueError, r"users must have shape \(3,\)", linear, x, weight, None, a, b, rows, users[:2])
    refused(ValueError, r"x must have shape \(..., 5\)", linear, x[:, :4], weight, None, a, b, rows, users)
    refused(ValueError, r"weight must have shape \(3, 5\)", linear, x, weight[:2], None, a, b, rows, users)
    refused(ValueError, "x must be contiguous", linear, torch.randn(5, 3).T, weight, None, a, b, rows, users)
    refused(TypeError, "b must be torch.float32", linear, x, weight, None, a, b.double(), rows, users)
    refused(RuntimeError, "x requires grad", linear, x.clone().requires_grad_(), weight, None, a, b, rows, users)
    lost, step = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    state, slots = (a, b, rows, eta_sum, lost, step), torch.tensor([0])
    compress = ttt.ops.low_rank_compress
    refused(ValueError, "slots must be -1, or distinct", compress, *state, torch.tensor([0, 0]), rank=1)
    refused(ValueError, r"slots must be -1, or distinct and in \[0, 2\)", compress, *state, torch.tensor([2]), rank=1)
    refused(ValueError, r"got \[-2\]", compress, *state, torch.tensor([-2]), rank=1)
    refused(ValueError, "rank must be a whole number of at least 1, got 0", compress, *state, slots, rank=0)
    refused(ValueError, "lam = 1.0 needs importance_m", compress, *state, slots, rank=1, lam=1.0)
    refused(ValueError, "replay_rows = 2 needs memory", compress, *state, slots, rank=1, replay_rows=2)
    assert int(step.sum()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "value", "message"), [
    ("rows", -1, r"rows\[1\] must be in \[0, 4\], got -1"),
    ("rows", 5, r"rows\[1\] must be in \[0, 4\], got 5"),
    ("rows", 2**31 - 1, r"rows\[1\] must be in \[0, 4\], got 2147483647"),
    ("rows", -(2**31), r"rows\[1\] must be in \[0, 4\], got -2147483648"),
    ("eta_sum", -0.5, r"eta_sum\[1\] must be finite and at least 0, got -0.5"),
    ("eta_sum", torch.nan, r"eta_sum\[1\] must be finite and at least 0, got nan"),
    ("eta_sum", torch.inf, r"eta_sum\[1\] must be finite and at least 0, got inf"),
    ("lost", -1.0, r"lost\[1\] must be at least 0, got -1.0"),
    ("lost", torch.nan, r"lost\[1\] must be at least 0, got nan"),
    ("step", -7, r"step\[1\] must be at least 0, got -7"),
    ("seen", -1, "seen must be at least 0, and 0 for a memory without rows, got -1"),
])  # fmt: skip
def test_counters_out_of_range_are_refused_and_nothing_is_written(isa, dtype, name, value, message):
    """Slot 1 is one of three: what is written past its ends would be another user's, or not the pool's."""
    a, b = (torch.randn(3, 4, k).to(dtype) for k in (5, 3))
    state = {"a": a, "b": b, "rows": torch.tensor([2, 3, 4], dtype=torch.int32), "eta_sum": torch.rand(3),
             "lost": torch.rand(3), "step": torch.tensor([4, 5, 6]), "seen": torch.tensor([2]),
             "memory": torch.randn(6, 5).to(dtype)}  # fmt: skip
    state[name][0 if name == "seen" else 1] = value
    before = {key: t.clone() for key, t in state.items()}
    users = torch.tensor([1, 0], dtype=torch.int32)
    x, delta, weight = (torch.randn(*k).to(dtype) for k in ((2, 5), (2, 3), (3, 5)))
    calls = [lambda: ttt.ops.low_rank_compress(
        *(state[k] for k in ("a", "b", "rows", "eta_sum", "lost", "step")), torch.tensor([0, 1]), rank=2,
        memory=state["memory"], seen=state["seen"], replay_rows=2,
    )]  # fmt: skip
    if name == "rows":
        calls += [
            lambda: ttt.ops.low_rank_linear(x, weight, None, a, b, state["rows"], users),
            lambda: ttt.ops.low_rank_append(a, b, state["rows"], state["eta_sum"], x, delta, torch.rand(2), users),
        ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
        for key, t in state.items():
            assert torch.equal(t.nan_to_num(7.0), before[key].nan_to_num(7.0)), key


@pytest.mark.skipif(cpu._C is None, reason="there is no kernel")
def test_the_kernels_themselves_refuse_counters_out_of_range(isa):
    """Without the checks of the ops in Python: what they return says so, and nothing is written."""
    a, b = torch.randn(3, 4, 5), torch.randn(3, 4, 3)
    x, delta, eta, y = torch.randn(2, 5), torch.randn(2, 3), torch.rand(2), torch.zeros(2, 3)
    for rows, users, room in (([0, 5, 0], [1, 0], 0), ([0, -1, 0], [1, 0], 0), ([0, 0, 0], [3, 0], 0),
                              ([0, 0, 0], [0, -2], 0), ([0, 4, 0], [1, 0], 1), ([0, 3, 0], [1, 1], 1)):  # fmt: skip
        rows, users = (torch.tensor(t, dtype=torch.int32) for t in (rows, users))
        state = a, b, rows, torch.zeros(3), torch.zeros(3), torch.zeros(3, dtype=torch.int64)
        before = [t.clone() for t in state]
        appended = cpu._C.low_rank_append(
            *(t.data_ptr() for t in (*state[:4], x, delta, eta, users)), 2, 3, 3, 5, 4, 0, 1
        )
        assert not appended
        assert room or not cpu._C.low_rank_linear(
            *(t.data_ptr() for t in (x, a, b, rows, users, y)), 2, 3, 3, 5, 4, 0, 1
        )
        bound = cpu._C.LowRank(2, *(t.data_ptr() for t in state), 0, 0, 0, 0, 0, 0, 3, 3, 5, 4, 2, 0, 0, 0, 0.0, 0.0,
                               0.0, 0, 1)  # fmt: skip
        if not room:
            assert bound.learn(*(t.data_ptr() for t in (x, delta, eta, users)), 2, 1) == (0, 0, -2)
            assert not bound.forward(x.data_ptr(), users.data_ptr(), y.data_ptr(), 2, 1)
        assert all(torch.equal(t, old) for t, old in zip(state, before, strict=True))
        assert not y.any()


def test_opcheck():
    a, b, rows = (t.nan_to_num(0.0) if t.is_floating_point() else t for t in pool_of(2, 4, 5, 3, torch.float32))
    users = torch.tensor([1, -1, 0], dtype=torch.int32)
    x, weight, eta_sum = torch.randn(3, 5), torch.randn(3, 5), torch.zeros(2)
    torch.library.opcheck(torch.ops.ttt.low_rank_linear.default, (x, weight, None, a, b, rows, users))
    rows.zero_()
    torch.library.opcheck(
        torch.ops.ttt.low_rank_append.default, (a, b, rows, eta_sum, x, torch.randn(3, 3), torch.rand(3), users)
    )
    args = (a, b, rows, eta_sum, torch.zeros(2), torch.zeros(2, dtype=torch.int64), torch.tensor([1]), 2)
    args += (0.0, None, None, None, None, 0, 0, 0.3, 1e-3)
    torch.library.opcheck(torch.ops.ttt.low_rank_compress.default, args)
