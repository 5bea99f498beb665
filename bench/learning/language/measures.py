"""What is measured of a model: the divergence from the frozen model, and means over the parts of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

BLOCKS = 16
"""Parts of a text whose means give the confidence interval of the mean over its tokens."""


@torch.no_grad()
def final_hidden(model: Any, ids: Tensor) -> Tensor:
    """What the model's output head gets on ``ids`` (1, T): (1, T, d)."""
    return model.base_model(input_ids=ids).last_hidden_state


@torch.no_grad()
def divergence(model: Any, rows: Tensor, head: Any, frozen_hidden: Sequence[Tensor]) -> Tensor:
    """KL(frozen || ``model``) of the next token, in nats, at each token of ``rows`` (N, T): (N, T).

    Args:
        head: the frozen model's output head.
        frozen_hidden: what it gets on each row, from `final_hidden`. Logits of all rows would need much more memory.
    """
    found = []
    for row, hidden in zip(rows.split(1), frozen_hidden, strict=True):
        learnt = model(input_ids=row).logits.float().log_softmax(-1)
        frozen = head(hidden).float().log_softmax(-1)
        found.append(functional.kl_div(learnt, frozen, log_target=True, reduction="none").sum(-1))
    return torch.cat(found)


def blocks(values: Tensor) -> list[float]:
    """Means of `BLOCKS` consecutive parts of equal length.

    Raises:
        ValueError: if ``values`` cannot be divided.
    """
    if values.numel() % BLOCKS:
        raise ValueError(f"values must be a multiple of {BLOCKS} in number, got {values.numel()}")
    return [round(mean, 6) for mean in values.double().view(BLOCKS, -1).mean(1).tolist()]
