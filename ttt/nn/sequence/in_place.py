"""`InPlaceMLP`: a SwiGLU whose last weight goes on learning, chunk by chunk, from the tokens that follow."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ttt.checks import check_number
from ttt.nn.sequence.base import LayerState, SequenceLayer, checked_input, checked_recent, last_rows
from ttt.ops.sequence import in_place_ttt, in_place_ttt_step
from ttt.ops.sequence.checks import bounds_of, check_count
from ttt.ops.sequence.states import over_sequences


class InPlaceMLP(SequenceLayer):
    """y_t = W^T z_t with z_t = silu(W_gate x_t) * (W_up x_t), where W is a fast weight (In-Place TTT, 2026).

    After each chunk W <- W + r sum of z_{t-1} (P x_t)^T. So a token's features learn a projection P of the token that
    follows it, as in predicting the next token; they do so as soon as that one has been read, and no output depends on
    what comes later. W begins as the ``down_proj`` of a pretrained MLP. P begins as zeros, with which the layer is that
    MLP.

    Args:
        hidden: C. inner: width of z. chunk: tokens between two updates. rate: r, before training.
    """

    def __init__(self, hidden: int, inner: int, chunk: int = 512, rate: float = 1e-3):
        super().__init__()
        for name, value in (("hidden", hidden), ("inner", inner), ("chunk", chunk)):
            check_count(name, value)
        check_number("rate", rate, 0.0, above=True, finite=True)
        self.hidden, self.chunk = hidden, chunk
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        self.target_proj = nn.Linear(hidden, hidden, bias=False)
        nn.init.zeros_(self.target_proj.weight)
        self.log_rate = nn.Parameter(torch.tensor(float(rate)).log())

    @classmethod
    def from_mlp(cls, mlp: nn.Module, chunk: int = 512, rate: float = 1e-3) -> InPlaceMLP:
        """A layer with the weights of ``mlp``, such as a Llama's, which it shares.

        Args:
            mlp: with ``gate_proj``, ``up_proj`` and ``down_proj``, linear layers without biases, and SiLU.

        Raises:
            TypeError: if it has not.
        """
        for name in ("gate_proj", "up_proj", "down_proj"):
            layer = getattr(mlp, name, None)
            if not isinstance(layer, nn.Linear) or layer.bias is not None:
                raise TypeError(f"mlp must have a linear layer {name} without bias, got {type(layer).__name__}")
        down: nn.Linear = mlp.down_proj  # type: ignore[assignment]
        made = cls(down.out_features, down.in_features, chunk, rate).to(down.weight.device, down.weight.dtype)
        made.gate_proj, made.up_proj, made.down_proj = mlp.gate_proj, mlp.up_proj, down  # type: ignore[assignment]
        return made

    def forward(
        self, x: Tensor, state: LayerState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        """See `SequenceLayer`; ``recent`` of the state is (B, 1, inner), the last z."""
        checked_input(x, self.hidden, state, LayerState)
        recent, held = state or LayerState(None, None)
        z = nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
        bounds = bounds_of(cu_seqlens, x.shape[0], x.shape[1])
        recent = checked_recent(recent, z, 1, bounds)

        def shift(tensors, last):
            whole = torch.cat([last, tensors[0]], 1)
            return whole[:, :-1], last_rows(whole, 1)

        before, recent = over_sequences(shift, (z,), recent, bounds)
        rate = self.log_rate.exp().expand(x.shape[0], x.shape[1], 1)
        q, k, v = (t.unsqueeze(2) for t in (z, before, self.target_proj(x)))
        tensors = {"q": q, "k": k, "v": v, "rate": rate}
        first = {"weight": self.down_proj.weight.T.unsqueeze(0)}
        o, held = self._run(in_place_ttt, in_place_ttt_step, tensors, held, cu_seqlens, first, chunk_size=self.chunk)
        return o.squeeze(2), LayerState(recent, held)
