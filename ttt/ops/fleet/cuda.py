"""The fleet's ops on CUDA: Triton kernels; QR and SVD by cuSOLVER, which torch calls."""

from __future__ import annotations

import torch

from ttt.ops import schema
from ttt.ops.backends import record
from ttt.ops.cuda import _run
from ttt.ops.fleet import checks, reference


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
    record("fleet_compress", "reference", "cuSOLVER, through torch, decomposes the factors")
    reference.fleet_compress(*args)


for _function in (fleet_linear, fleet_append, fleet_compress):
    schema.implement(_function.__name__, "CUDA", _function)
