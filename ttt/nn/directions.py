"""The directions that learning leaves alone, from the inputs that a layer remembers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ttt import ops

if TYPE_CHECKING:
    from ttt.config import TTTConfig
    from ttt.nn.linear import Linear
    from ttt.nn.low_rank import LowRankLinear

_EXACT = 1024  # of a Gram matrix: larger ones take seconds
_OVERSAMPLE, _ROUNDS = 32, 8


def directions(config: TTTConfig, n: int) -> int:
    """k of a layer of ``n`` inputs: at most half of them, so that every layer can learn."""
    return min(config.orthogonal, n // 2)


@torch.no_grad()
def refresh(layer: Linear | LowRankLinear) -> None:
    """Let ``layer.basis`` hold the principal directions of the inputs that ``layer.memory`` holds."""
    if layer.basis is not None:
        layer.own("basis", copy=False)
        layer.basis.copy_(principal_directions(layer.memory[: int(layer.seen)], len(layer.basis)))


def learnable(layer: Linear | LowRankLinear, x: Tensor) -> Tensor:
    """Inputs (T, n) as updates are made with them: x - U^T U x."""
    return x if layer.basis is None else ops.project_out(x, layer.basis)


def principal_directions(rows: Tensor, count: int) -> Tensor:
    """The right singular vectors of ``rows`` (N, n), not centred, of the largest singular values: (count, n), float64.

    They are orthonormal; rows of zeros follow where ``rows`` has a lower rank. Where both N and n are large they are
    those of a subspace found by iteration (Halko, Martinsson & Tropp, SIAM Review 2011), the same in every run.
    """
    a = rows.to(torch.float64)
    found = a.new_zeros((count, a.shape[1]))
    if a.numel() == 0 or count == 0:
        return found
    large, wide = min(a.shape) > _EXACT, a.shape[0] < a.shape[1]
    span = _leading_span(a, count + _OVERSAMPLE) if large else None
    part = a if span is None else a @ span
    # The smaller Gram matrix: a singular value decomposition of ``a`` takes far longer.
    gram = part @ part.T if wide and not large else part.T @ part
    values, vectors = torch.linalg.eigh(gram)  # ascending
    rank = int((values > values[-1] * len(values) * torch.finfo(torch.float64).eps).sum())
    top = vectors[:, len(values) - min(rank, count) :].flip(1)
    if span is not None:
        top = span @ top
    elif wide:  # the squares in ``gram`` cost half of the digits of small directions, which are made orthogonal again
        top = torch.linalg.qr(a.T @ top).Q
    found[: top.shape[1]] = top.T
    return found


def _leading_span(a: Tensor, size: int) -> Tensor:
    """(n, size): orthonormal columns whose span holds, nearly, the leading right singular vectors of ``a`` (N, n)."""
    generator = torch.Generator(device=a.device).manual_seed(0)
    span = torch.randn((a.shape[1], size), generator=generator, dtype=a.dtype, device=a.device)
    for _ in range(_ROUNDS):
        span = torch.linalg.qr(a.T @ (a @ span)).Q
    return span
