"""Memories that learn, on texts: TTT-Linear, TTT-MLP and Titans       q, k, v: T x H x D, weights of a layer: I x O

Two kernels read a text, in chunks of up to 16 tokens of a mini-batch. One goes through the chunks and learns
(`ttt.ops.triton.memory_learn`); it leaves the gradients, and the weights before each chunk. The other reads all chunks
at once with those (`ttt.ops.triton.memory_read`). A long text is divided into parts, so that what is left between the
two needs a bounded amount of memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from ttt.ops.triton import common
from ttt.ops.triton.memory_learn import learn_one, learn_two
from ttt.ops.triton.memory_read import read_one, read_two

TOKENS = 16
"""The most tokens of a chunk: the columns of a product on tensor cores."""
MOST_WIDE = 64
"""The widest head of a text: the operands of wider products do not fit into registers."""
BETWEEN = 2**28
"""The most bytes of weights between the two kernels, if a chunk does not need more."""


def why_not(weights: Sequence[torch.Tensor]) -> str:
    """Empty if a text can be read with memories of these ``weights``, else why not."""
    layers, width, middle = len(weights) // 2, weights[-1].shape[-1], weights[0].shape[-1]
    if layers > 2:
        return f"no Triton kernel for texts and memories of {layers} layers"
    if width > MOST_WIDE:
        return f"no Triton kernel for texts and heads wider than {MOST_WIDE}, got {width}"
    if width % 16 or middle % 16:  # their addresses would take registers that are not there
        return f"no Triton kernel for texts and widths that are no multiples of 16, got {width} and {middle}"
    if layers == 2 and common.capability() < (9, 0):
        return "no Triton kernel for texts and memories of two layers on GPUs of compute capability below 9.0"
    return ""


def memory(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rate: torch.Tensor,
    gate: torch.Tensor | None,
    momentum: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    weights: Sequence[torch.Tensor],
    start: Sequence[torch.Tensor],
    velocity: Sequence[torch.Tensor],
    position: torch.Tensor,
    begins: torch.Tensor | None,
    mini_batch: int,
    scale: float,
) -> torch.Tensor:
    """The outputs; ``weights``, ``start`` and ``velocity`` become those after the text, in place."""
    _, tokens, heads, width = q.shape
    programs = len(position) * heads
    out = torch.empty_like(v)
    if not programs * tokens:
        return out
    factors, norm = (rate, gate, momentum), (norm_weight, norm_bias)
    # A text may begin and end within a mini-batch; and one whose length is no multiple of 16 ends with a shorter chunk.
    most = (triton.cdiv(tokens, mini_batch) + 1) * triton.cdiv(min(mini_batch, tokens), TOKENS) + 1
    kept = [*weights, *velocity]
    each = sum(t[0, 0].numel() for t in kept) * programs * 4
    part = max(1, min(most, BETWEEN // each))
    before = [q.new_empty((programs * part, *t.shape[2:]), dtype=torch.float32) for t in kept]
    before += [None] * (len(weights) - len(velocity))
    rows = [q.new_empty((*q.shape[:3], size), dtype=torch.float32) for size in _row_sizes(weights)]
    state = (*weights, *start, *(velocity or [None] * len(weights)))
    sizes = {"width": width, "C": TOKENS, "BD": max(16, triton.next_power_of_2(width)), "num_stages": 1}
    for first in range(0, most, part):
        place = (begins, position, tokens, heads, mini_batch, first, part)
        to_learn = (*rows, *before, k, v, *factors, *norm, *state, *place, eps)
        to_read = (out, *rows, *before, q, k, *factors[1:], *norm, *place, scale, eps)
        if len(weights) == 2:
            learn_one[(programs,)](*to_learn, triton.cdiv(width, 16), B=16, num_warps=4, **sizes)
            read_one[part, programs](*to_read, num_warps=4, **sizes)
        else:
            sizes |= {"middle": weights[0].shape[-1], "B": 32}
            blocks = triton.cdiv(width, 32), triton.cdiv(sizes["middle"], 32)
            learn_two[(programs,)](*to_learn, *blocks, num_warps=8, **sizes)
            read_two[part, programs](*to_read, blocks[1], num_warps=4, **sizes)
    return out


def _row_sizes(weights: Sequence[torch.Tensor]) -> list[int]:
    """The sizes of what a token leaves: the gradient of one layer; or those of two, and the input of the second."""
    width = weights[0].shape[2]
    return [width] if len(weights) == 2 else [width, weights[0].shape[-1], weights[0].shape[-1]]
