"""The low-rank part of a mixed batch, y_t += B_u^T (A_u x_t) with u = users[t], and rows appended to slots.

Shapes: a (S, R, n), b (S, R, m), x (T, n), y (T, m).

y holds torch's base product, to which nothing is added where u is -1. Rows of x that are not finite are taken out of
that product and give NaN, so that isolation does not depend on torch's kernels.

One launch computes the products A x, another adds B's rows; neither waits for a program of its own launch
(`ttt.ops.triton.window_linear` says why). The time for a few tokens (decoding) is that of reading the slots, so each
token has programs of its own. For many tokens the launches go over blocks of tokens, on tensor cores. A block with
tokens of several users is processed once for each of them. Tokens of a user are mostly adjacent, and a slot that is
read again comes from the second-level cache.

A token's sums are made in an order that depends only on the number of tokens, over the rows of its own slot.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ttt.ops.triton.common import operand
from ttt.ops.triton.window_linear import padded

FEW_TOKENS = 64


@triton.jit
def _take_out(to, is_bad, x, n, BK: tl.constexpr):
    """Copy one row of ``x`` to ``to`` and 0 to ``is_bad``; zeros and 1 if the row is not finite."""
    t = tl.program_id(0).to(tl.int64)
    bad = tl.zeros((BK,), tl.int32)
    for k0 in range(0, n, BK):
        k = k0 + tl.arange(0, BK)
        value = tl.load(x + t * n + k, mask=k < n, other=0).to(tl.float32)
        bad |= tl.where(tl.abs(value) < float("inf"), 0, 1)  # NaN is not below infinity
    spoilt = tl.max(bad, axis=0)
    for k0 in range(0, n, BK):
        k = k0 + tl.arange(0, BK)
        value = tl.load(x + t * n + k, mask=k < tl.where(spoilt == 0, n, 0), other=0)
        tl.store(to + t * n + k, value, mask=k < n)
    tl.store(is_bad + t, spoilt)


@triton.jit
def _put_nan(y, is_bad, m, BM: tl.constexpr):
    """NaN into one row of ``y`` where ``is_bad`` is not 0."""
    t = tl.program_id(0).to(tl.int64)
    if tl.load(is_bad + t) != 0:
        for i0 in range(0, m, BM):
            i = i0 + tl.arange(0, BM)
            tl.store(y + t * m + i, tl.full((BM,), float("nan"), tl.float32).to(y.dtype.element_ty), mask=i < m)


@triton.jit
def _held(rows, u, slots, capacity):
    """Rows of slot ``u`` (int64) in use; 0 if there is no such slot."""
    exists = (u >= 0) & (u < slots)
    return tl.where(exists, tl.minimum(tl.load(rows + tl.where(exists, u, 0)), capacity), 0)


@triton.jit(do_not_specialize=["slots", "capacity"])
def _few_inner(
    inner, x, a, rows, users, slots, capacity, n, BR: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Store inner[t, r] = A_r . x_t of one token, for BR rows of its user's slot."""
    t = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BR
    u = tl.load(users + t).to(tl.int64)
    held = _held(rows, u, slots, capacity)
    r = first + tl.arange(0, BR).to(tl.int64)
    live = (r < held)[:, None]
    acc = tl.zeros((BR, BK), tl.float32)
    for k0 in range(0, tl.where(first < held, n, 0), BK):
        k = k0 + tl.arange(0, BK)
        xt = tl.load(x + t * n + k, mask=k < n, other=0).to(tl.float32)
        at = a + (u * capacity + r)[:, None] * n + k
        acc += tl.load(at, mask=live & (k < n), other=0, eviction_policy="evict_first").to(tl.float32) * xt
    tl.store(inner + t * capacity + r, tl.sum(acc, axis=1), mask=r < held)


