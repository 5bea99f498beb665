"""The fleet's ops on CPU."""

from __future__ import annotations

from ttt.ops import schema
from ttt.ops.backends import record
from ttt.ops.cpu import _why_not
from ttt.ops.fleet import checks, reference

# Rows are copied, and factors decomposed by LAPACK: torch does both as well as any kernel of ours would.
_COPIES, _LAPACK = "rows are copied", "LAPACK, through torch, decomposes the factors"


def fleet_linear(x, weight, bias, a, b, rows, users):
    checks.check_fleet_linear(x, weight, bias, a, b, rows, users)
    checks.check_users(users, a.shape[0])
    record("fleet_linear", "reference", _why_not(x.dtype))
    return reference.fleet_linear(x, weight, bias, a, b, rows, users)


def fleet_append(a, b, rows, eta_sum, x, delta, eta, users) -> None:
    checks.check_fleet_append(a, b, rows, eta_sum, x, delta, eta, users)
    checks.check_users(users, a.shape[0])
    checks.check_room(users, rows, a.shape[1])
    record("fleet_append", "reference", _COPIES)
    reference.fleet_append(a, b, rows, eta_sum, x, delta, eta, users)


def fleet_compress(*args) -> None:
    checks.check_fleet_compress(*args)
    record("fleet_compress", "reference", _LAPACK)
    reference.fleet_compress(*args)


for _function in (fleet_linear, fleet_append, fleet_compress):
    schema.implement(_function.__name__, "CPU", _function)
