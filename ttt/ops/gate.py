"""Gates of ops: (1,) int64 tensors, or None. If a gate holds 0, the op changes nothing."""

from __future__ import annotations

import torch


def closed(gate: torch.Tensor | None) -> bool:
    """Whether ``gate`` holds 0. The host waits for the gate's device."""
    return gate is not None and int(gate) == 0


def gated(gate: torch.Tensor | None, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """``new``; ``old`` if ``gate`` holds 0. The host does not wait for the device."""
    return new if gate is None else torch.where(gate != 0, new, old)


def advance(counter: torch.Tensor, by: int, gate: torch.Tensor | None) -> None:
    """counter <- counter + by, unless ``gate`` holds 0. The host does not wait for the device."""
    if gate is None:
        counter.add_(by)
    else:
        counter.add_(gate != 0, alpha=by)