@triton.jit(do_not_specialize=["slots", "capacity"])
def _few_add(
    y, b, rows, users, inner, slots, capacity, m, BC: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """Add B^T (A x) to BM outputs of one token."""
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    u = tl.load(users + t).to(tl.int64)
    held = _held(rows, u, slots, capacity)
    wanted = i < tl.where(held > 0, m, 0)
    out = tl.load(y + t * m + i, mask=wanted, other=0).to(tl.float32)
    acc = tl.zeros((BC, BM), tl.float32)
    for r0 in range(0, held, BC):
        r = r0 + tl.arange(0, BC).to(tl.int64)
        factor = tl.load(inner + t * capacity + r, mask=r < held, other=0)
        at = b + (u * capacity + r)[:, None] * m + i
        row = tl.load(at, mask=(r < held)[:, None] & wanted, other=0, eviction_policy="evict_first")
        acc += factor[:, None] * row.to(tl.float32)
    tl.store(y + t * m + i, (out + tl.sum(acc, axis=0)).to(y.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["tokens", "slots", "capacity"])
def _low_rank_inner(
    inner, x, a, rows, users, tokens, slots, capacity, n,
    BT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Store A x of BT tokens for BR rows of the slots of their users, one user after the other."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    first = tl.program_id(1) * BR
    r = first + tl.arange(0, BR).to(tl.int64)
    owner = tl.load(users + t, mask=t < tokens, other=-1)
    left = owner
    user = tl.max(left)
    while user >= 0:
        u = user.to(tl.int64)
        held = _held(rows, u, slots, capacity)
        acc = tl.zeros((BT, BR), tl.float32)
        for k0 in range(0, tl.where(first < held, n, 0), BK):
            k = k0 + tl.arange(0, BK)
            xt = tl.load(x + t[:, None] * n + k, mask=(t < tokens)[:, None] & (k < n), other=0)
            row = tl.load(a + (u * capacity + r)[:, None] * n + k, mask=(r < held)[:, None] & (k < n), other=0)
            acc = tl.dot(xt.to(OPERAND), tl.trans(row.to(OPERAND)), acc, input_precision="ieee")
        tl.store(inner + t[:, None] * capacity + r, acc, mask=(owner == user)[:, None] & (r < held))
        left = tl.where(left == user, -1, left)
        user = tl.max(left)


@triton.jit(do_not_specialize=["tokens", "slots", "capacity"])
def _low_rank_add(
    y, inner, b, rows, users, tokens, slots, capacity, m,
    BT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Add B^T (A x) to y for BT tokens and BM outputs, one user after the other."""
    t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    owner = tl.load(users + t, mask=t < tokens, other=-1)
    at = y + t[:, None] * m + i
    left = owner
    user = tl.max(left)
    while user >= 0:
        u = user.to(tl.int64)
        held = _held(rows, u, slots, capacity)
        mine = (owner == user)[:, None]
        part = tl.zeros((BT, BM), tl.float32)
        for r0 in range(0, held, BC):
            r = r0 + tl.arange(0, BC).to(tl.int64)
            factor = tl.load(inner + t[:, None] * capacity + r, mask=mine & (r < held), other=0)
            row = tl.load(b + (u * capacity + r)[:, None] * m + i, mask=(r < held)[:, None] & (i < m), other=0)
            if OPERAND == tl.bfloat16:  # noqa: SIM300
                high = factor.to(tl.bfloat16)
                part = tl.dot(high, row, part)
                part = tl.dot((factor - high.to(tl.float32)).to(tl.bfloat16), row, part)
            else:
                part = tl.dot(factor, row.to(tl.float32), part, input_precision="ieee")
        wanted = mine & (i < tl.where(held > 0, m, 0))
        out = tl.load(at, mask=wanted, other=0).to(tl.float32) + part
        tl.store(at, out.to(y.dtype.element_ty), mask=wanted)
        left = tl.where(left == user, -1, left)
        user = tl.max(left)


@triton.jit(do_not_specialize=["tokens", "slots", "capacity"])
def _low_rank_append(
    a, b, rows, x, delta, eta, users, tokens, slots, capacity, m, n, BN: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """Write BN columns of one token's row behind the rows of its user's earlier tokens, if the slot has room."""
    t = tl.program_id(0).to(tl.int64)  # along the first axis, the only one that may have more than 65,535 programs
    j = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    u = tl.load(users + t).to(tl.int64)
    if (u >= 0) & (u < slots):
        before = tl.zeros((BT,), tl.int32)
        for t0 in range(0, t, BT):
            s = t0 + tl.arange(0, BT)
            before += (tl.load(users + s, mask=s < t, other=-1) == u).to(tl.int32)
        held = tl.load(rows + u)
        to = held + tl.sum(before)
        if (held >= 0) & (to < capacity):
            at = u * capacity + to
            tl.store(a + at * n + j, tl.load(x + t * n + j, mask=j < n, other=0), mask=j < n)
            d = tl.load(delta + t * m + j, mask=j < m, other=0).to(tl.float32)
            tl.store(b + at * m + j, (-tl.load(eta + t) * d).to(b.dtype.element_ty), mask=j < m)


@triton.jit(do_not_specialize=["tokens", "slots", "capacity"])
def _low_rank_count(rows, eta_sum, eta, users, tokens, slots, capacity, BT: tl.constexpr):
    """Update ``rows`` and ``eta_sum`` of one slot after `_low_rank_append`."""
    u = tl.program_id(0)
    held = tl.load(rows + u)
    if (held < 0) | (held > capacity):
        return
    total = 0.0
    for t0 in range(0, tokens, BT):
        t = t0 + tl.arange(0, BT)
        mine = tl.load(users + t, mask=t < tokens, other=-1) == u
        written = mine & (held + tl.cumsum(mine.to(tl.int32), axis=0) <= capacity)
        total += tl.sum(tl.load(eta + t, mask=written, other=0), axis=0)
        held = tl.minimum(held + tl.sum(mine.to(tl.int32), axis=0), capacity)
    tl.store(rows + u, held)
    tl.store(eta_sum + u, tl.load(eta_sum + u) + total)


# Block sizes, by whether values are float32.
_INNER = {
    False: {"BT": 16, "BR": 32, "BK": 128, "num_warps": 4},
    True: {"BT": 16, "BR": 32, "BK": 64, "num_warps": 4},
}
_ADD = {
    False: {"BT": 16, "BM": 128, "BC": 32, "num_warps": 4},
    True: {"BT": 16, "BM": 64, "BC": 32, "num_warps": 4},
}


def isolated_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tokens: int
) -> torch.Tensor:  # fmt: skip
    """`ttt.ops.low_rank.reference.isolated_linear` for x (..., n) of T ``tokens``, without a wait of the host."""
    m, n = weight.shape
    if tokens == 0 or m == 0 or n == 0:
        return torch.nn.functional.linear(x, weight, bias)
    finite_rows, is_bad = torch.empty_like(x), torch.empty(tokens, dtype=torch.int32, device=x.device)
    _take_out[(tokens,)](finite_rows, is_bad, x, n, BK=1024, num_warps=4)
    y = torch.nn.functional.linear(finite_rows, weight, bias)
    _put_nan[(tokens,)](y, is_bad, m, BM=1024, num_warps=4)
    return y


def low_rank_linear(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    rows: torch.Tensor,
    users: torch.Tensor,
) -> torch.Tensor:
    (slots, capacity, n), m, tokens = a.shape, b.shape[2], users.numel()
    y = x.new_zeros((*x.shape[:-1], m)) if weight is None else isolated_linear(x, weight, bias, tokens)
    if tokens == 0 or m == 0 or n == 0 or capacity == 0 or slots == 0:
        return y
    inner = torch.empty((tokens, capacity), dtype=torch.float32, device=x.device)
    if tokens <= FEW_TOKENS:
        columns = padded(n, 1024)
        _few_inner[(tokens, triton.cdiv(capacity, 4))](
            inner, x, a, rows, users, slots, capacity, n, BR=4, BK=columns, num_warps=4
        )
        _few_add[(tokens, triton.cdiv(m, 256))](
            y, b, rows, users, inner, slots, capacity, m, BC=16, BM=256, num_warps=4
        )
        return y
    wide, dot_type = x.dtype == torch.float32, operand(x.dtype)
    blocks = _INNER[wide]
    grid = (triton.cdiv(tokens, blocks["BT"]), triton.cdiv(capacity, blocks["BR"]))
    _low_rank_inner[grid](inner, x, a, rows, users, tokens, slots, capacity, n, OPERAND=dot_type, **blocks)
    blocks = _ADD[wide]
    grid = (triton.cdiv(m, blocks["BM"]), triton.cdiv(tokens, blocks["BT"]))
    _low_rank_add[grid](y, inner, b, rows, users, tokens, slots, capacity, m, OPERAND=dot_type, **blocks)
    return y


def low_rank_append(
    a: torch.Tensor,
    b: torch.Tensor,
    rows: torch.Tensor,
    eta_sum: torch.Tensor,
    x: torch.Tensor,
    delta: torch.Tensor,
    eta: torch.Tensor,
    users: torch.Tensor,
) -> None:
    (slots, capacity, n), m, tokens = a.shape, b.shape[2], users.numel()
    if tokens and slots:
        grid = (tokens, max(1, triton.cdiv(max(m, n), 1024)))
        _low_rank_append[grid](
            a, b, rows, x, delta, eta, users, tokens, slots, capacity, m, n, BN=1024, BT=128, num_warps=4
        )
        _low_rank_count[(slots,)](rows, eta_sum, eta, users, tokens, slots, capacity, BT=128, num_warps=4)
