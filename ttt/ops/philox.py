"""Philox 4x32-10 in plain torch (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

The C++ and Triton kernels run the same generator on the same counters, so all three backends draw the same replay rows
and the same rounding bits. The key is the 64-bit seed; the counters are:

==========  ======================  ======================================================================
stream      counter (c0, c1, c2)    words used
==========  ======================  ======================================================================
`DRAW`      (r // 4, 0, step)       word r % 4 chooses replay row r
`INSERT`    (s, 0, 0)               word 0 chooses the slot of the s-th row seen
`ROUND`     (0, 0, step)            all words: the keys of a step's rounding bits (`ttt.ops.rounding`)
`TOKEN`     (k // 4, 0, step)       word k % 4 chooses the token that stands for the k-th group in the trace
`DISTIL`    (r // 4, 0, step)       word r % 4 chooses the token that is distillation row r
`NORMAL`    (j // 4, r, step)       words 0 and 1 make normals 0 and 1 of four, words 2 and 3 the others
==========  ======================  ======================================================================

c3 is the stream's number.
"""

from __future__ import annotations

import math

import torch

DRAW, INSERT, ROUND, TOKEN, DISTIL, NORMAL = 0, 1, 2, 3, 4, 5

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def philox(
    c0: torch.Tensor, c1: torch.Tensor | int, c2: torch.Tensor | int, stream: int, seed: int
) -> tuple[torch.Tensor, ...]:
    """Four random words (int64 tensors with values in [0, 2^32)) for each counter; the counters broadcast.

    int64 products of 32-bit words wrap modulo 2^64, so both halves stay exact.
    """
    # `full` sets the number on the device: copying it there would make the host wait.
    c1, c2 = (
        c if isinstance(c, torch.Tensor) else torch.full((), c, dtype=torch.int64, device=c0.device) for c in (c1, c2)
    )
    a, b, c = torch.broadcast_tensors(c0 & _MASK, c1 & _MASK, c2 & _MASK)
    d = torch.full_like(a, stream)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        p0, p1 = a * _M0, c * _M1
        a, b, c, d = ((p1 >> 32) & _MASK) ^ b ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ d ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return a, b, c, d


def choose_tokens(tokens: int, every: int, step: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a random token from each group of ``every`` consecutive ones: its index and the group's size, both int64."""
    k = torch.arange((tokens + every - 1) // every, device=step.device)
    word = torch.stack(philox(k // 4, 0, step, TOKEN, seed), dim=-1)[k, k % 4]
    size = (tokens - k * every).clamp_max(every)
    return k * every + ((word * size) >> 32), size


def spread_tokens(tokens: int, rows: int, step: torch.Tensor, seed: int) -> torch.Tensor:
    """Draw ``rows`` of ``tokens`` >= 1 tokens (int64, ascending): row r is uniform in the r-th of ``rows`` equal parts.

    Each token is expected ``rows / tokens`` times, and at most twice if rows <= tokens.
    """
    r = torch.arange(rows, device=step.device)
    word = torch.stack(philox(r // 4, 0, step, DISTIL, seed), dim=-1)[r, r % 4]
    return ((r << 32) + word) * tokens // (rows << 32)


def normals(rows: int, cols: int, step: torch.Tensor, seed: int) -> torch.Tensor:
    """Draw standard normal numbers (float64, rows x cols) by the transform of Box and Muller (1958); see `NORMAL`."""
    c0 = torch.arange((cols + 3) // 4, device=step.device).view(1, -1)
    c1 = torch.arange(rows, device=step.device).view(-1, 1)
    words = torch.stack(philox(c0, c1, step.view(1, 1), NORMAL, seed), dim=-1)
    u = (words.to(torch.float64) + 0.5) * 2.0**-32  # never 0
    radius, angle = (-2 * u[..., 0::2].log()).sqrt(), 2 * math.pi * u[..., 1::2]
    z = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return z.reshape(rows, 4 * c0.numel())[:, :cols]
