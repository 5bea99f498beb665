"""The recurrences of `ttt.ops.sequence.large_chunk` token by token, whose gradients autograd takes."""

from __future__ import annotations

import torch
from torch import Tensor

from ttt.ops.sequence.large_chunk import Forward, closed
from ttt.ops.sequence.states import LargeChunkState, map_state


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    momentum: Tensor | None,
    state: LargeChunkState,
    forward: Forward,
    size: int,
    orthogonal: bool,
) -> tuple[Tensor, LargeChunkState]:
    """The outputs and the final state; arguments as of `ttt.ops.sequence.large_chunk.chunked`."""
    out = []
    for t in range(q.shape[1]):
        out.append(forward(q[:, t].unsqueeze(2), state.weights).squeeze(2))
        with torch.enable_grad():
            weights = state.weights
            if not any(w.requires_grad for w in weights):
                weights = tuple(w.detach().requires_grad_() for w in weights)
            gain = (forward(k[:, t].unsqueeze(2), weights).squeeze(2) * v[:, t]).sum()
            gradient = torch.autograd.grad(gain, weights, create_graph=torch.is_grad_enabled())
        if not any(x.requires_grad for x in (*state.weights, k, v)):
            gradient = tuple(g.detach() for g in gradient)
        sums = tuple(
            s + rates[:, t, :, i, None, None] * g for i, (s, g) in enumerate(zip(state.sums, gradient, strict=True))
        )
        total = state.momentum if momentum is None else state.momentum + momentum[:, t]
        state = state._replace(sums=sums, momentum=total, position=state.position + 1)
        full = state.position >= size

        def chosen(after, before, full=full):
            return torch.where(full.view(-1, *[1] * (after.dim() - 1)), after, before)

        if bool(full.any()):
            state = map_state(chosen, closed(state, size, orthogonal), state)
    return (torch.stack(out, 1) if out else torch.zeros_like(v)), state
