"""`TitansMemory`: a layer whose state is a model that is trained with momentum and forgets."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from ttt.checks import check_number
from ttt.nn.sequence.base import Heads, LayerState, SequenceLayer, checked_head_width, checked_input, widened
from ttt.ops.sequence import memory, memory_step
from ttt.ops.sequence.checks import check_count


class TitansMemory(SequenceLayer):
    """Titans' long-term memory as a layer (Behrouz et al. 2024).

        S_t = m_t S_{t-1} - r_t grad |f(k_t) - v_t|^2 / 2      M_t = (1 - a_t) M_{t-1} + S_t      o_t = f(q_t; M_t)

    f has ``depth`` linear layers with GELU between them; gradients are taken at the first weights of each mini-batch.
    r, m and a are sigmoids of projections of x_t, times ``base_rate``, 0.9 and ``most_forgotten``; q and k have length
    1.

    Args:
        hidden: C. heads: H. head_width: D, C / H by default. convolution: width of the short convolution.
        mini_batch: tokens whose gradients are taken at the same weights. base_rate: the highest rate of a token.
        most_forgotten: the highest a_t. depth: layers of the memory. expansion: width between them, relative to D.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        head_width: int | None = None,
        convolution: int = 4,
        mini_batch: int = 16,
        base_rate: float = 0.1,
        most_forgotten: float = 0.1,
        depth: int = 1,
        expansion: int = 2,
    ):
        super().__init__()
        for name, value in (("mini_batch", mini_batch), ("depth", depth), ("expansion", expansion)):
            check_count(name, value)
        check_number("base_rate", base_rate, 0.0, above=True, finite=True)
        check_number("most_forgotten", most_forgotten, 0.0, 1.0)
        self.hidden, self.mini_batch = hidden, mini_batch
        self.base_rate, self.most_forgotten = base_rate, most_forgotten
        width = checked_head_width(hidden, heads, head_width)
        self.parts = Heads(hidden, heads, width, convolution)
        self.rates_proj = nn.Linear(hidden, 3 * heads)
        nn.init.zeros_(self.rates_proj.bias)
        sizes = [width, *[expansion * width] * (depth - 1), width]
        first: list[Tensor] = []
        for given, wide in itertools.pairwise(sizes):
            first += [torch.randn(heads, given, wide) * 0.02, torch.zeros(heads, wide)]
        self.first = nn.ParameterList(first)

    def forward(
        self, x: Tensor, state: LayerState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        """See `SequenceLayer`."""
        checked_input(x, self.hidden, state, LayerState)
        recent, held = state or LayerState(None, None)
        (q, k, v), recent = self.parts.read(x, recent, cu_seqlens)
        rate, momentum, forget = widened(self.rates_proj(x)).sigmoid().chunk(3, -1)
        rate, momentum, gate = self.base_rate * rate, 0.9 * momentum, 1 - self.most_forgotten * forget
        tensors = {"q": q, "k": k, "v": v, "rate": rate, "gate": gate, "momentum": momentum}
        first = {"weights": list(self.first)}
        o, held = self._run(memory, memory_step, tensors, held, cu_seqlens, first, mini_batch=self.mini_batch)
        return self.parts.write(o, x), LayerState(recent, held)
