"""Fast weights that change at the ends of large chunks, in plain torch: LaCT and In-Place TTT.

All tokens of a chunk are read with the weights at its beginning, o_t = f(scale q_t; W). Their updates are summed up
meanwhile, and are written when the chunk is full; so a text may be read in any pieces, down to single tokens.

LaCT (Zhang et al. 2025): f(x) = (silu(x W_0) * (x W_2)) W_1, whose loss is -f(k_t).v_t. At the end of a chunk, with u
the sum of rate_t times the negative gradients, and m the mean of the chunk's momentum factors:

    M <- m M + u        W <- columns of W + NS(M), with the norms that they had at first

NS orthogonalises by 5 Newton-Schulz steps, as Muon does (Jordan et al. 2024).

In-Place TTT (2026): f(x) = x W, and the same loss: W <- W + sum of rate_t k_t v_t^T.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ttt.ops.sequence.states import LargeChunkState, map_state

Weights = tuple[Tensor, ...]


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """A matrix (..., I, O) near U V^T of the singular value decomposition U S V^T of ``g``; zeros for zeros."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        xx = x @ x.mT
        x = a * x + (b * xx + c * (xx @ xx)) @ x
    return x.mT if tall else x


def swiglu(x: Tensor, weights: Weights) -> Tensor:
    """LaCT's f: x (B, H, L, D), weights (B, H, D, F), (B, H, F, D), (B, H, D, F)."""
    return (torch.nn.functional.silu(x @ weights[0]) * (x @ weights[2])) @ weights[1]


def swiglu_updates(k: Tensor, v: Tensor, rates: Tensor, weights: Weights) -> Weights:
    """The sums of rate_t times the gradients of f(k_t).v_t by the three weights; ``rates`` is (3, B, H, L)."""
    gate_in, up = k @ weights[0], k @ weights[2]
    sigmoid = gate_in.sigmoid()
    gate = gate_in * sigmoid
    back = v @ weights[1].mT
    slope = sigmoid * (1 + gate_in * (1 - sigmoid))
    r0, r1, r2 = (r.unsqueeze(-1) for r in rates)
    return k.mT @ (r0 * back * up * slope), (gate * up).mT @ (r1 * v), k.mT @ (r2 * back * gate)


def swiglu_token(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, weights: Weights, sums: Weights) -> Tensor:
    """What `swiglu` gives for q (B, H, D); what `swiglu_updates` gives for k and v is added to ``sums``, in place.

    ``rates`` is (3, B, H). The weights are read once for q and k, and no update is made before it is added.
    """
    both = torch.stack([q, k], -2)
    gate_in, up = both @ weights[0], both @ weights[2]
    sigmoid = gate_in.sigmoid()
    gate = gate_in * sigmoid
    hidden = gate * up
    back = (weights[1] @ v.unsqueeze(-1)).squeeze(-1)
    gate_in, sigmoid, gate, up = (t[..., 1, :] for t in (gate_in, sigmoid, gate, up))
    slope = sigmoid * (1 + gate_in * (1 - sigmoid))
    r0, r1, r2 = (r.unsqueeze(-1) for r in rates)
    _add_outer_(sums[0], k, r0 * back * up * slope)
    _add_outer_(sums[1], hidden[..., 1, :], r1 * v)
    _add_outer_(sums[2], k, r2 * back * gate)
    return (hidden[..., :1, :] @ weights[1]).squeeze(-2)


def linear(x: Tensor, weights: Weights) -> Tensor:
    """In-Place TTT's f."""
    return x @ weights[0]


def linear_updates(k: Tensor, v: Tensor, rates: Tensor, weights: Weights) -> Weights:
    """The sum of rate_t k_t v_t^T; ``rates`` is (1, B, H, L)."""
    return (k.mT @ (rates[0].unsqueeze(-1) * v),)


def linear_token(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, weights: Weights, sums: Weights) -> Tensor:
    """As `swiglu_token`, for `linear` and `linear_updates`; ``rates`` is (1, B, H)."""
    _add_outer_(sums[0], k, rates[0].unsqueeze(-1) * v)
    return (q.unsqueeze(-2) @ weights[0]).squeeze(-2)


