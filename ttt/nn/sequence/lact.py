"""`LaCT`: fast weights that are updated after each large chunk, with window attention inside the chunk."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ttt.checks import check_number
from ttt.nn.sequence.base import Heads, LayerState, SequenceLayer, checked_head_width, checked_input, widened
from ttt.nn.sequence.window_attention import WindowAttention
from ttt.ops.sequence import lact, lact_step
from ttt.ops.sequence.checks import check_count


class LaCT(SequenceLayer):
    """A SwiGLU with fast weights, updated after each chunk of tokens, beside window attention (Zhang et al. 2025).

        o_t = f(q_t; W) + attention over the latest tokens,        f(x) = (silu(x W_0) * (x W_2)) W_1

    After a chunk W changes by the sum of r_t grad f(k_t).v_t, with momentum and Newton-Schulz orthogonalisation, and
    its columns keep their norms (`ttt.ops.sequence.lact`). Decoding updates the fast weights as reading does. r_t is
    base_rate softplus(w_r x_t) for each of the three weights.

    Args:
        hidden: C. heads: H. head_width: D, C / H by default. convolution: width of the short convolution.
        chunk: tokens between two updates. base_rate: see above. expansion: width of the SwiGLU, relative to D.
        window: tokens that attention sees; ``chunk`` by default.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        head_width: int | None = None,
        convolution: int = 4,
        chunk: int = 512,
        base_rate: float = 0.01,
        expansion: int = 2,
        window: int | None = None,
    ):
        super().__init__()
        check_count("chunk", chunk)
        check_count("expansion", expansion)
        check_number("base_rate", base_rate, 0.0, above=True, finite=True)
        self.hidden, self.chunk, self.base_rate = hidden, chunk, base_rate
        width = checked_head_width(hidden, heads, head_width)
        inner = expansion * width
        self.parts = Heads(hidden, heads, width, convolution)
        self.attention = WindowAttention(hidden, heads, width, chunk if window is None else window)
        self.rates_proj = nn.Linear(hidden, 3 * heads)
        nn.init.zeros_(self.rates_proj.bias)
        self.momentum_proj = nn.Linear(hidden, heads)
        nn.init.zeros_(self.momentum_proj.bias)
        shapes = [(heads, width, inner), (heads, inner, width), (heads, width, inner)]
        self.first = nn.ParameterList([torch.randn(s) / s[1] ** 0.5 for s in shapes])

    def forward(
        self, x: Tensor, state: LayerState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        """See `SequenceLayer`."""
        checked_input(x, self.hidden, state, LayerState)
        recent, (held, near) = state or LayerState(None, (None, None))
        attended, near = self.attention(x, near, cu_seqlens=cu_seqlens)
        (q, k, v), recent = self.parts.read(x, recent, cu_seqlens)
        rates = self.base_rate * nn.functional.softplus(widened(self.rates_proj(x))).unflatten(-1, (-1, 3))
        momentum = widened(self.momentum_proj(x)).sigmoid()
        tensors = {"q": q, "k": k, "v": v, "rates": rates, "momentum": momentum}
        first = {"weights": list(self.first)}
        o, held = self._run(lact, lact_step, tensors, held, cu_seqlens, first, chunk_size=self.chunk)
        return self.parts.write(o, x) + attended, LayerState(recent, (held, near))
