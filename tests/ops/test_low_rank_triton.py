"""The Triton kernels of users' low-rank weights (in the interpreter, without a GPU) against the float64 reference."""

import pytest
import torch
from helpers import assert_close

from ttt.ops.low_rank import reference
from ttt.ops.triton import low_rank
from ttt.ops.triton.common import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"


def pool_of(slots, capacity, n, m, dtype):
    """Rows not in use hold NaN: they must never be read."""
    a, b = (torch.randn(slots, capacity, k, device=DEVICE).to(dtype) for k in (n, m))
    rows = torch.randint(0, capacity + 1, (slots,), device=DEVICE)
    empty = (torch.arange(capacity, device=DEVICE) >= rows.unsqueeze(1)).unsqueeze(2)
    return a.masked_fill_(empty, torch.nan), b.masked_fill_(empty, torch.nan), rows.int()


def users_of(tokens, slots):
    """Alone, in runs, and in turn."""
    users = torch.randint(-1, slots, (tokens,), dtype=torch.int32, device=DEVICE)
    users[tokens // 2 :] = users[tokens // 2 :].sort().values
    return users


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("slots", "capacity", "n", "m", "tokens"),
    [(1, 1, 1, 1, 1), (3, 5, 33, 7, 9), (2, 19, 1030, 300, 3), (5, 40, 70, 130, 83), (2, 3, 8, 5, 0)],
)
def test_each_token_meets_its_own_users_weights(dtype, slots, capacity, n, m, tokens):
    a, b, rows = pool_of(slots, capacity, n, m, dtype)
    users = users_of(tokens, slots)
    x, weight, bias = (torch.randn(*s, device=DEVICE).to(dtype) for s in ((tokens, n), (m, n), (m,)))
    before = [t.clone() for t in (a, b, rows, x)]
    y = low_rank.low_rank_linear(x, weight, bias, a, b, rows, users)
    base = torch.nn.functional.linear(x, weight, bias)
    # The base product is torch's own: what is added to it is looked at.
    exact = reference.add_delta_(base.double(), x.double(), a.double(), b.double(), rows, users)
    plain = base.clone()
    for t, u in enumerate(users.tolist()):
        held = slice(0, int(rows[u]) if u >= 0 else 0)
        plain[t] += (x[t] @ a[u, held].T) @ b[u, held]
    assert_close(y, exact, plain, "y")
    assert torch.equal(y[users < 0], base[users < 0])
    alone = low_rank.low_rank_linear(x, None, None, a, b, rows, users)
    assert torch.equal(alone, low_rank.low_rank_linear(x, torch.zeros_like(weight), None, a, b, rows, users))
    for t, old in zip((a, b, rows, x), before, strict=True):
        assert torch.equal(t.nan_to_num(7.0), old.nan_to_num(7.0))


@pytest.mark.parametrize("tokens", [12, 80])
def test_other_users_tokens_change_no_bit(tokens):
    a, b, rows = pool_of(3, 6, 65, 130, torch.float32)
    weight, users = torch.randn(130, 65, device=DEVICE), users_of(tokens, 3)
    x = torch.randn(tokens, 65, device=DEVICE)
    y = low_rank.low_rank_linear(x, weight, None, a, b, rows, users)
    mine, x2, a2 = users == 1, x.clone(), a.clone()
    x2[~mine], a2[0] = torch.where(torch.rand(int((~mine).sum()), 1, device=DEVICE) < 0.5, torch.inf, 3.0), torch.nan
    moved = torch.where(mine, users, torch.randint(-1, 1, users.shape, dtype=torch.int32, device=DEVICE))
    other = low_rank.low_rank_linear(x2, weight, None, a2, b, rows, moved)
    assert torch.equal(y[mine], other[mine])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "n"), [(12, 65), (80, 1100)])
