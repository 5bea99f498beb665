"""The fleet's ops on CUDA: the Triton kernels, or the reference (and a record of why) where they do not apply."""

from __future__ import annotations

import torch

from ttt.ops import schema
from ttt.ops.backends import record
from ttt.ops.cuda import _DTYPES, _kernels, _run
from ttt.ops.low_rank import checks, reference


def fleet_linear(x, weight, bias, a, b, rows, users):
    args = (x, weight, bias, a, b, rows, users)
    checks.check_fleet_linear(*args)
    return _run("fleet_linear", x, x.dtype, *args, fallback=reference.fleet_linear)


def fleet_append(a, b, rows, eta_sum, x, delta, eta, users) -> None:
    args = (a, b, rows, eta_sum, x, delta, eta, users)
    checks.check_fleet_append(*args)
    _run("fleet_append", a, a.dtype, *args, fallback=reference.fleet_append)
    # A kernel wrote through raw pointers: autograd and functionalization must be told.
    torch.autograd.graph.increment_version([a, b, rows, eta_sum])


def fleet_compress(*args) -> None:
    checks.check_fleet_compress(*args)
    a, b = args[:2]
    kernels = _kernels() if a.dtype in _DTYPES else None
    if kernels is not None and (why := kernels.why_not_compress(a, b)):
        record("fleet_compress", "reference", why)
        reference.fleet_compress(*args)
    else:
        _run("fleet_compress", a, a.dtype, *args, fallback=reference.fleet_compress)
    torch.autograd.graph.increment_version(list(args[:6]))


for _function in (fleet_linear, fleet_append, fleet_compress):
    schema.implement(_function.__name__, "CUDA", _function)
