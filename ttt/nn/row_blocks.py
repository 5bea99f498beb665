"""A weight that is not in memory as plain numbers is read a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ttt.ops.dtypes import accumulation

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
    found = torch.zeros((*delta.shape[:-1], n), dtype=accumulation(delta.dtype), device=delta.device)
    for rows, block in blocks:
        found += delta[..., rows] @ block.to(delta.dtype)
    return torch.where(finite, found, torch.nan).to(delta.dtype)


# -- weights that are tensors of a class of their own, as those of torchao --------------------------------------------


def is_subclass(weight: Tensor) -> bool:
    """Whether ``weight`` is of a tensor class that is not torch's own, as quantized weights are."""
    return type(weight) not in (Tensor, nn.Parameter)


def can_be_cut(module: nn.Module) -> bool:
    """Whether the weight of ``module`` is a tensor that computes by itself and can be dequantized by rows."""
    weight: Any = module.weight
    if type(module) is not nn.Linear:
        return False
    try:
        rows = dequantized_rows(weight, slice(0, 1))
    except (NotImplementedError, RuntimeError, TypeError, AttributeError):
        return False
    return not is_subclass(rows) and rows.shape == (min(1, weight.shape[0]), weight.shape[1])


@torch.no_grad()
def dequantized_rows(weight: Tensor, rows: slice = slice(None)) -> Tensor:
    """The ``rows`` of a ``weight`` (m, n) that can be dequantized, as a plain tensor of its dtype."""
    found = _cut(weight, rows)
    return _all_of(weight)[rows] if found is None else found


@torch.no_grad()
def dequantized_blocks(weight: Tensor) -> Blocks:
    """`Blocks` of a ``weight`` (m, n) that can be dequantized; one whose layout cannot be cut is dequantized once."""
    whole: Tensor | None = None
    for rows in row_slices(*weight.shape):
        found = None if whole is not None else _cut(weight, rows)
        if found is None:
            whole = _all_of(weight) if whole is None else whole
            found = whole[rows]
        yield rows, found


def _cut(weight: Tensor, rows: slice) -> Tensor | None:
    """The ``rows`` of ``weight``, dequantized; None if its layout cannot be cut."""
    held: Any = weight.detach()
    try:
        return held[rows].dequantize().to(held.dtype)
    except NotImplementedError:
        return None


def _all_of(weight: Tensor) -> Tensor:
    held: Any = weight.detach()
    return held.dequantize().to(held.dtype)
