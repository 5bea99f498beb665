"""`WindowAttention`: attention to the latest tokens, whose keys and values are its state."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ttt.nn.sequence.base import SequenceLayer, checked_head_width, checked_input, last_rows
from ttt.ops.dtypes import accumulation
from ttt.ops.sequence.checks import bounds_of, check_count, sequences
from ttt.ops.sequence.states import over_sequences


class WindowState(NamedTuple):
    """The keys and values (B, H, W - 1, D) of the latest tokens, with rotated keys, and how many tokens were read.

    Attributes:
        keys, values: the latest last; what is before the first token is zero.
        position: (B,) int64.
    """

    keys: Tensor
    values: Tensor
    position: Tensor


class WindowAttention(SequenceLayer):
    """o_t = sum over the latest W tokens s of softmax(q_t.k_s / sqrt(D)) v_s, with rotary positions (Su et al. 2021).

    Time and state do not grow with the text. For W at least the text's length it is causal attention.

    Args:
        hidden: C. heads: H. head_width: D, an even number, C / H by default. window: W. theta: base of the rotations.
    """

    def __init__(
        self, hidden: int, heads: int, head_width: int | None = None, window: int = 256, theta: float = 10000.0
    ):
        super().__init__()
        width = checked_head_width(hidden, heads, head_width)
        if width % 2:
            raise ValueError(f"head_width must be even, got {width}")
        check_count("window", window)
        self.hidden, self.heads, self.width, self.window, self.theta = hidden, heads, width, window, theta
        self.qkv_proj = nn.Linear(hidden, 3 * heads * width, bias=False)
        self.out_proj = nn.Linear(heads * width, hidden, bias=False)

    def forward(
        self, x: Tensor, state: WindowState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, WindowState]:
        """See `SequenceLayer`; the state is never changed in place."""
        checked_input(x, self.hidden, state, WindowState)
        bounds = bounds_of(cu_seqlens, x.shape[0], x.shape[1])
        q, k, v = self.qkv_proj(x).view(*x.shape[:2], 3, self.heads, self.width).unbind(2)
        rows = sequences(bounds, x.shape[0])
        shape = (rows, self.heads, self.window - 1, self.width)
        if state is None:
            empty = q.new_zeros(shape)
            state = WindowState(empty, empty, torch.zeros(rows, dtype=torch.int64, device=x.device))
        for name, wanted in (("keys", shape), ("values", shape), ("position", (rows,))):
            if (found := tuple(getattr(state, name).shape)) != wanted:
                raise ValueError(f"state.{name} must be {wanted}, with a row for each sequence, got {found}")
        o, state = over_sequences(self._one, (q, k, v), state, bounds)
        return self.out_proj(o.flatten(2)), state

    def _one(self, tensors: Any, state: WindowState) -> tuple[Tensor, WindowState]:
        q, k, v = tensors
        tokens, before = q.shape[1], self.window - 1
        if tokens == 0:
            return torch.zeros_like(v), state
        at = state.position.unsqueeze(1) + torch.arange(tokens, device=q.device)
        q, k = (rotated(t.transpose(1, 2), at, self.theta) for t in (q, k))
        keys = torch.cat([state.keys.to(k.dtype), k], 2)
        values = torch.cat([state.values.to(v.dtype), v.transpose(1, 2)], 2)
        outs = []
        # A block of queries meets the keys of its own tokens and of the W - 1 before them.
        for begin in range(0, tokens, self.window):
            end = min(tokens, begin + self.window)
            query = torch.arange(begin, end, device=q.device).unsqueeze(1) + before
            key = torch.arange(begin, end + before, device=q.device)
            seen = (key <= query) & (key > query - self.window)
            written = key - before + state.position[:, None, None] >= 0
            outs.append(
                nn.functional.scaled_dot_product_attention(
                    q[:, :, begin:end],
                    keys[:, :, begin : end + before],
                    values[:, :, begin : end + before],
                    attn_mask=(seen & written).unsqueeze(1),
                )
            )
        new = WindowState(last_rows(keys, before, 2), last_rows(values, before, 2), state.position + tokens)
        return torch.cat(outs, 2).transpose(1, 2), new


def rotated(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """``x`` (B, H, T, D), its pairs (j, j + D / 2) turned by ``position`` (B, T) times theta^(-2 j / D)."""
    half = x.shape[-1] // 2
    speed = theta ** (-torch.arange(half, device=x.device, dtype=accumulation(x.dtype)) / half)
    angle = position[:, None, :, None].to(speed.dtype) * speed
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
