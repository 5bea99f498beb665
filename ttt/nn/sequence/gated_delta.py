"""`GatedDeltaNet`, and DeltaNet as the case without gates."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ttt.nn.sequence.base import Heads, LayerState, SequenceLayer, checked_head_width, checked_input, widened
from ttt.nn.sequence.protected_state import ProtectedState
from ttt.ops.sequence import gated_delta_rule, gated_delta_rule_step
from ttt.ops.sequence.checks import check_count


class GatedDeltaNet(SequenceLayer):
    """A layer whose state S is corrected towards v_t at k_t, and decays (Yang, Kautz and Hatamizadeh 2025).

        S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T        o_t = S_t^T q_t / sqrt(D)

    q and k have length 1; beta_t = sigmoid(w_b x_t); a_t = exp(-exp(A) softplus(w_a x_t + c)), or 1 without ``gated``,
    which is DeltaNet (Yang et al. 2024).

    Args:
        hidden: C. heads: H. head_width: D, C / H by default. convolution: width of the short convolution.
        gated: whether the state decays.
        protect: r, directions of each head that `calibrate` protects, see `ProtectedState`; 0 for no protection.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        head_width: int | None = None,
        convolution: int = 4,
        gated: bool = True,
        protect: int = 0,
    ):
        super().__init__()
        self.hidden, self.gated = hidden, gated
        width = checked_head_width(hidden, heads, head_width)
        check_count("protect", protect, 0)
        if protect > width:
            raise ValueError(f"protect must be at most the width of a head, {width}, got {protect}")
        self.parts = Heads(hidden, heads, width, convolution)
        self.protected = ProtectedState(heads, width, protect) if protect else None
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
        recent, memory = state or LayerState(None, None)
        tensors, recent = self._tensors(x, recent, cu_seqlens)
        if self.protected is not None:
            tensors["k"], tensors["v"] = self.protected.writes(tensors["k"], tensors["v"])
        o, memory = self._run(gated_delta_rule, gated_delta_rule_step, tensors, memory, cu_seqlens)
        if self.protected is not None:
            o = o + self.protected.reads(tensors["q"])
        return self.parts.write(o, x), LayerState(recent, memory)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Protect what the layer's inputs x (1, T, C) write into a new state, and the directions that they read most.

        It replaces what was protected. States that the layer has returned before are of no use afterwards.

        Raises:
            ValueError: for another shape, no tokens, numbers that are not finite in x or in what the layer computes, or
                a layer without ``protect``. Nothing has changed then.
        """
        checked_input(x, self.hidden, None, LayerState)
        if self.protected is None:
            raise ValueError("calibrate needs a layer that was made with protect > 0, got protect=0")
        if x.shape[0] != 1 or x.shape[1] == 0 or not bool(x.isfinite().all()):
            raise ValueError(f"x must be finite inputs (1, at least 1, {self.hidden}), got {tuple(x.shape)}")
        tensors, _ = self._tensors(x, None, None)
        _, state = gated_delta_rule(**tensors, output_final_state=True)
        assert state is not None
        self.protected.set(state, tensors["q"])

    def _tensors(self, x, recent, cu_seqlens):
        (q, k, v), recent = self.parts.read(x, recent, cu_seqlens)
        beta = widened(self.beta_proj(x)).sigmoid()
        g = None
        if self.gated:
            g = -widened(self.log_decay).exp() * nn.functional.softplus(widened(self.decay_proj(x)))
        return {"q": q, "k": k, "v": v, "beta": beta, "g": g}, recent
