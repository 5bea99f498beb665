"""The ops of users' low-rank weights on CPU."""

from __future__ import annotations

import torch

from ttt.ops import schema
from ttt.ops.backends import record
from ttt.ops.cpu import _C, DTYPE_CODES, MASK64, address, is_plain, why_not
from ttt.ops.low_rank import checks, reference

REFUSED = (
    -2
)  # what the kernels return, having written nothing, for a slot or a counter out of range (csrc/low_rank_bindings.h)


def isolated_linear(x, weight, bias):
    """`reference.isolated_linear`, at the cost of one pass over ``x`` where all of it is finite.

    The kernels must take ``x``'s dtype.
    """
    if _C.all_finite(x.data_ptr(), x.numel(), DTYPE_CODES[x.dtype]):
        return torch.nn.functional.linear(x, weight, bias)
    return reference.isolated_linear(x, weight, bias)


def low_rank_square(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """|b^T a|^2 for ``a`` (R, n) and ``b`` (R, m); None where the kernels do not apply."""
    if why_not(a.dtype) or not (is_plain(a, a.dtype) and is_plain(b, a.dtype)):
        return None
    if a.dim() != 2 or b.dim() != 2 or len(a) != len(b):
        return None
    (rows, n), m = a.shape, b.shape[1]
    return _C.low_rank_square(a.data_ptr(), b.data_ptr(), rows, m, n, DTYPE_CODES[a.dtype])


def low_rank_linear(x, weight, bias, a, b, rows, users):
    checks.check_low_rank_linear(x, weight, bias, a, b, rows, users)
    if why := why_not(x.dtype):
        checks.check_users(users, rows, *a.shape[:2])
        record("low_rank_linear", "reference", why)
        return reference.low_rank_linear(x, weight, bias, a, b, rows, users)
    m, n = b.shape[2], a.shape[2]
    y = x.new_zeros((*x.shape[:-1], m)) if weight is None else isolated_linear(x, weight, bias)
    if not _C.low_rank_linear(
        x.data_ptr(), a.data_ptr(), b.data_ptr(), rows.data_ptr(), users.data_ptr(), y.data_ptr(), users.numel(),
        a.shape[0], m, n, a.shape[1], DTYPE_CODES[x.dtype], torch.get_num_threads(),
    ):  # fmt: skip
        checks.check_users(users, rows, *a.shape[:2])
    record("low_rank_linear", "cpu")
    return y


def low_rank_append(a, b, rows, eta_sum, x, delta, eta, users) -> None:
    checks.check_low_rank_append(a, b, rows, eta_sum, x, delta, eta, users)
    if why := why_not(a.dtype):
        checks.check_room(users, rows, *a.shape[:2])
        record("low_rank_append", "reference", why)
        reference.low_rank_append(a, b, rows, eta_sum, x, delta, eta, users)
        return
    if not _C.low_rank_append(
        a.data_ptr(), b.data_ptr(), rows.data_ptr(), eta_sum.data_ptr(), x.data_ptr(), delta.data_ptr(),
        eta.data_ptr(), users.data_ptr(), users.numel(), a.shape[0], b.shape[2], a.shape[2], a.shape[1],
        DTYPE_CODES[a.dtype], torch.get_num_threads(),
    ):  # fmt: skip
        checks.check_room(users, rows, *a.shape[:2])
    record("low_rank_append", "cpu")
    # The kernel wrote through raw pointers: autograd and functionalization must be told.
    torch.autograd.graph.increment_version([a, b, rows, eta_sum])


def low_rank_compress(
    a, b, rows, eta_sum, lost, step, slots, rank, lam, importance_m, importance_n, memory, seen, seed,
    replay_rows, beta, eps,
) -> None:  # fmt: skip
    args = (
        a, b, rows, eta_sum, lost, step, slots, rank, lam, importance_m, importance_n, memory, seen, seed,
        replay_rows, beta, eps,
    )  # fmt: skip
    checks.check_low_rank_compress(*args)
    counters = a.shape[1], rows, eta_sum, lost, step, slots, seen if replay_rows else None, memory
    if why := why_not(a.dtype):
        checks.check_counters(*counters)
        record("low_rank_compress", "reference", why)
        reference.low_rank_compress(*args)
        return
    slots = slots[slots >= 0]  # referenced until the kernel has ended
    failed = _C.low_rank_compress(*_compress_arguments(*args[:6], slots, *args[7:]))
    if failed == REFUSED:
        checks.check_counters(*counters)
    record("low_rank_compress", "cpu")
    torch.autograd.graph.increment_version([a, b, rows, eta_sum, lost, step])
    refuse(failed)


def _compress_arguments(
    a, b, rows, eta_sum, lost, step, slots, rank, lam, importance_m, importance_n, memory, seen, seed,
    replay_rows, beta, eps,
):  # fmt: skip
    """The arguments of ``_C.low_rank_compress``."""
    return (
        a.data_ptr(), b.data_ptr(), rows.data_ptr(), eta_sum.data_ptr(), lost.data_ptr(), step.data_ptr(),
        address(slots), address(importance_m), address(importance_n), address(memory), address(seen),
        0 if slots is None else slots.numel(), a.shape[0], b.shape[2], a.shape[2], a.shape[1], rank,
        memory.shape[0] if replay_rows else 0, replay_rows, seed & MASK64, lam, beta, eps, DTYPE_CODES[a.dtype],
        torch.get_num_threads(),
    )  # fmt: skip


def refuse(slot: int) -> None:
    """Raise RuntimeError if ``slot``, what the kernel returned, is a slot that could not be compressed."""
    if slot >= 0:
        raise RuntimeError(f"slot {slot} holds rows that are not finite; it was left as it is")


def bind_low_rank(layer):
    """Bind the addresses of a `ttt.nn.LowRankLinear` for ``ttt._C``; None where its kernels do not apply.

    The bound object checks users and counters; the caller checks shapes and dtypes. It is valid until a tensor moves.
    """
    a = layer.a
    if why_not(a.dtype):
        return None
    state = a, layer.b, layer.rows, layer.eta_sum, layer.lost, layer.step
    options = layer.compress_options()
    return _C.LowRank(layer.low_rank.window, *_compress_arguments(*state, None, **options))


for _function in (low_rank_linear, low_rank_append, low_rank_compress):
    schema.implement(_function.__name__, "CPU", _function)
