"""Low-rank factors a (r, n) and b (r, m) of what a layer learnt, delta = b^T a, (m, n). All is computed in float64."""

from __future__ import annotations

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]
"""(a, b)."""


def truncated(delta: Tensor, rank: int) -> Factors:
    """Factors of at most ``rank`` rows, nearest to ``delta`` (m, n) in the Frobenius norm: its truncated SVD.

    Nothing of that rank is nearer (Eckart and Young, 1936). Both factors are multiplied by the square root of the
    singular values.
    """
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    root = s[:rank].sqrt().unsqueeze(1)
    return root * vh[:rank], root * u.T[:rank]


def reduced(a: Tensor, b: Tensor, rank: int) -> Factors:
    """Factors of at most ``rank`` rows, nearest to b^T a, computed without the (m, n) product.

    With b^T = Q_b R_b and a^T = Q_a R_a, b^T a = Q_b (R_b R_a^T) Q_a^T: the SVD of the small matrix in the middle gives
    that of the product. The result is exact if the product's rank is at most ``rank``.
    """
    q_b, r_b = torch.linalg.qr(b.double().T)
    q_a, r_a = torch.linalg.qr(a.double().T)
    core_a, core_b = truncated(r_b @ r_a.T, rank)
    return core_a @ q_a.T, core_b @ q_b.T


def padded(a: Tensor, b: Tensor, rank: int) -> Factors:
    """Append rows of zeros until there are ``rank``; the product stays the same."""
    missing = rank - a.shape[0]
    return (torch.cat([a, a.new_zeros(missing, a.shape[1])]), torch.cat([b, b.new_zeros(missing, b.shape[1])]))


def norm(a: Tensor, b: Tensor) -> float:
    """||b^T a||_F, computed from the triangular factors of a^T and b^T."""
    r_a, r_b = (torch.linalg.qr(t.double().T, mode="r")[1] for t in (a, b))
    return float((r_b @ r_a.T).norm())


def distance(one: Factors, other: Factors) -> float:
    """||b^T a - b'^T a'||_F."""
    (a, b), (c, d) = one, other
    return norm(torch.cat([a.double(), c.double()]), torch.cat([b.double(), -d.double()]))
