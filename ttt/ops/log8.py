"""Importance and trace in 8 bits: floating-point codes, with one exponent shared by each block of 32 columns.

A matrix (m, n) of values >= 0 is stored as one uint8 tensor (m, n + ceil(n / 32)). Each row holds n codes, followed by
the exponents of its blocks. With code q and exponent e the value is:

    0                                            if q = 0
    2^(e - 127) 2^(q // 16 - 16) (1 + q % 16 / 16)    otherwise

Codes have 4 bits of exponent, 4 of fraction and no sign: 16 to an octave, so the distance to the next code is 3 to 6 %
of the value, over a range of 2^16 below the block's maximum. Coding takes only shifts of float32 bit patterns, which
are cheap in every kernel. e = 0 marks a block of zeros; otherwise e is the smallest in [1, 253] for which the block's
maximum is at most 31/32 2^(e - 127), code 255.

Values are rounded stochastically, with 16 random bits per element: the expected result is the value itself, so sums of
additions to a trace that are smaller than the distance of two codes are right on average.
"""

from __future__ import annotations

import torch

BLOCK = 32
FIRST = 111 << 4  # the bits of 2^-16 shifted right by 19; code 0, which stands for zero, takes its place
SMALLEST = 2.0**-16 * (1 + 1 / 16)  # code 1
MAX_EXPONENT = 253  # so that the inverse scale is a normal number
ROOM = 0x7FFFF  # added to a maximum's bits, carries into the exponent if its fraction exceeds that of code 255
NEAREST = 0x8000  # in place of random bits: rounds to the nearest code


def width(n: int) -> int:
    """The columns of the uint8 tensor that holds n columns of values."""
    return n + (n + BLOCK - 1) // BLOCK


def is_packed(t: torch.Tensor | None) -> bool:
    """Whether ``t`` holds codes of this format."""
    return t is not None and t.dtype == torch.uint8


def zeros(m: int, n: int, device: torch.device | str | None = None) -> torch.Tensor:
    """(m, width(n)) uint8 that holds zeros."""
    return torch.zeros((m, width(n)), dtype=torch.uint8, device=device)


def decode(packed: torch.Tensor, n: int) -> torch.Tensor:
    """(m, width(n)) uint8 -> (m, n) float32."""
    codes = packed[:, :n].to(torch.int32)
    scale = (packed[:, n:].to(torch.int32) << 23).view(torch.float32).repeat_interleave(BLOCK, dim=1)[:, :n]
    value = ((codes + FIRST) << 19).view(torch.float32) * scale
    return torch.where(codes > 0, value, 0.0)


def encode(values: torch.Tensor, bits: torch.Tensor | None = None) -> torch.Tensor:
    """(m, n) float values >= 0, finite -> (m, width(n)) uint8.

    Args:
        bits: (m, n) int64, 16 random bits per element; None rounds to the nearest code.
    """
    m, n = values.shape
    v = values.to(torch.float32).contiguous()
    r = torch.full((), NEAREST, dtype=torch.int32, device=v.device) if bits is None else bits.to(torch.int32)
    blocks = torch.nn.functional.pad(v, (0, -n % BLOCK)).view(m, -1, BLOCK)
    top = blocks.amax(dim=2) if n else v.new_zeros((m, 0))
    exponent = (((top.view(torch.int32) + ROOM) >> 23) + 1).clamp(1, MAX_EXPONENT)
    exponent = torch.where(top > 0, exponent, 0)
    inverse = ((254 - exponent) << 23).view(torch.float32).repeat_interleave(BLOCK, dim=1)[:, :n]
    scaled = v * inverse
    # 19 bits of the fraction are dropped. The 16 random bits are added to the upper ones of them; the 4 centres their
    # distribution.
    code = ((scaled.view(torch.int32) + (r << 3 | 4)) >> 19) - FIRST
    small = (scaled > SMALLEST * 2.0**-16 * (r.to(torch.float32) + 0.5)).to(torch.int32)
    code = torch.where(scaled < SMALLEST, small, code.clamp(1, 255))
    return torch.cat((code, exponent), dim=1).to(torch.uint8)
