"""x' = x - H U with H = x U^T                          x: T x n, U: k x n, H: T x k

Every column of x' needs all of H, so there are two launches. In the first, each program computes a part of H from one
stretch of the columns; the second adds the parts in a fixed order. With one launch, a single multiprocessor would have
to read all of U for each token. Sums are in float32, and H stays in float32 in its product with U, so that x' has only
rounding errors in the directions of U.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ttt.ops.triton.common import begin, operand, overlapping

STRETCH = 512


@triton.jit(do_not_specialize=["tokens", "directions"])
def _components(
    parts, x, basis, tokens, directions, n,
    BT: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, STRETCH: tl.constexpr, OPERAND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """parts[s, t, k] = sum over j in stretch s of x[t, j] U[k, j], for BT tokens and BK directions."""
    begin(PDL)
    s = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    k = tl.program_id(2).to(tl.int64) * BK + tl.arange(0, BK)
    acc = tl.zeros((BT, BK), tl.float32)
    for j0 in range(0, STRETCH, BN):
        j = s * STRETCH + j0 + tl.arange(0, BN)
        xt = tl.load(x + t[:, None] * n + j, mask=(t < tokens)[:, None] & (j < n), other=0)
        u = tl.load(basis + k[:, None] * n + j, mask=(k < directions)[:, None] & (j < n), other=0)
        acc = tl.dot(xt.to(OPERAND), tl.trans(u.to(OPERAND)), acc, input_precision="ieee")
    inside = (t < tokens)[:, None] & (k < directions)
    tl.store(parts + (s * tokens + t)[:, None] * directions + k, acc, mask=inside)


@triton.jit(do_not_specialize=["stretches", "tokens", "directions"])
def _take_out(
    y, x, parts, basis, stretches, tokens, directions, n,
    BT: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[t, j] = x[t, j] - H[t] U[:, j] for BT tokens and BN columns."""
    begin(PDL)
    j = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    inside = (t < tokens)[:, None] & (j < n)
    out = tl.load(x + t[:, None] * n + j, mask=inside, other=0).to(tl.float32)
    for k0 in range(0, directions, BK):
        k = k0 + tl.arange(0, BK).to(tl.int64)
        present = (t < tokens)[:, None] & (k < directions)
        h = tl.zeros((BT, BK), tl.float32)
        for s in range(stretches):
            at = (tl.cast(s, tl.int64) * tokens + t)[:, None] * directions + k
            h += tl.load(parts + at, mask=present, other=0)
        u = tl.load(basis + k[:, None] * n + j, mask=(k < directions)[:, None] & (j < n), other=0)
        out -= tl.dot(h, u.to(tl.float32), input_precision="ieee")
    tl.store(y + t[:, None] * n + j, out.to(y.dtype.element_ty), mask=inside)


def project_out(x: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    (k, n), y = basis.shape, torch.empty_like(x)
    tokens = x.numel() // n if n else 0
    if tokens:
        stretches, blocks = triton.cdiv(n, STRETCH), triton.cdiv(tokens, 16)
        parts = torch.empty((stretches, tokens, k), dtype=torch.float32, device=x.device)
        if k:
            _components[(stretches, blocks, triton.cdiv(k, 16))](
                parts, x, basis, tokens, k, n, BT=16, BK=16, BN=128, STRETCH=STRETCH, OPERAND=operand(x.dtype),
                num_warps=4, **overlapping(),
            )  # fmt: skip
        _take_out[(triton.cdiv(n, 64), blocks)](
            y, x, parts, basis, stretches, tokens, k, n, BT=16, BK=16, BN=64, num_warps=4, **overlapping()
        )
    return y
