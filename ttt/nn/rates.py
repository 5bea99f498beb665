"""The step of each token."""

from __future__ import annotations

import torch
from torch import Tensor

from ttt.config import TTTConfig


def rates(x: Tensor, delta: Tensor, config: TTTConfig, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """(eta, finite): the step of each token, dtype ``wide``, and whether its gradient is finite; both (T,).

    ``lr``, or less where |delta| |x| is above ``clip``. x: (T, n), delta: (T, m).
    """
    norm = torch.linalg.vector_norm(delta, dim=1, dtype=wide) * torch.linalg.vector_norm(x, dim=1, dtype=wide)
    eta = torch.full_like(norm, config.lr)
    if config.clip is not None:
        eta = eta * (config.clip / norm).clamp_max(1.0)
    # The squared norm bounds every entry of the token's squared gradient: a trace cannot overflow either.
    return eta, torch.isfinite(norm * norm)
