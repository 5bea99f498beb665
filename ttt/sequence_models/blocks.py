"""The blocks of a `TTTSequenceModel`, and which sequence layer a name stands for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ttt.nn import sequence as layers
from ttt.sequence_models.config import TTTSequenceConfig


def new_mixer(name: str, config: TTTSequenceConfig) -> layers.SequenceLayer:
    """The sequence layer that ``name`` of `TTTSequenceConfig.mixers` stands for."""
    sizes = (config.hidden_size, config.num_attention_heads)
    short, batch = {"convolution": config.convolution}, {"mini_batch": config.mini_batch}
    if name == "window":
        return layers.WindowAttention(*sizes, window=config.window)
    if name == "lact":
        return layers.LaCT(*sizes, chunk=config.chunk, window=config.window, **short)
    if name in ("delta", "gated-delta"):
        return layers.GatedDeltaNet(*sizes, gated=name == "gated-delta", protect=config.protect, **short)
    kinds: dict[str, type] = {
        "ttt-linear": layers.TTTLinear,
        "ttt-mlp": layers.TTTMLP,
        "titans": layers.TitansMemory,
    }
    return kinds[name](*sizes, **short, **batch)


class SwiGLU(nn.Module):
    """y = W_down (silu(W_gate x) * (W_up x))."""

    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then the same with the MLP."""

    def __init__(self, config: TTTSequenceConfig, number: int):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = new_mixer(config.mixers[number], config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        sizes = (config.hidden_size, config.intermediate_size)
        self.learns = number in config.in_place
        self.mlp = layers.InPlaceMLP(*sizes, chunk=config.chunk) if self.learns else SwiGLU(*sizes)

    def forward(
        self, x: Tensor, state: Any = None, cu_seqlens: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, Any]:
        """(outputs (B, T, C), the state (of the mixer, of the MLP or None), or None without ``keep_state``)."""
        mixed, inner = (None, None) if state is None else state
        out, mixed = self.mixer(self.mixer_norm(x), mixed, cu_seqlens=cu_seqlens)
        x = x + out
        if self.learns:
            out, inner = self.mlp(self.mlp_norm(x), inner, cu_seqlens=cu_seqlens)
        else:
            out = self.mlp(self.mlp_norm(x))
        return x + out, (mixed, inner) if keep_state else None


def packed(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of ``x`` (B, T, C) that ``mask`` (B, T) marks, (1, N, C), and where each sequence begins, (B + 1,)."""
    lengths = mask.sum(1)
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return x[mask].unsqueeze(0), bounds
