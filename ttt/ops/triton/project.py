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


@triton.jit
def _components_of(
    parts, x, basis, s, tokens, directions, n,
    BT: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, STRETCH: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """parts[s, t, k] = sum over j in stretch s of x[t, j] U[k, j], for BT tokens and BK directions."""
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


@triton.jit(do_not_specialize=["tokens", "of_x", "of_d"])
def _components(
    parts_x, x, basis_x, parts_d, d, basis_d, tokens, of_x, of_d, n, m,
    BT: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, STRETCH: tl.constexpr, OPERAND: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The components of x (T x n), and of d (T x m) unless it is None, in their directions."""
    begin(PDL)
    s = tl.program_id(0).to(tl.int64)
    stretches = tl.cdiv(n, STRETCH)
    if s < stretches:
        _components_of(parts_x, x, basis_x, s, tokens, of_x, n, BT, BK, BN, STRETCH, OPERAND)
    elif d is not None:
        _components_of(parts_d, d, basis_d, s - stretches, tokens, of_d, m, BT, BK, BN, STRETCH, OPERAND)


@triton.jit
def _take_out_of(
    y, x, parts, basis, block, tokens, directions, n,
    BT: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, STRETCH: tl.constexpr,
):  # fmt: skip
    """y[t, j] = x[t, j] - H[t] U[:, j] for BT tokens and BN columns."""
    j = block * BN + tl.arange(0, BN)
    t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    inside = (t < tokens)[:, None] & (j < n)
    out = tl.load(x + t[:, None] * n + j, mask=inside, other=0).to(tl.float32)
    for k0 in range(0, directions, BK):
        k = k0 + tl.arange(0, BK).to(tl.int64)
        present = (t < tokens)[:, None] & (k < directions)
        h = tl.zeros((BT, BK), tl.float32)
        for s in range(0, tl.cdiv(n, STRETCH)):
            at = (tl.cast(s, tl.int64) * tokens + t)[:, None] * directions + k
            h += tl.load(parts + at, mask=present, other=0)
        u = tl.load(basis + k[:, None] * n + j, mask=(k < directions)[:, None] & (j < n), other=0)
        out -= tl.dot(h, u.to(tl.float32), input_precision="ieee")
    tl.store(y + t[:, None] * n + j, out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "of_x", "of_d"])
def _take_out(
    y, x, parts_x, basis_x, z, d, parts_d, basis_d, tokens, of_x, of_d, n, m,
    BT: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, STRETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = x without its components, and z = d without its own unless d is None."""
    begin(PDL)
    block = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(n, BN)
    if block < blocks:
        _take_out_of(y, x, parts_x, basis_x, block, tokens, of_x, n, BT, BK, BN, STRETCH)
    elif d is not None:
        _take_out_of(z, d, parts_d, basis_d, block - blocks, tokens, of_d, m, BT, BK, BN, STRETCH)


def _launch(x, basis_x, d, basis_d) -> tuple[torch.Tensor, torch.Tensor | None]:
    (of_x, n), (of_d, m) = basis_x.shape, (0, 0) if d is None else basis_d.shape
    y, z = torch.empty_like(x), None if d is None else torch.empty_like(d)
    tokens = x.numel() // n if n else d.numel() // m if m else 0
    if not tokens:
        return y, z
    blocks = triton.cdiv(tokens, 16)

    def parts(width, directions):
        return torch.empty((triton.cdiv(width, STRETCH), tokens, directions), dtype=torch.float32, device=x.device)

    parts_x, parts_d = parts(n, of_x), None if d is None else parts(m, of_d)
    if most := max(of_x, of_d):
        _components[(triton.cdiv(n, STRETCH) + triton.cdiv(m, STRETCH), blocks, triton.cdiv(most, 16))](
            parts_x, x, basis_x, parts_d, d, basis_d, tokens, of_x, of_d, n, m,
            BT=16, BK=16, BN=128, STRETCH=STRETCH, OPERAND=operand(x.dtype), num_warps=4, **overlapping(),
        )  # fmt: skip
    _take_out[(triton.cdiv(n, 64) + triton.cdiv(m, 64), blocks)](
        y, x, parts_x, basis_x, z, d, parts_d, basis_d, tokens, of_x, of_d, n, m,
        BT=16, BK=16, BN=64, STRETCH=STRETCH, num_warps=4, **overlapping(),
    )  # fmt: skip
    return y, z


def project_out(x: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    return _launch(x, basis, None, None)[0]


def project_out_pair(
    x: torch.Tensor, basis_x: torch.Tensor, d: torch.Tensor, basis_d: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`project_out` of x and of d, which have as many rows, in the same two launches."""
    y, z = _launch(x, basis_x, d, basis_d)
    assert z is not None
    return y, z
