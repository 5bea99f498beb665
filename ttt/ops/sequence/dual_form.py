"""Memories that learn in mini-batches, in plain torch: the dual form, token by token, and for one token.

A memory is one or more linear layers with GELU between them: z_1 = x W_1 + b_1, x_2 = gelu(z_1), ... With an inner norm
it is f(x) = x + LN(z), with none f(x) = z. It learns the loss |f(k_t) - v_t|^2 / 2. For all tokens of a mini-batch the
gradients G are taken at its first weights. With W a weight or a bias, and r_t, a_t, m_t the rate, the gate and the
momentum of a token:

    M_t = m_t M_{t-1} - r_t G_t        W_t = a_t W_{t-1} + M_t        o_t = f(scale q_t; W_t)

Without gates and momentum this is TTT-Linear or TTT-MLP (Sun et al. 2024); with them, and no inner norm, the memory of
Titans (Behrouz et al. 2024), whose gate is 1 - alpha_t.

Dual form: G_j of a layer is the outer product of its input x_j and of its output's gradient d_j. So a layer's outputs
for inputs h_i are, with X and D the rows of x and d,

    a'_i (h_i W + b) + m'_i (h_i M + c) - sum_j P_ij (h_i . x_j + 1) d_j

Here a'_i is the product of gates up to i, P_ij = sum over s from j to i of (a_{s+1} ... a_i)(m_{j+1} ... m_s) r_j, and
m'_i is the same sum from s = 1 with m_1 ... m_s; c is the momentum of the bias.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ttt.ops.sequence.states import MemoryState


class Norm(NamedTuple):
    """The inner layer norm: weight and bias, (H, D) each, and the epsilon beside the variance."""

    weight: Tensor
    bias: Tensor
    eps: float = 1e-6


NO_NORM = (None, None, 0.0)
"""Weight, bias and eps of a memory without an inner norm."""


class Factors(NamedTuple):
    """What a mini-batch's gates, momenta and rates amount to: see the formulas of this module.

    Attributes:
        seen: P, (B, H, L, L).
        kept, moved: a', m', (B, H, L), or None where they are 1 and 0.
        newest: (B, H, L), the factors of the gradients in the last momentum, or None without momentum.
        left: (B, H), the factor of the first momentum in the last one, or None.
    """

    seen: Tensor
    kept: Tensor | None
    moved: Tensor | None
    newest: Tensor | None
    left: Tensor | None


def factors_of(rate: Tensor, gate: Tensor | None, momentum: Tensor | None) -> Factors:
    """`Factors` of tensors (B, H, L)."""
    if gate is None and momentum is None:
        return Factors(rate.unsqueeze(-2).expand(*rate.shape, rate.shape[-1]).tril(), None, None, None, None)
    gates = None if gate is None else products(gate)
    kept = None if gate is None else gate.cumprod(-1)
    if momentum is None:
        return Factors(gates * rate.unsqueeze(-2), kept, None, None, None)
    momenta, moved = products(momentum), momentum.cumprod(-1)
    if gates is None:
        gates = torch.ones_like(momenta).tril()
    return Factors(
        gates @ momenta * rate.unsqueeze(-2),
        kept,
        (gates @ moved.unsqueeze(-1)).squeeze(-1),
        momenta[..., -1, :] * rate,
        moved[..., -1],
    )


def products(factor: Tensor) -> Tensor:
    """(..., L, L): at (t, s) the product of factors s + 1 ... t for s <= t, else 0; ``factor`` is (..., L)."""
    length = factor.shape[-1]
    below = torch.ones(length, length, dtype=torch.bool, device=factor.device).tril(-1)
    return torch.where(below, factor.unsqueeze(-1), 1.0).cumprod(-2).tril()


def gelu(z: Tensor) -> Tensor:
    """GELU by the tanh formula."""
    return torch.nn.functional.gelu(z, approximate="tanh")


def gelu_slope(z: Tensor) -> Tensor:
    """The derivative of `gelu`."""
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (z + 0.044715 * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z)


def standardised(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """z (B, H, L, D) less the mean of each row, divided by its deviation; and the inverse of that, (B, H, L, 1)."""
    if not z.numel():  # torch warns of the variance of no numbers
        return z, z.sum(-1, keepdim=True)
    var, mean = torch.var_mean(z, -1, correction=0, keepdim=True)
    inverse = (var + eps).rsqrt()
    return (z - mean) * inverse, inverse


def normed(z: Tensor, norm: Norm) -> Tensor:
    """LN(z) for z (B, H, L, D)."""
    return standardised(z, norm.eps)[0] * norm.weight.unsqueeze(1) + norm.bias.unsqueeze(1)


def loss_gradient(z: Tensor, k: Tensor, v: Tensor, norm: Norm | None) -> Tensor:
    """The gradient of |f - v|^2 / 2 with respect to z, (B, H, L, D)."""
    if norm is None:
        return z - v
    (plain, inverse), weight = standardised(z, norm.eps), norm.weight.unsqueeze(1)
    d = (plain * weight + norm.bias.unsqueeze(1) + k - v) * weight
    return (d - d.mean(-1, keepdim=True) - plain * (d * plain).mean(-1, keepdim=True)) * inverse


def rows_of(k: Tensor, v: Tensor, weights: tuple[Tensor, ...], norm: Norm | None) -> list[tuple[Tensor, Tensor]]:
    """The rows (x, d) of each layer, (B, H, L, I) and (B, H, L, O), at ``weights`` (W_1, b_1, W_2, b_2, ...)."""
    inputs, sums, x = [], [], k
    for w, b in zip(weights[::2], weights[1::2], strict=True):
        if sums:
            x = gelu(sums[-1])
        inputs.append(x)
        sums.append(torch.matmul(x, w) + b.unsqueeze(-2))
    d = loss_gradient(sums[-1], k, v, norm)
    found = [(inputs[-1], d)]
    for layer in range(len(sums) - 1, 0, -1):
        d = (d @ weights[2 * layer].mT) * gelu_slope(sums[layer - 1])
        found.insert(0, (inputs[layer - 1], d))
    return found


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    gate: Tensor | None,
    momentum: Tensor | None,
    state: MemoryState,
    norm: Norm | None,
    size: int,
    position: int,
) -> tuple[Tensor, MemoryState]:
    """The dual form, a mini-batch after the other.

    Args:
        q, k, v: (B, T, H, D), ``q`` scaled; rate, gate, momentum: (B, T, H). All of one dtype, float32 or float64.
        state: all of whose rows are at ``position``.
        size: tokens of a mini-batch.

    Returns:
        (B, T, H, D), and the final state.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    rate, gate, momentum = (None if t is None else t.transpose(1, 2) for t in (rate, gate, momentum))
    tokens, outs, at = q.shape[2], [], 0
    weights, start, velocity = state.weights, state.start, state.velocity
    while at < tokens:
        end = min(tokens, at + size - position)
        part = [t[:, :, at:end] for t in (q, k, v)]
        factors = factors_of(*(None if t is None else t[:, :, at:end] for t in (rate, gate, momentum)))
        out, weights, velocity = _mini_batch(*part, factors, weights, start, velocity, norm)
        outs.append(out)
        position = (position + end - at) % size
        if position == 0:
            start = weights
        at = end
    out = torch.cat(outs, 2).transpose(1, 2) if outs else torch.zeros_like(v).transpose(1, 2)
    if start is weights:  # the step changes both in place
        start = tuple(w.clone() for w in weights)
    return out, MemoryState(weights, start, velocity, torch.full_like(state.position, position))


