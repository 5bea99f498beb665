"""The rows that a commit replays if they come from more sources than the replay memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ttt import ops
from ttt.nn.gaussian import Gaussian
from ttt.ops.philox import spread_tokens


def gather_replay_rows(
    x: Tensor,
    step: Tensor,
    seed: int,
    *,
    memory: Tensor | None,
    seen: Tensor,
    memory_rows: int,
    window_rows: int,
    past: Gaussian | None,
    generated_rows: int,
) -> Tensor:
    """Draw the rows (R, n) that the commit of the tokens ``x`` replays; they have the dtype of ``x``.

    R = memory_rows + window_rows + generated_rows, in this order. Sources that are still empty give rows of zeros,
    which have no effect. The host waits for no device.

    Args:
        x: (T, n), T >= 1: inputs of the tokens that are committed, from which ``window_rows`` rows are drawn
            (distillation).
        step: (1,) int64, the number of commits so far, which with ``seed`` determines all draws.
        memory: (K, n), the replay memory, from which ``memory_rows`` rows are drawn; may be None if that is 0.
        seen: (1,) int64, rows that ever entered the memory.
        past: Gaussian of past inputs, from which ``generated_rows`` rows are drawn; may be None if that is 0.
    """
    parts = []
    if memory_rows and memory is not None:
        index = ops.reservoir_draw(seen, step, capacity=len(memory), rows=memory_rows, seed=seed)
        parts.append(memory[index.clamp_min(0)].masked_fill((index < 0).unsqueeze(1), 0))
    if window_rows:
        parts.append(x[spread_tokens(len(x), window_rows, step, seed)])
    if past is not None:
        parts.append(past.draw(generated_rows, step, seed).to(x.dtype))
    return torch.cat(parts)
