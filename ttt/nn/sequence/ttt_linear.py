"""`TTTLinear`: a layer whose state is a linear model that is trained on the tokens it reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ttt.checks import check_number
from ttt.nn.sequence.base import Heads, LayerState, SequenceLayer, checked_head_width, checked_input, widened
from ttt.ops.sequence import Norm, memory, memory_step
from ttt.ops.sequence.checks import check_count


class TTTLinear(SequenceLayer):
    """A layer whose state is a linear model, trained in mini-batches of b tokens (Sun et al. 2024).

        f(x) = x + LN(x W + b)        W_t = W_{t-1} - r_t grad |f(k_t) - v_t|^2 / 2        o_t = f(q_t; W_t)

    Gradients are taken at the first weights of each mini-batch. q and k have length 1; r_t = base_rate
    sigmoid(w_r x_t); the first weights of a text and the norm are parameters.

    Args:
        hidden: C. heads: H. head_width: D, C / H by default. convolution: width of the short convolution.
        mini_batch: b. base_rate: the highest rate of a token.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        head_width: int | None = None,
        convolution: int = 4,
        mini_batch: int = 16,
        base_rate: float = 0.2,
    ):
        super().__init__()
        check_count("mini_batch", mini_batch)
        check_number("base_rate", base_rate, 0.0, above=True, finite=True)
        self.hidden, self.mini_batch, self.base_rate = hidden, mini_batch, base_rate
        width = checked_head_width(hidden, heads, head_width)
        self.parts = Heads(hidden, heads, width, convolution)
        self.rate_proj = nn.Linear(hidden, heads)
        nn.init.zeros_(self.rate_proj.bias)
        self.norm_weight = nn.Parameter(torch.ones(heads, width))
        self.norm_bias = nn.Parameter(torch.zeros(heads, width))
        self.first = nn.ParameterList(self._first_weights(heads, width))

    def _first_weights(self, heads: int, width: int) -> list[Tensor]:
        # Keys have length 1, so z has a deviation of about 1. The inner norm divides gradients by it: with small first
        # weights the first tokens would make them large, and later ones could change little.
        return [torch.randn(heads, width, width), torch.zeros(heads, width)]

    def forward(
        self, x: Tensor, state: LayerState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        """See `SequenceLayer`."""
        checked_input(x, self.hidden, state, LayerState)
        recent, held = state or LayerState(None, None)
        (q, k, v), recent = self.parts.read(x, recent, cu_seqlens)
        rate = self.base_rate * widened(self.rate_proj(x)).sigmoid()
        norm = Norm(self.norm_weight, self.norm_bias)
        o, held = self._run(
            memory, memory_step, {"q": q, "k": k, "v": v, "rate": rate}, held, cu_seqlens,
            {"weights": list(self.first)}, norm=norm, mini_batch=self.mini_batch,
        )  # fmt: skip
        return self.parts.write(o, x), LayerState(recent, held)
