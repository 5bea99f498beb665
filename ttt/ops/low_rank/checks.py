"""Argument checks of the ops of low-rank weights. All run before anything is written."""

from __future__ import annotations

import torch

from ttt.checks import check_whole
from ttt.ops.dtypes import accumulation
from ttt.ops.schema import FLOATS, MAX_REPLAY_ROWS, need


def _pool(a, b, rows) -> tuple[int, int, int, int]:
    """Check the tensors of a pool; its shape (S, R, n, m)."""
    for name, t in (("a", a), ("b", b)):
        if t.ndim != 3:
            raise ValueError(f"{name} must have three dimensions, got shape {tuple(t.shape)}")
    slots, capacity, n = a.shape
    m = b.shape[2]
    need("a", a, (slots, capacity, n), FLOATS, a)
    need("b", b, (slots, capacity, m), (a.dtype,), a)
    need("rows", rows, (slots,), (torch.int32,), a)
    return slots, capacity, n, m


def check_low_rank_linear(x, weight, bias, a, b, rows, users) -> None:
    if weight is not None and weight.ndim != 2:
        raise ValueError(f"weight must have shape (m, n), got {tuple(weight.shape)}")
    _, _, n, m = _pool(a, b, rows)
    if weight is None:
        if bias is not None:
            raise ValueError(f"bias must be None without a weight, got shape {tuple(bias.shape)}")
    elif weight.is_contiguous():
        need("weight", weight, (m, n), (a.dtype,), a)
    else:
        need("weight, transposed,", weight.T, (n, m), (a.dtype,), a)
    if x.ndim < 1 or x.shape[-1] != n:
        raise ValueError(f"x must have shape (..., {n}), got {tuple(x.shape)}")
    need("x", x, tuple(x.shape), (a.dtype,), a)
    if bias is not None:
        need("bias", bias, (m,), (a.dtype,), a)
    need("users", users, (x.shape[:-1].numel(),), (torch.int32,), a)


def check_low_rank_append(a, b, rows, eta_sum, x, delta, eta, users) -> None:
    slots, _, n, m = _pool(a, b, rows)
    tokens = users.numel()
    need("users", users, (tokens,), (torch.int32,), a)
    need("eta_sum", eta_sum, (slots,), (accumulation(a.dtype),), a)
    need("eta", eta, (tokens,), (accumulation(a.dtype),), a)
    need("x", x, (tokens, n), (a.dtype,), a)
    need("delta", delta, (tokens, m), (a.dtype,), a)


def check_users(users: torch.Tensor, rows: torch.Tensor, slots: int, capacity: int) -> None:
    """Raise ValueError unless users are -1 or slots, and the slots of tokens hold 0 to ``capacity`` rows. On CPU only.

    On CUDA a look at the values would make the host wait.
    """
    if users.numel() == 0:
        return
    low, high = users.aminmax()
    if low < -1 or high >= slots:
        raise ValueError(f"users must be in [-1, {slots}), got {int(low)} to {int(high)}")
    _check_slots(users[users >= 0].unique().tolist(), capacity, rows)


def check_room(users: torch.Tensor, rows: torch.Tensor, slots: int, capacity: int) -> None:
    """`check_users`, and raise ValueError unless every slot has room for a row of each of its tokens. On CPU only."""
    check_users(users, rows, slots, capacity)
    counts = torch.bincount(users[users >= 0], minlength=rows.numel())
    over = (rows + counts > capacity) & (counts > 0)
    if bool(over.any()):
        u = int(over.nonzero()[0])
        raise ValueError(
            f"users gives slot {u} {int(counts[u])} rows more, but {int(rows[u])} of its {capacity} are in use; "
            "compress it first"
        )


def check_counters(
    capacity: int,
    rows: torch.Tensor,
    eta_sum: torch.Tensor,
    lost: torch.Tensor,
    step: torch.Tensor,
    slots: torch.Tensor,
    seen: torch.Tensor | None,
    memory: torch.Tensor | None,
) -> None:
    """Raise ValueError unless the counters of ``slots`` are ones that learning can give. On CPU only.

    Args:
        seen: None where nothing is replayed from ``memory``.
    """
    chosen = [u for u in slots.tolist() if u >= 0]
    _check_slots(chosen, capacity, rows)
    for name, counter in (("eta_sum", eta_sum), ("lost", lost), ("step", step)):
        for u in chosen:
            value = counter[u].item()
            if not value >= 0 or (name == "eta_sum" and value == float("inf")):
                raise ValueError(f"{name}[{u}] must be {'finite and ' * (name == 'eta_sum')}at least 0, got {value}")
    if seen is not None and memory is not None and (int(seen) < 0 or (int(seen) > 0 and len(memory) == 0)):
        raise ValueError(f"seen must be at least 0, and 0 for a memory without rows, got {int(seen)}")


def _check_slots(chosen: list[int], capacity: int, rows: torch.Tensor) -> None:
    for u in chosen:
        if not 0 <= int(rows[u]) <= capacity:
            raise ValueError(f"rows[{u}] must be in [0, {capacity}], got {int(rows[u])}")


def check_low_rank_compress(
    a, b, rows, eta_sum, lost, step, slots, rank, lam, importance_m, importance_n, memory, seen, seed,
    replay_rows, beta, eps,
) -> None:  # fmt: skip
    count, _, n, m = _pool(a, b, rows)
    wide = (accumulation(a.dtype),)
    need("eta_sum", eta_sum, (count,), wide, a)
    need("lost", lost, (count,), wide, a)
    need("step", step, (count,), (torch.int64,), a)
    need("slots", slots, (slots.numel(),), (torch.int64,), a)
    if slots.is_cpu:  # on CUDA a look at the values would make the host wait
        wanted = [u for u in slots.tolist() if u != -1]
        if len(set(wanted)) < len(wanted) or not all(0 <= u < count for u in wanted):
            raise ValueError(f"slots must be -1, or distinct and in [0, {count}), got {slots.tolist()}")
    check_whole("rank", rank, 1)
    if not lam >= 0:
        raise ValueError(f"lam must be >= 0, got {lam}")
    if lam > 0:
        for name, t, size in (("importance_m", importance_m, m), ("importance_n", importance_n, n)):
            if t is None:
                raise ValueError(f"lam = {lam} needs {name}, which is None")
            need(name, t, (size,), wide, a)
    if not 0 <= replay_rows <= MAX_REPLAY_ROWS:
        raise ValueError(f"replay_rows must be in [0, {MAX_REPLAY_ROWS}], got {replay_rows}")
    if replay_rows:
        if memory is None or seen is None:
            raise ValueError(f"replay_rows = {replay_rows} needs memory and seen; one of them is None")
        if memory.ndim != 2:
            raise ValueError(f"memory must have shape (K, {n}), got {tuple(memory.shape)}")
        need("memory", memory, (memory.shape[0], n), (a.dtype,), a)
        need("seen", seen, (1,), (torch.int64,), a)
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
