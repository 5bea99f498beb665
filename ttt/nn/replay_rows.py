"""The rows of E where not all are drawn from the replay memory: one defence beside another in the same commit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ttt import ops
from ttt.nn import gaussian
from ttt.ops.philox import spread_tokens

if TYPE_CHECKING:
    from ttt.nn.linear import Linear


def assemble(layer: Linear, x: Tensor) -> Tensor:
    """(R, n), what the commit of tokens ``x`` (T >= 1, n) replays: rows of the memory, of ``x``, and generated ones.

    All are drawn from the counter of commits. What there is nothing to draw from yet are zeros, which pull nothing.
    The host waits for no device.
    """
    c, parts = layer.config, []
    if c.replay_rows:
        index = ops.reservoir_draw(
            layer.seen, layer.step, capacity=c.replay_capacity, rows=c.replay_rows, seed=layer.seed
        )
        parts.append(layer.memory[index.clamp_min(0)].masked_fill((index < 0).unsqueeze(1), 0))
    if c.distill_rows:
        parts.append(x[spread_tokens(len(x), c.distill_rows, layer.step, layer.seed)])
    past = gaussian.of_layer(layer)
    if past is not None:
        parts.append(past.draw(c.generated_rows, layer.step, layer.seed).to(x.dtype))
    return torch.cat(parts)
