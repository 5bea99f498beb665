"""Ceilings: the machine's own rates of copying, reading and multiplying, measured beside the contenders."""

from __future__ import annotations

import functools
import time

import torch

from bench.kernels.contender import Contender

COPY_BYTES = {"cpu": 512 << 20, "cuda": 1 << 30}
"""Size of the buffer that is copied: larger than any cache."""


def _no_check() -> None:
    """Does nothing: torch's own copy and matrix product are assumed to be right."""


@functools.cache
def _copy_buffers(device: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    # Written, not only allocated: the operating system provides pages at the first access.
    return torch.ones(size // 4, device=device), torch.zeros(size // 4, device=device)


def copy_ceiling(device: str) -> Contender:
    """Copies a buffer of `COPY_BYTES`. A unit is one byte; bytes read and bytes written both count."""
    source, target = _copy_buffers(device, COPY_BYTES[device])
    # In a CUDA graph it would be a node that a copy engine runs, at two thirds of this speed (H200).
    return Contender(lambda: target.copy_(source), _no_check, units=2 * COPY_BYTES[device], graph=False)


def read_ceiling(device: str) -> Contender:
    """Takes the maximum of the same buffer, which reads it and writes nothing. A unit is one byte.

    The maximum is the torch reduction closest to a loop that only loads: on an AMD EPYC (Zen 4, 2 threads) it reaches
    32 to 33 GB/s, as such a loop does; a sum reaches 28 to 30.
    """
    source, _ = _copy_buffers(device, COPY_BYTES[device])
    return Contender(source.max, _no_check, units=COPY_BYTES[device])


def product_ceiling(device: str, dtype: str, m: int, k: int, n: int) -> Contender:
    """torch's product of (m, k) and (k, n). A unit is one flop."""
    a, b = (torch.randn(shape, device=device).to(getattr(torch, dtype)) for shape in ((k, m), (k, n)))
    out = torch.zeros(m, n, device=device, dtype=a.dtype)
    return Contender(lambda: torch.mm(a.T, b, out=out), _no_check, units=2 * m * k * n)


def square_ceiling(device: str, dtype: str) -> Contender:
    """A square product that takes at most a fifth of a second.

    The size adapts to the machine: without bfloat16 instructions a product can be 100 times slower.
    """
    return product_ceiling(device, dtype, *(_square(device, dtype, torch.get_num_threads()),) * 3)


@functools.cache
def _square(device: str, dtype: str, threads: int) -> int:
    if device == "cuda":
        return 8192
    d = 256
    while d < 2048:
        product = product_ceiling(device, dtype, d, d, d)
        product.run()
        began = time.perf_counter()
        product.run()
        if (time.perf_counter() - began) * 8 > 0.2:
            break
        d *= 2
    return d
