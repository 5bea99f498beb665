"""Orthogonal updates: the principal directions of a layer's remembered inputs, and inputs without their part in them.

With the k directions as the rows of U (k, n), which are orthonormal, updates are made with x - U^T U x in place of the
input x. A layer's outputs on inputs in the span of U then do not change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt import ops
from ttt.nn.parallel import WHOLE, Side
from ttt.ops.backends import record
from ttt.ops.dtypes import accumulation

_EXACT = 1024  # Eigenvectors of a larger Gram matrix would take seconds.
_OVERSAMPLE, _ROUNDS = 32, 8


def count_directions(wanted: int, n: int) -> int:
    """The number k of directions for a layer of ``n`` inputs: ``wanted``, but at most n // 2, so that it can learn."""
    return min(wanted, n // 2)


def project_rows(x: Tensor, basis: Tensor | None, side: Side = WHOLE) -> Tensor:
    """The rows that updates are made with: x - U^T U x for ``x`` (T, n) and U = ``basis`` (k, n); x without a basis.

    The rows of ``basis`` are orthogonal, of length 1 or less; rows of zeros have no effect. ``side`` is the one of the
    layer that both belong to.
    """
    if basis is None or not side.shared:
        return x if basis is None else ops.project_out(x, basis)
    record("project_out", "reference", "a sharded layer, with sums over processes")
    rows, u = x.to(accumulation(x.dtype)), basis.to(accumulation(x.dtype))
    return (rows - side.sum(rows @ u.T) @ u).to(x.dtype)


def principal_directions(rows: Tensor, count: int) -> Tensor:
    """The right singular vectors of ``rows`` (N, n) with the largest singular values, as (count, n) float64.

    ``rows`` is not centred. The directions are orthonormal, the one of the largest singular value first. If the rank
    of ``rows`` is below ``count``, rows of zeros follow.

    If N and n are both large, the directions are those of a subspace found by randomised subspace iteration (Halko,
    Martinsson & Tropp, SIAM Review 2011). Its random start is fixed, so the same rows give the same directions.
    """
    a = rows.to(torch.float64)
    found = a.new_zeros((count, a.shape[1]))
    if a.numel() == 0 or count == 0:
        return found
    large, wide = min(a.shape) > _EXACT, a.shape[0] < a.shape[1]
    span = _leading_span(a, count + _OVERSAMPLE) if large else None
    part = a if span is None else a @ span
    # The eigenvectors of the smaller Gram matrix take far less time than a singular value decomposition of ``a``.
    gram = part @ part.T if wide and not large else part.T @ part
    values, vectors = torch.linalg.eigh(gram)  # ascending
    rank = int((values > values[-1] * len(values) * torch.finfo(torch.float64).eps).sum())
    top = vectors[:, len(values) - min(rank, count) :].flip(1)
    if span is not None:
        top = span @ top
    elif wide:  # The Gram matrix has only half the digits of directions with small values: make them orthogonal again.
        top = torch.linalg.qr(a.T @ top).Q
    found[: top.shape[1]] = top.T
    return found


def _leading_span(a: Tensor, size: int) -> Tensor:
    """Orthonormal columns (n, size) whose span nearly holds the leading right singular vectors of ``a`` (N, n)."""
    generator = torch.Generator(device=a.device).manual_seed(0)
    span = torch.randn((a.shape[1], size), generator=generator, dtype=a.dtype, device=a.device)
    for _ in range(_ROUNDS):
        span = torch.linalg.qr(a.T @ (a @ span)).Q
    return span
