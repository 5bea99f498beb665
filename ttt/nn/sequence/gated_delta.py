"""`GatedDeltaNet`, and DeltaNet as the case without gates."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ttt.nn.sequence.base import Heads, LayerState, SequenceLayer, checked_input
from ttt.ops.sequence import gated_delta_rule, gated_delta_rule_step


class GatedDeltaNet(SequenceLayer):
    """A layer whose state S is corrected towards v_t at k_t, and decays (Yang, Kautz and Hatamizadeh 2025).

        S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T        o_t = S_t^T q_t / sqrt(D)

    q and k have length 1; beta_t = sigmoid(w_b x_t); a_t = exp(-exp(A) softplus(w_a x_t + c)), or 1 without ``gated``,
    which is DeltaNet (Yang et al. 2024).

    Args:
        hidden: C. heads: H. head_width: D, C / H by default. convolution: width of the short convolution.
        gated: whether the state decays.
    """

    def __init__(
        self, hidden: int, heads: int, head_width: int | None = None, convolution: int = 4, gated: bool = True
    ):
        super().__init__()
        self.hidden, self.gated = hidden, gated
        self.parts = Heads(hidden, heads, head_width or hidden // heads, convolution)
        self.beta_proj = nn.Linear(hidden, heads, bias=False)
        if gated:
            self.decay_proj = nn.Linear(hidden, heads, bias=True)
            self.log_decay = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
            # Time constants between 1 / 0.1 and 1 / 0.001 tokens and unit of decay, evenly in the logarithm.
            rate = torch.empty(heads).uniform_(math.log(0.001), math.log(0.1)).exp()
            with torch.no_grad():
                self.decay_proj.bias.copy_(rate + torch.log(-torch.expm1(-rate)))

    def forward(
        self, x: Tensor, state: LayerState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        """See `SequenceLayer`."""
        checked_input(x, self.hidden, state, LayerState)
        recent: Any = None
        memory: Any = None
        if state is not None:
            recent, memory = state
        (q, k, v), recent = self.parts.read(x, recent, cu_seqlens)
        beta = self.beta_proj(x).float().sigmoid()
        g = -self.log_decay.float().exp() * nn.functional.softplus(self.decay_proj(x).float()) if self.gated else None
        if self._one_token(x, state, cu_seqlens):
            o = gated_delta_rule_step(
                q[:, 0], k[:, 0], v[:, 0], beta[:, 0], None if g is None else g[:, 0], state=memory
            ).unsqueeze(1)
        else:
            o, memory = gated_delta_rule(
                q, k, v, beta, g, initial_state=memory, output_final_state=True, cu_seqlens=cu_seqlens
            )
        return self.parts.write(o, x), LayerState(recent, memory)
