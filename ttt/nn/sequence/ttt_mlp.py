"""`TTTMLP`: a layer whose state is a model of two layers that is trained on the tokens it reads."""

from __future__ import annotations

import torch
from torch import Tensor

from ttt.nn.sequence.ttt_linear import TTTLinear
from ttt.ops.sequence.checks import check_count


class TTTMLP(TTTLinear):
    """`TTTLinear` with a model of two layers: f(x) = x + LN(gelu(x W_1 + b_1) W_2 + b_2) (Sun et al. 2024).

    Args:
        expansion: width of the middle of the model, relative to D. Other arguments as of `TTTLinear`.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        head_width: int | None = None,
        convolution: int = 4,
        mini_batch: int = 16,
        base_rate: float = 0.01,
        expansion: int = 4,
    ):
        check_count("expansion", expansion)
        self.expansion = expansion
        super().__init__(hidden, heads, head_width, convolution, mini_batch, base_rate)

    def _first_weights(self, heads: int, width: int) -> list[Tensor]:
        inner = self.expansion * width
        # As in `TTTLinear`, both layers' sums have deviations of about 1.
        return [
            torch.randn(heads, width, inner),
            torch.zeros(heads, inner),
            torch.randn(heads, inner, width) / inner**0.5,
            torch.zeros(heads, width),
        ]
