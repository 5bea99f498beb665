"""The recurrence of `ttt.ops.sequence.dual_form` token by token, whose inner gradients autograd takes."""

from __future__ import annotations

import torch
from torch import Tensor

from ttt.ops.sequence.dual_form import Norm
from ttt.ops.sequence.states import MemoryState


def output_of(x: Tensor, weights: tuple[Tensor, ...], norm: Norm | None) -> Tensor:
    """f(x; W) for x (B, H, D) and weights W_1, b_1, ... of each sequence and head."""
    z = x
    for layer in range(len(weights) // 2):
        if layer:
            z = torch.nn.functional.gelu(z, approximate="tanh")
        z = torch.einsum("bhi,bhio->bho", z, weights[2 * layer]) + weights[2 * layer + 1]
    if norm is None:
        return z
    centred = z - z.mean(-1, keepdim=True)
    spread = torch.sqrt(centred.square().mean(-1, keepdim=True) + norm.eps)
    return x + centred / spread * norm.weight + norm.bias


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    gate: Tensor | None,
    momentum: Tensor | None,
    state: MemoryState,
    norm: Norm | None,
    size: int,
) -> tuple[Tensor, MemoryState]:
    """The outputs and the final state; arguments as of `ttt.ops.sequence.dual_form.chunked`."""
    weights, start, velocity, position = state
    out = []
    for t in range(q.shape[1]):
        with torch.enable_grad():
            at = start
            if not any(w.requires_grad for w in at):
                at = tuple(w.detach().requires_grad_() for w in at)
            loss = (output_of(k[:, t], at, norm) - v[:, t]).square().sum() / 2
            gradient = torch.autograd.grad(loss, at, create_graph=torch.is_grad_enabled())
        if not any(t.requires_grad for t in (*start, k, v)):
            gradient = tuple(g.detach() for g in gradient)

        def per(factor, like):
            return factor.view(*factor.shape, *[1] * (like.dim() - 2))

        step = tuple(-per(rate[:, t], g) * g for g in gradient)
        if momentum is not None:
            velocity = tuple(per(momentum[:, t], m) * m + s for m, s in zip(velocity, step, strict=True))
            step = velocity
        if gate is not None:
            weights = tuple(per(gate[:, t], w) * w for w in weights)
        weights = tuple(w + s for w, s in zip(weights, step, strict=True))
        out.append(output_of(q[:, t], weights, norm))
        full = (position + 1) % size == 0
        position = (position + 1) % size
        start = tuple(
            torch.where(full.view(-1, *[1] * (w.dim() - 1)), w, s) for w, s in zip(weights, start, strict=True)
        )
    return (torch.stack(out, 1) if out else torch.zeros_like(v)), MemoryState(weights, start, velocity, position)
