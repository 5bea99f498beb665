"""The dtype in which the ops compute sums."""

from __future__ import annotations

import torch


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and states for inputs of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
