"""The directions that learning leaves alone, from the inputs that a layer remembers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ttt.nn.linear import Linear


@torch.no_grad()
def refresh(layer: Linear) -> None:
    """Let ``layer.basis`` hold the principal directions of the inputs that ``layer.memory`` holds."""
    if layer.basis is not None:
        layer.own("basis", copy=False)
        layer.basis.copy_(principal_directions(layer.memory[: int(layer.seen)], layer.config.orthogonal))


def principal_directions(rows: Tensor, count: int) -> Tensor:
    """The right singular vectors of ``rows`` (N, n), not centred, of the largest singular values: (count, n), float64.

    They are orthonormal; rows of zeros follow where ``rows`` has a lower rank.
    """
    a = rows.to(torch.float64)
    found = a.new_zeros((count, a.shape[1]))
    if a.numel() == 0:
        return found
    wide = a.shape[0] < a.shape[1]
    gram = a @ a.T if wide else a.T @ a  # the smaller one: a singular value decomposition of ``a`` takes far longer
    values, vectors = torch.linalg.eigh(gram)  # ascending
    rank = int((values > values[-1] * len(values) * torch.finfo(torch.float64).eps).sum())
    top = vectors[:, len(values) - min(rank, count) :].flip(1)
    if wide:  # the squares in ``gram`` cost half of the digits of small directions, which are made orthogonal again
        top = torch.linalg.qr(a.T @ top).Q
    found[: top.shape[1]] = top.T
    return found
