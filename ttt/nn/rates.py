"""The step of each token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ttt.config import TTTConfig


def rates(
    x: Tensor,
    delta: Tensor,
    config: TTTConfig,
    wide: torch.dtype,
    applied: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(eta, finite): the step of each token, dtype ``wide``, and whether its gradient is finite; both (T,).

    ``lr``, or less where |delta| |x| is above ``clip``. x: (T, n), delta: (T, m).

    Args:
        applied: makes of ``x`` the inputs that updates are made with; the bound is on those.
    """
    delta_norm = torch.linalg.vector_norm(delta, dim=1, dtype=wide)
    norm = delta_norm * torch.linalg.vector_norm(x, dim=1, dtype=wide)
    # The squared norm bounds every entry of the token's squared gradient: a trace cannot overflow either.
    finite = torch.isfinite(norm * norm)
    eta = torch.full_like(norm, config.lr)
    if config.clip is not None:
        if applied is not None:
            norm = delta_norm * torch.linalg.vector_norm(applied(x), dim=1, dtype=wide)
        eta = eta * (config.clip / norm).clamp_max(1.0)
    return eta, finite