def _mini_batch(q, k, v, factors, weights, start, velocity, norm):
    h, new, moving = q, [], []
    last = factors.seen[:, :, -1].unsqueeze(-1)
    for layer, (x, d) in enumerate(rows_of(k, v, start, norm)):
        w, b = weights[2 * layer : 2 * layer + 2]
        if layer:
            h = gelu(h)
        z = h @ w + b.unsqueeze(-2)
        if factors.kept is not None:
            z = factors.kept.unsqueeze(-1) * z
        w_new, b_new = (w, b) if factors.kept is None else (factors.kept[..., -1, None, None] * w,
                                                            factors.kept[..., -1, None] * b)  # fmt: skip
        if factors.moved is not None:
            m, c = velocity[2 * layer : 2 * layer + 2]
            z = z + factors.moved.unsqueeze(-1) * (h @ m + c.unsqueeze(-2))
            w_new = w_new + factors.moved[..., -1, None, None] * m
            b_new = b_new + factors.moved[..., -1, None] * c
            rows = factors.newest.unsqueeze(-1) * d
            left = factors.left.unsqueeze(-1)
            moving += [left.unsqueeze(-1) * m - x.mT @ rows, left * c - rows.sum(-2)]
        h = z - (factors.seen * (h @ x.mT + 1)) @ d
        rows = last * d
        new += [w_new - x.mT @ rows, b_new - rows.sum(-2)]
    out = h if norm is None else q + normed(h, norm)
    return out, tuple(new), tuple(moving)


@torch.no_grad()
def step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    gate: Tensor | None,
    momentum: Tensor | None,
    state: MemoryState,
    norm: Norm | None,
    size: int,
) -> Tensor:
    """One token, for rows at any positions; the tensors of ``state`` are changed in place.

    Arguments are those of `chunked` without T. Returns (B, H, D).
    """
    found = rows_of(k.unsqueeze(-2), v.unsqueeze(-2), state.start, norm)
    h = q.unsqueeze(-2)
    for layer, (x, d) in enumerate(found):
        if layer:
            h = gelu(h)
        rows = rate[..., None, None] * d
        for which, change in enumerate((x.mT @ rows, rows.squeeze(-2))):
            index, shape = 2 * layer + which, (..., *[None] * (2 - which))
            if momentum is not None:
                change = state.velocity[index].mul_(momentum[shape]).sub_(change)
            weight = state.weights[index]
            if gate is not None:
                weight.mul_(gate[shape])
            weight.add_(change, alpha=1 if momentum is not None else -1)
        h = h @ state.weights[2 * layer] + state.weights[2 * layer + 1].unsqueeze(-2)
    out = h if norm is None else q.unsqueeze(-2) + normed(h, norm)
    state.position.add_(1)
    full = state.position >= size
    for start, weight in zip(state.start, state.weights, strict=True):
        start.copy_(torch.where(full.view(-1, *[1] * (start.dim() - 1)), weight, start))
    state.position.masked_fill_(full, 0)
    return out.squeeze(-2)
