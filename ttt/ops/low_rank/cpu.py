"""The ops of users' low-rank weights on CPU."""

from __future__ import annotations

import torch

from ttt.ops import schema
from ttt.ops.backends import record
from ttt.ops.cpu import _C, _DTYPE, _MASK64, _address, _why_not
from ttt.ops.low_rank import checks, reference


def _check_users(users, a, rows=None) -> None:
    """Every token's slot exists and, where ``rows`` is given, has room. The kernel asks, torch words the error."""
    slots, capacity = a.shape[:2]
    if _C is not None and _C.low_rank_fits(users.data_ptr(), _address(rows), users.numel(), slots, capacity):
        return
    checks.check_users(users, slots)
    if rows is not None:
        checks.check_room(users, rows, capacity)


def low_rank_linear(x, weight, bias, a, b, rows, users):
    checks.check_low_rank_linear(x, weight, bias, a, b, rows, users)
    _check_users(users, a)
    if why := _why_not(x.dtype):
        record("low_rank_linear", "reference", why)
        return reference.low_rank_linear(x, weight, bias, a, b, rows, users)
    record("low_rank_linear", "cpu")
    m, n = weight.shape
    y = torch.nn.functional.linear(x, weight, bias)
    _C.low_rank_linear(
        x.data_ptr(), a.data_ptr(), b.data_ptr(), rows.data_ptr(), users.data_ptr(), y.data_ptr(), users.numel(), m, n,
        a.shape[1], _DTYPE[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return y


def low_rank_append(a, b, rows, eta_sum, x, delta, eta, users) -> None:
    checks.check_low_rank_append(a, b, rows, eta_sum, x, delta, eta, users)
    _check_users(users, a, rows)
    if why := _why_not(a.dtype):
        record("low_rank_append", "reference", why)
        reference.low_rank_append(a, b, rows, eta_sum, x, delta, eta, users)
        return
    record("low_rank_append", "cpu")
    _C.low_rank_append(
        a.data_ptr(), b.data_ptr(), rows.data_ptr(), eta_sum.data_ptr(), x.data_ptr(), delta.data_ptr(),
        eta.data_ptr(), users.data_ptr(), users.numel(), b.shape[2], a.shape[2], a.shape[1], _DTYPE[a.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    # The kernel wrote through raw pointers: autograd and functionalization must be told.
    torch.autograd.graph.increment_version([a, b, rows, eta_sum])


def low_rank_compress(
    a, b, rows, eta_sum, lost, step, slots, rank, shrink, lam, importance_m, importance_n, memory, seen, seed,
    replay_rows, replay, beta, eps,
) -> None:  # fmt: skip
    args = (
        a, b, rows, eta_sum, lost, step, slots, rank, shrink, lam, importance_m, importance_n, memory, seen, seed,
        replay_rows, replay, beta, eps,
    )  # fmt: skip
    checks.check_low_rank_compress(*args)
    if why := _why_not(a.dtype):
        record("low_rank_compress", "reference", why)
        reference.low_rank_compress(*args)
        return
    record("low_rank_compress", "cpu")
    slots = slots[slots >= 0]  # kept until the kernel has ended
    failed = _C.low_rank_compress(*_compress_arguments(*args[:6], slots, *args[7:]))
    torch.autograd.graph.increment_version([a, b, rows, eta_sum, lost, step])
    refuse(failed)


def _compress_arguments(
    a, b, rows, eta_sum, lost, step, slots, rank, shrink, lam, importance_m, importance_n, memory, seen, seed,
    replay_rows, replay, beta, eps,
):  # fmt: skip
    """What ``_C.low_rank_compress`` takes."""
    return (
        a.data_ptr(), b.data_ptr(), rows.data_ptr(), eta_sum.data_ptr(), lost.data_ptr(), step.data_ptr(),
        _address(slots), _address(importance_m), _address(importance_n), _address(memory), _address(seen),
        0 if slots is None else slots.numel(), b.shape[2], a.shape[2], a.shape[1], rank,
        memory.shape[0] if replay_rows else 0, replay_rows, seed & _MASK64, lam, beta, eps, shrink == "directions",
        _DTYPE[a.dtype], schema.REPLAY.index(replay), torch.get_num_threads(),
    )  # fmt: skip


def refuse(slot: int) -> None:
    """Raise for the slot that could not be compressed, if it is one."""
    if slot >= 0:
        raise RuntimeError(f"slot {slot} holds rows that are not finite; it was left as it is")


def bind_low_rank(layer):
    """The addresses of a `ttt.nn.LowRankLinear`, bound for ``ttt._C``, or None where its kernels do not apply.

    What is bound checks the users' slots and nothing else: the layer does. Good until one of the tensors moves.
    """
    a = layer.a
    if _why_not(a.dtype):
        return None
    state = a, layer.b, layer.rows, layer.eta_sum, layer.lost, layer.step
    options = layer.compress_options()
    return _C.LowRank(a.shape[0], layer.low_rank.window, *_compress_arguments(*state, None, **options))


for _function in (low_rank_linear, low_rank_append, low_rank_compress):
    schema.implement(_function.__name__, "CPU", _function)
