"""The ops of users' low-rank weights on CUDA: Triton kernels, or the reference and a record of why."""

from __future__ import annotations

import torch

from ttt.ops import schema
from ttt.ops.backends import record
from ttt.ops.cuda import DTYPES, loaded_kernels, run_kernel
from ttt.ops.low_rank import checks, reference


def low_rank_linear(x, weight, bias, a, b, rows, users):
    args = (x, weight, bias, a, b, rows, users)
    checks.check_low_rank_linear(*args)
    return run_kernel("low_rank_linear", x, x.dtype, *args, fallback=reference.low_rank_linear)


def low_rank_append(a, b, rows, eta_sum, x, delta, eta, users) -> None:
    args = (a, b, rows, eta_sum, x, delta, eta, users)
    checks.check_low_rank_append(*args)
    run_kernel("low_rank_append", a, a.dtype, *args, fallback=reference.low_rank_append)
    # A kernel wrote through raw pointers: autograd and functionalization must be told.
    torch.autograd.graph.increment_version([a, b, rows, eta_sum])


def low_rank_compress(*args) -> None:
    checks.check_low_rank_compress(*args)
    a, b = args[:2]
    kernels = loaded_kernels() if a.dtype in DTYPES else None
    if kernels is not None and (why := kernels.why_not_compress(a, b)):
        record("low_rank_compress", "reference", why)
        reference.low_rank_compress(*args)
    else:
        run_kernel("low_rank_compress", a, a.dtype, *args, fallback=reference.low_rank_compress)
    torch.autograd.graph.increment_version(list(args[:6]))


for _function in (low_rank_linear, low_rank_append, low_rank_compress):
    schema.implement(_function.__name__, "CUDA", _function)
