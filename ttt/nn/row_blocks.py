"""A weight that is not in memory as plain numbers is read a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ttt.ops.reference import _wide

_BLOCK = 1 << 20  # elements that are dequantized at a time, at most, unless a row has more

Blocks = Iterable[tuple[slice, Tensor]]
"""(rows, these rows as a plain tensor) of a weight (m, n), one block after another."""


def row_slices(m: int, n: int, multiple: int = 1) -> Iterator[slice]:
    """Slices that cover the m rows of a weight (m, n), of a bounded number of elements and a ``multiple`` of rows."""
    step = max(1, _BLOCK // max(1, n) // multiple) * multiple
    for start in range(0, m, step):
        yield slice(start, min(start + step, m))


def transposed_product(delta: Tensor, blocks: Blocks, n: int) -> Tensor:
    """delta W (..., n) for ``delta`` (..., m) and the ``blocks`` of W (m, n).

    Rows that are not finite give NaN, and reach no other row.
    """
    finite = torch.isfinite(delta).all(-1, keepdim=True)
    delta = torch.where(finite, delta, 0.0)
    found = torch.zeros((*delta.shape[:-1], n), dtype=_wide(delta.dtype), device=delta.device)
    for rows, block in blocks:
        found += delta[..., rows] @ block.to(delta.dtype)
    return torch.where(finite, found, torch.nan).to(delta.dtype)
