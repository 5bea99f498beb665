"""Stochastic rounding to 16-bit numbers in plain torch, and the random bits that it uses.

Each element of a matrix gets 16 random bits at each step. Drawing them is a large part of the cost of writing a 16-bit
weight, so they come from a hash of row and column that is keyed by Philox. Columns 2c and 2c + 1 of row i use the low
and the high half of one word:

    (s0, s1, s2, s3) = Philox 4x32-10, counter (0, 0, step), stream `ROUND`     (`ttt.ops.philox`)
    (k, l)           = mix(s0 + i w, s1), mix(s2 + i w, s3)
    word c           = mix(k + c w, l)

with w = 2^32 / golden ratio, rounded to an odd number, and all sums modulo 2^32: Weyl sequences followed by a
finalizer, as in SplitMix (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). `mix`
is Wellons' finalizer lowbias32 with a second key between its two products. The C++ and Triton kernels compute the same
bits.

A weight is rounded with its own bits, its trace with those of the other column of the pair, its momentum with those of
the other pair among four columns. Weight and trace of one element must not share bits: with Synaptic Intelligence the
trace depends on how the weight was rounded, and would be biased.
"""

from __future__ import annotations

import torch

from ttt.ops.philox import ROUND, philox

WEYL = 0x9E3779B9
MIX = 0x7FEB352D, 0x846CA68B
_MASK = 0xFFFFFFFF


def mix(x: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Hash words ``x`` with ``key`` (int64 with values in [0, 2^32); they broadcast). A bijection for each key."""
    x = x & _MASK
    x = (x ^ (x >> 16)) * MIX[0] & _MASK
    x = (x ^ (x >> 15) ^ key) * MIX[1] & _MASK
    return x ^ (x >> 16)


def _words(rows: int, count: int, step: torch.Tensor, seed: int) -> torch.Tensor:
    i = torch.arange(rows, device=step.device).view(-1, 1)
    c = torch.arange(count, device=step.device).view(1, -1)
    s = philox(torch.zeros_like(step.view(1, 1)), 0, step.view(1, 1), ROUND, seed)
    return mix(mix(s[0] + i * WEYL, s[1]) + c * WEYL, mix(s[2] + i * WEYL, s[3]))


def _halves(first: torch.Tensor, second: torch.Tensor, cols: int) -> torch.Tensor:
    return torch.stack((first, second), dim=-1).flatten(-2)[:, :cols]


def rounding_bits(rows: int, cols: int, step: torch.Tensor, seed: int) -> torch.Tensor:
    """16 bits (int64, rows x cols) for each element of a matrix."""
    words = _words(rows, (cols + 1) // 2, step, seed)
    return _halves(words & 0xFFFF, words >> 16, cols)


def trace_rounding_bits(rows: int, cols: int, step: torch.Tensor, seed: int) -> torch.Tensor:
    """As `rounding_bits`, for the trace: each element gets the bits of the other column of its pair."""
    words = _words(rows, (cols + 1) // 2, step, seed)
    return _halves(words >> 16, words & 0xFFFF, cols)


def momentum_rounding_bits(rows: int, cols: int, step: torch.Tensor, seed: int) -> torch.Tensor:
    """As `rounding_bits`, for the momentum: each element gets the bits of the other pair of its four columns."""
    fours = (cols + 3) // 4
    words = _words(rows, 2 * fours, step, seed).view(rows, fours, 2).flip(-1).flatten(-2)
    return _halves(words & 0xFFFF, words >> 16, cols)


def stochastic_round_(target: torch.Tensor, value: torch.Tensor, bits: torch.Tensor) -> None:
    """Write float32 ``value`` into ``target`` in place; 16-bit targets are rounded stochastically.

    Random bits are added to the mantissa bits that are dropped, and the sum is truncated, so that the expected result
    is the value itself. ``bits`` (int64) holds 16 random bits per element.
    """
    if target.dtype in (torch.float32, torch.float64):
        target.copy_(value)
        return
    dropped = {torch.bfloat16: 16, torch.float16: 13}[target.dtype]
    low = (1 << dropped) - 1
    raw = value.float().contiguous().view(torch.int32).to(torch.int64)
    # Non-finite values have no mantissa to round: adding bits could turn an infinity into a NaN.
    raw = torch.where(torch.isfinite(value), raw + (bits & low), raw) & ~low
    target.copy_(raw.to(torch.int32).view(torch.float32))
