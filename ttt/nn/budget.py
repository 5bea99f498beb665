"""A budget for the change of a layer's weights, above which steps shrink and the change is scaled back.

How far a model's predictions move with its weights is estimated from the size of the change. The Kullback-Leibler
divergence (KL) of the changed model from the one before is to second order 1/2 vec(D)^T F vec(D), where D = W - W* is
the change and F the Fisher information. Outside of the few directions that updates leave alone (`ttt.nn.kronecker`),
F is about f I, and f is known: with s^2 of `ttt.nn.rates`, whose mean over the tokens of calibration the layer holds::

    f = mean s^2 / (m n)          KL  ~  sum over layers of  1/2 f |D|^2

Each layer has the same part of the budget, the ``share`` 1 / (number of layers) of its ``nats``. With the filling
q = 1/2 f |D|^2 / (share nats), measured when rows were last written into the weights:

- Steps are multiplied by min(1, max(slowest, 2 (1 - q))): up to half of the budget nothing changes.
- If q is above 1 after a commit, D is multiplied by 1 / sqrt(q).
- If it is above 1 after a compression of a user's weights, whose rows belong to the singular values of D, the largest
  singular values are lowered to one value, with which q is 1: sum over i of min(s_i, c)^2 = |D|^2 / q. They belong to
  what all texts have in common, as the tokens of a chat's template; what one sentence has taught is in the others.

So a layer's weights never stay outside of their part of the budget; rows that are in effect but not yet written come on
top of that, at most one window. Steps that went on at their full size at the bound would soon replace all of what was
learnt before; steps that fell to 0 would leave no room for anything new.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt.config import TTTConfig
from ttt.ops.dtypes import accumulation
from ttt.ops.low_rank import cpu

HALF = 0.5  # the filling up to which steps keep their size
_ORTHOGONAL = 1e-4  # how far |D|^2 is from the sum of the squares of its rows' lengths where these are orthogonal


def largest_square(config: TTTConfig, share: float, size: int, calibrated: Tensor, learnt: Tensor) -> Tensor:
    """|D|^2 at which a layer's part of the budget is full: (...,) float64; infinity while s^2 is not known.

    Args:
        config: with a `ttt.DriftBudget`.
        share: of the layer in the budget.
        size: m n.
        calibrated: (3,) float64, the moments of `ttt.nn.rates` at calibration.
        learnt: (..., 3), those of the tokens learnt since, which count only for a layer that was never calibrated.
    """
    sums = torch.where(calibrated[2] > 0, calibrated, learnt)
    square = sums[..., 1] / sums[..., 2].clamp_min(1.0)
    return torch.where(square > 0, 2 * config.budget * share * size / square, torch.inf)


def pace(config: TTTConfig, square: Tensor, largest: Tensor) -> Tensor:
    """What multiplies the steps at |D|^2 = ``square``; both (...,) float64."""
    return ((1 - square / largest) / (1 - HALF)).clamp(config.budget_slowest, 1.0)


def scale(square: Tensor, largest: Tensor) -> Tensor:
    """What multiplies D, at most 1; arguments as for `pace`."""
    return torch.where(square > largest, (largest / square).sqrt(), 1.0)


def capped(values: Tensor, total: Tensor) -> Tensor:
    """The c with sum over i of min(values_i, c)^2 = ``total``: () float64.

    Args:
        values: (R,) float64, not negative, whose squares sum to more than ``total``.
        total: () float64, not negative.
    """
    squares = values.sort(descending=True).values.square()
    after = torch.cat([squares.flip(0).cumsum(0).flip(0)[1:], squares.new_zeros(1)])  # the sum of all smaller ones
    found = (total - after) / torch.arange(1, len(squares) + 1, device=values.device)  # c^2 if i + 1 values are lowered
    fits = found >= torch.cat([squares[1:], squares.new_zeros(1)])
    return found[fits.to(torch.uint8).argmax()].clamp_min(0.0).sqrt()


def bound_(a: Tensor, b: Tensor, largest: Tensor) -> None:
    """Lower the largest singular values of D = b^T a, in place, to those with which |D|^2 is at most ``largest``.

    Args:
        a, b: (R, n) and (R, m), rows that a compression made: those of ``a`` are orthogonal to one another, and those
            of ``b``, so that the singular values are the products of their lengths. Where a protection of the
            compression has made them not quite orthogonal, all are then scaled by what is still missing.
        largest: () float64.
    """
    square = low_rank_square(a, b)
    if not bool(square > largest):
        return
    lengths = [torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) for rows in (a, b)]
    values = lengths[0] * lengths[1]
    total = values.square().sum()
    if bool(total > largest):
        factors = (capped(values, largest) / values).clamp_max(1.0).sqrt().unsqueeze(1)
        a.copy_(a * factors)
        b.copy_(b * factors)
    if bool((total - square).abs() > _ORTHOGONAL * square):
        b.copy_(b * scale(low_rank_square(a, b), largest))


def low_rank_square(a: Tensor, b: Tensor) -> Tensor:
    """|b^T a|^2 for ``a`` (R, n) and ``b`` (R, m): () float64.

    Raises:
        ValueError: if they are not matrices of as many rows.
    """
    if a.dim() != 2 or b.dim() != 2 or len(a) != len(b):
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"a and b must have shapes (R, n) and (R, m), got {shapes}")
    if (found := cpu.low_rank_square(a, b)) is not None:
        return torch.tensor(found, dtype=torch.float64).clamp_min(0.0)
    wide = accumulation(a.dtype)
    a, b = a.to(wide), b.to(wide)
    return ((a @ a.T).double() * (b @ b.T).double()).sum().clamp_min(0.0)