def _add_outer_(total: Tensor, x: Tensor, d: Tensor) -> None:
    total.addcmul_(x.unsqueeze(-1), d.unsqueeze(-2))


Forward = Callable[[Tensor, Weights], Tensor]
Updates = Callable[[Tensor, Tensor, Tensor, Weights], Weights]
Token = Callable[[Tensor, Tensor, Tensor, Tensor, Weights, Weights], Tensor]


def closed(state: LargeChunkState, size: int, orthogonal: bool) -> LargeChunkState:
    """``state`` after the end of a chunk of ``size`` tokens."""
    updates, velocity = state.sums, state.velocity
    momentum = state.momentum
    if momentum is not None:
        mean = (momentum / size)[..., None, None]
        velocity = tuple(mean * m + u for m, u in zip(velocity, updates, strict=True))
        updates, momentum = velocity, torch.zeros_like(momentum)
    if orthogonal:
        updates = tuple(newton_schulz(u) for u in updates)
    weights = tuple(w + u for w, u in zip(state.weights, updates, strict=True))
    if state.norms:
        weights = tuple(
            w * (n / (w.norm(dim=-2, keepdim=True) + 1e-5)) for w, n in zip(weights, state.norms, strict=True)
        )
    sums = tuple(torch.zeros_like(s) for s in state.sums)
    return LargeChunkState(weights, sums, velocity, state.norms, momentum, torch.zeros_like(state.position))


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    momentum: Tensor | None,
    state: LargeChunkState,
    forward: Forward,
    updates: Updates,
    size: int,
    orthogonal: bool,
    position: int,
) -> tuple[Tensor, LargeChunkState]:
    """A whole text, chunk by chunk.

    Args:
        q, k: (B, T, H, I), ``q`` scaled; v: (B, T, H, O); rates: (B, T, H, weights); momentum: (B, T, H) or None.
        state: all of whose rows are at ``position``.
        size: tokens of a chunk.

    Returns:
        (B, T, H, O), and the final state.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    rates = rates.permute(3, 0, 2, 1)
    tokens, outs, at = q.shape[2], [], 0
    while at < tokens:
        end = min(tokens, at + size - position)
        outs.append(forward(q[:, :, at:end], state.weights))
        new = updates(k[:, :, at:end], v[:, :, at:end], rates[..., at:end], state.weights)
        sums = tuple(s + u for s, u in zip(state.sums, new, strict=True))
        total = state.momentum if momentum is None else state.momentum + momentum[:, at:end].sum(1)
        position = (position + end - at) % size
        state = state._replace(sums=sums, momentum=total, position=torch.full_like(state.position, position))
        if position == 0:
            state = closed(state, size, orthogonal)
        at = end
    out = torch.cat(outs, 2).transpose(1, 2) if outs else torch.zeros_like(v).transpose(1, 2)
    return out, state


@torch.no_grad()
def step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    momentum: Tensor | None,
    state: LargeChunkState,
    token: Token,
    size: int,
    orthogonal: bool,
) -> Tensor:
    """One token, for rows at any positions; the tensors of ``state`` are changed in place.

    Arguments are those of `chunked` without T; ``token`` is `swiglu_token` or `linear_token`. Returns (B, H, O).
    """
    out = token(q, k, v, rates.permute(2, 0, 1), state.weights, state.sums)
    if momentum is not None:
        state.momentum.add_(momentum)
    state.position.add_(1)
    end_full_(state, size, orthogonal)
    return out


@torch.no_grad()
def end_full_(state: LargeChunkState, size: int, orthogonal: bool) -> None:
    """Ends the chunks that have ``size`` tokens: `closed`, in place, for those rows of ``state``."""
    full = (state.position >= size).nonzero().flatten()
    if len(full):
        ended = closed(map_state(lambda t: t[full], state), size, orthogonal)
        map_state(lambda t, e: t.index_copy_(0, full, e), state, ended)