def test_rows_that_are_not_finite_do_not_enter_torchs_product(dtype, tokens, n, monkeypatch):
    """Where that product lets them reach all others, as on some processors."""
    a, b, rows = pool_of(3, 6, n, 30, dtype)
    weight, x, users = (
        torch.randn(30, n).to(DEVICE, dtype),
        torch.randn(tokens, n).to(DEVICE, dtype),
        users_of(tokens, 3),
    )
    spoilt = x.clone()
    spoilt[1, n - 1], spoilt[4, 0], spoilt[7] = torch.inf, torch.nan, -torch.inf
    real = torch.nn.functional.linear

    def leaking(x, weight, bias=None):
        y = real(x, weight, bias)
        return y if torch.isfinite(x).all() else torch.full_like(y, torch.nan)

    monkeypatch.setattr(torch.nn.functional, "linear", leaking)
    want, found = (low_rank.low_rank_linear(t, weight, None, a, b, rows, users) for t in (x, spoilt))
    bad = ~torch.isfinite(spoilt).all(1)
    assert bad.nonzero().flatten().tolist() == [1, 4, 7]
    assert torch.equal(found[~bad], want[~bad])
    assert bool(found[bad].isnan().all())


def test_slots_and_rows_out_of_range_are_neither_read_nor_written():
    """The host does not look at them on a GPU, where this would be an illegal access or another user's memory."""
    a, b, rows = pool_of(3, 4, 9, 7, torch.float32)
    rows[:] = torch.tensor([-3, 9, 1])
    users = torch.tensor([0, 1, 2, 3, 1000000, -5, 2], dtype=torch.int32, device=DEVICE)
    x, delta, eta = (torch.randn(7, *k, device=DEVICE) for k in ((9,), (7,), ()))
    eta_sum, weight = torch.rand(3, device=DEVICE), torch.randn(7, 9, device=DEVICE)
    before = [t.clone() for t in (a, b, rows, eta_sum)]
    y = low_rank.low_rank_linear(x, weight, None, a, b, rows, users)
    assert torch.equal(y[[0, 3, 4, 5]], torch.nn.functional.linear(x, weight)[[0, 3, 4, 5]])
    low_rank.low_rank_append(a, b, rows, eta_sum, x, delta, eta, users)
    assert rows.tolist() == [-3, 9, 3]
    assert torch.equal(eta_sum[:2], before[3][:2])
    assert torch.equal(a[2, 1:3], x[[2, 6]])
    a[2, 1:3], b[2, 1:3] = before[0][2, 1:3], before[1][2, 1:3]
    for t, old in zip((a, b), before, strict=False):
        assert torch.equal(t.nan_to_num(7.0), old.nan_to_num(7.0))


# The interpreter cuts float32 off to bfloat16 where a GPU rounds.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])])
@pytest.mark.parametrize(
    ("slots", "capacity", "n", "m", "tokens"), [(1, 1, 1, 1, 1), (3, 5, 33, 7, 9), (4, 90, 1030, 5, 270)]
)
def test_append_is_the_references_and_never_passes_the_slots_end(dtype, slots, capacity, n, m, tokens):
    a, b, rows = pool_of(slots, capacity, n, m, dtype)
    guard = torch.full((slots + 1, capacity, n), 5.0, device=DEVICE, dtype=dtype)
    guard[:slots] = a
    a = guard[:slots]
    users, eta_sum = users_of(tokens, slots), torch.rand(slots, device=DEVICE)
    x, delta = (torch.randn(tokens, k, device=DEVICE).to(dtype) for k in (n, m))
    eta = torch.rand(tokens, device=DEVICE)
    want = [t.clone() for t in (a, b, rows, eta_sum)]
    reference.low_rank_append(*want, x, delta, eta, users)
    low_rank.low_rank_append(a, b, rows, eta_sum, x, delta, eta, users)
    for got, expected in zip((a, b, rows), want, strict=False):
        assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))
    torch.testing.assert_close(eta_sum, want[3], rtol=1e-5, atol=0)
    assert bool((guard[slots] == 5).all())
