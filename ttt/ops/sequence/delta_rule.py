"""The gated delta rule in plain torch: token by token, in chunks, and for one token.

For each head, with S (K x V) and g = 0 for DeltaNet (Schlag et al. 2021; Yang et al. 2024):

    S_t = e^{g_t} S_{t-1} + beta_t k_t (v_t - (e^{g_t} S_{t-1})^T k_t)^T        o_t = scale S_t^T q_t

Chunks (the WY form of Yang et al. 2024, with the gate of Yang, Kautz and Hatamizadeh 2025). With G the running sum of g
in a chunk of C tokens, S its first state, and matrices of a row for each token:

    A_ij = beta_i e^{G_i - G_j} k_i.k_j for j < i, else 0
    U = (I + A)^-1 diag(beta) (V - diag(e^G) K S)            the errors, as they are written
    O = scale (diag(e^G) Q S + [e^{G_i - G_j} q_i.k_j for j <= i] U)
    S <- e^{G_C} S + (diag(e^{G_C - G}) K)^T U
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ttt.ops.dtypes import accumulation
from ttt.ops.sequence.checks import sequences
from ttt.ops.sequence.states import over_sequences, own

SPAN = 16
"""This many chunks are prepared together: long texts then need little memory beside that of autograd."""


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token; the definition of the other forms. Arguments as of `chunked`."""
    out = []
    for t in range(q.shape[1]):
        if g is not None:
            state = state * g[:, t].exp()[..., None, None]
        error = beta[:, t].unsqueeze(-1) * (v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state))
        state = state + k[:, t].unsqueeze(-1) * error.unsqueeze(-2)
        out.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return (torch.stack(out, 1) if out else torch.zeros_like(v)), state


def chunked(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float, size: int
) -> tuple[Tensor, Tensor]:
    """The same in chunks of ``size`` tokens, in matrix products.

    Args:
        q, k: (B, T, H, K); v: (B, T, H, V); beta, g: (B, T, H); all of one dtype, float32 or float64.
        state: (B, H, K, V).

    Returns:
        (B, T, H, V), and the final state.
    """
    outs = []
    for at in range(0, q.shape[1], SPAN * size):
        part = [None if t is None else t[:, at : at + SPAN * size] for t in (q, k, v, beta, g)]
        out, state = _span(*part, state, scale, size)
        outs.append(out)
    return (torch.cat(outs, 1) if outs else torch.zeros_like(v)), state


def _span(q, k, v, beta, g, state, scale, size):
    tokens = q.shape[1]
    size = min(size, tokens)
    count = -(-tokens // size)
    extra = count * size - tokens

    def split(t):  # (B, H, chunks, size, ...); rows of zeros at the end change nothing
        t = t.transpose(1, 2)
        if extra:
            t = torch.cat([t, t.new_zeros(*t.shape[:2], extra, *t.shape[3:])], 2)
        return t.reshape(*t.shape[:2], count, size, *t.shape[3:])

    q, k, v, beta = split(q) * scale, split(k), split(v), split(beta).unsqueeze(-1)
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    kt = k.transpose(-1, -2)
    if g is None:
        attention = (q @ kt).masked_fill(later, 0)
        system = ((beta * k) @ kt).tril(-1)
        inner = beta * k
        kept = None
    else:
        total = split(g).cumsum(-1)
        ratio = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()
        attention = (q @ kt) * ratio
        system = (((beta * k) @ kt) * ratio).tril(-1)
        grown = total.exp().unsqueeze(-1)
        inner, q = beta * grown * k, q * grown
        kt = kt * (total[..., -1:] - total).exp().unsqueeze(-2)
        kept = total[..., -1].exp()[..., None, None]
    both = torch.cat([beta * v, inner], -1)
    solved = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True)
    wanted, inner = solved.split([v.shape[-1], k.shape[-1]], -1)
    outs = []
    for c in range(count):
        error = wanted[:, :, c] - inner[:, :, c] @ state
        outs.append(q[:, :, c] @ state + attention[:, :, c] @ error)
        state = (state if kept is None else kept[:, :, c] * state) + kt[:, :, c] @ error
    out = torch.stack(outs, 2).flatten(2, 3).transpose(1, 2)
    return out[:, :tokens], state


def texts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    state: Tensor | None,
    bounds: list[int] | None,
    scale: float,
    size: int | None,
) -> tuple[Tensor, Tensor]:
    """The outputs in the dtype of q, and the final states, of arguments of any dtype.

    Args:
        q, k, v, beta, g, scale: as of `chunked`.
        state: (N, H, K, V), or None for zeros.
        bounds: where N packed sequences begin, and the end of the last; None if the N = B sequences are not packed.
        size: tokens of a chunk; None for the recurrence token by token.
    """
    dtype = accumulation(q.dtype)
    wide = tuple(None if t is None else t.to(dtype) for t in (q, k, v, beta, g))
    if state is None:
        rows = sequences(bounds, q.shape[0])
        state = torch.zeros(rows, q.shape[2], q.shape[3], v.shape[-1], dtype=dtype, device=q.device)

    def run(tensors: Any, state: Any) -> Any:
        given: Any = (*tensors, state, scale)
        return recurrent(*given) if size is None else chunked(*given, size)

    out, final = over_sequences(run, wide, state, bounds)
    return out.to(q.dtype), own(final) if q.shape[1] == 0 else final


@torch.no_grad()
def step_(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float) -> Tensor:
    """One token of the recurrence; ``state`` is changed in place. Arguments are those of `chunked` without T."""
    if g is not None:
        state.mul_(g.exp()[..., None, None])
    error = beta.unsqueeze(-1) * (v - (k.unsqueeze(-2) @ state).squeeze(-2))
    state.add_(k.unsqueeze(-1) * error.unsqueeze(-2))
    return scale * (q.unsqueeze(-2) @ state).squeeze(-2)
