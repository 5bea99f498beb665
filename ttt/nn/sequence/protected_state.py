"""`ProtectedState`: what a text wrote into a delta rule's state decays no more, and later texts write around it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ttt.nn.kronecker import second_moment, soft_directions
from ttt.ops.dtypes import accumulation

POWER, DAMPING = 1.0, 1e-3
"""Of the soft projection (`ttt.nn.kronecker`)."""


class ProtectedState(nn.Module):
    """An anchor S* of a delta rule's state for each head, and the directions U of keys that matter to it.

    The state becomes S* + R, where S* stays as it is and R is what the layer carries:

        R_t = a_t R_{t-1} + beta_t k'_t (v'_t - a_t R_{t-1}^T k'_t)^T        o_t = scale (S* + R_t)^T q_t
        k' = k - U^T U k        v' = v - S*^T k

    So a gate lets the state decay towards S* instead of towards 0, and what is written leaves the directions of U
    alone: those in which the queries of a calibration text point most, which read S* there. Before calibration S* and U
    are zero, which changes nothing.

    Args:
        heads: H. width: D. count: directions r of each head.

    Attributes:
        anchor: (H, D, D), S*. directions: (H, r, D), U.
    """

    anchor: Tensor
    directions: Tensor

    def __init__(self, heads: int, width: int, count: int):
        super().__init__()
        self.register_buffer("anchor", torch.zeros(heads, width, width))
        self.register_buffer("directions", torch.zeros(heads, count, width))

    def writes(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(k', v') of k and v (B, T, H, D), in their dtype."""
        wide, anchor, directions = self._wide(k)
        along = torch.einsum("bthd,hrd->bthr", wide, directions)
        written = wide - torch.einsum("bthr,hrd->bthd", along, directions)
        wanted = v.to(wide.dtype) - torch.einsum("bthd,hde->bthe", wide, anchor)
        return written.to(k.dtype), wanted.to(v.dtype)

    def reads(self, q: Tensor) -> Tensor:
        """What the anchor adds to the outputs for q (B, T, H, D), with the scale D^-1/2."""
        wide, anchor, _ = self._wide(q)
        return (torch.einsum("bthd,hde->bthe", wide, anchor) * q.shape[-1] ** -0.5).to(q.dtype)

    @torch.no_grad()
    def set(self, state: Tensor, q: Tensor) -> None:
        """Take ``state`` (1, H, D, D) as the anchor, and the directions of the queries q (1, T, H, D) of its text.

        Raises:
            ValueError: if a number is not finite; nothing has changed then.
        """
        if not bool(state.isfinite().all() & q.isfinite().all()):
            raise ValueError("the text cannot be protected: what the layer computes of it is not finite")
        count, found = self.directions.shape[1], []
        for rows in q[0].double().unbind(1):
            values, vectors = torch.linalg.eigh(rows.T @ rows)
            factor = (vectors * values.clamp_min(0).sqrt()).T.flip(0)
            moment = second_moment(factor, factor.new_tensor([len(rows), 0.0]))
            found.append(soft_directions(moment, count, POWER, DAMPING))
        self.directions.copy_(torch.stack(found))
        self.anchor.copy_(state[0])

    @torch.no_grad()
    def clear(self) -> None:
        """Protect nothing, as before calibration."""
        self.anchor.zero_()
        self.directions.zero_()

    def _wide(self, t):
        dtype = accumulation(t.dtype)
        return t.to(dtype), self.anchor.to(dtype), self.directions.to(dtype)
