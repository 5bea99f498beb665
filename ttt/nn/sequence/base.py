"""What sequence layers share: the interface, short convolutions, heads, and the norm of outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ttt.ops.dtypes import accumulation
from ttt.ops.sequence.checks import bounds_of, check_count, sequences
from ttt.ops.sequence.states import over_sequences


class LayerState(NamedTuple):
    """What a sequence layer carries from token to token.

    Attributes:
        recent: (B, width - 1, C), the latest inputs of the layer's convolution; None for a layer without one.
        memory: the state of the layer's op.
    """

    recent: Tensor | None
    memory: Any


class SequenceLayer(nn.Module):
    """A layer (B, T, C) -> (B, T, C) whose outputs depend on the tokens up to each, and that carries a state.

    Subclasses have ``forward(x, state=None, *, cu_seqlens=None)``, which returns the outputs and the state after the
    last token. A text may be read in any pieces: the state that one call returns goes into the next. One token without
    gradients is a step of the op, which changes ``state`` in place. With ``cu_seqlens`` (N + 1,), x is (1, T, C): N
    packed sequences, and the state has N rows.
    """

    def _run(
        self,
        op: Callable[..., tuple[Tensor, Any]],
        step: Callable[..., Tensor],
        tensors: Mapping[str, Tensor | None],
        memory: Any,
        cu_seqlens: Tensor | None,
        first: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> tuple[Tensor, Any]:
        """The outputs of ``op``, or of its ``step`` if the call is a decoding step, and the state after them.

        Args:
            tensors: arguments (B, T, ...) of both by name; ``step`` gets them without T.
            memory: the state of the op so far, or None.
            first: arguments of ``op`` alone, by name: what a new text begins with.
            options: further arguments of both.
        """
        q = tensors["q"]
        assert q is not None
        if memory is not None and cu_seqlens is None and q.shape[1] == 1 and not torch.is_grad_enabled():
            now = {name: None if t is None else t[:, 0] for name, t in tensors.items()}
            return step(**now, state=memory, **options).unsqueeze(1), memory
        return op(
            **tensors, **(first or {}), initial_state=memory, output_final_state=True, cu_seqlens=cu_seqlens, **options
        )


def checked_input(x: Tensor, width: int, state: Any, kind: type) -> Tensor:
    """``x``, if it is (B, T, width) and ``state`` is None or a ``kind``.

    Raises:
        TypeError, ValueError: otherwise.
    """
    if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[-1] != width:
        raise ValueError(f"x must be (B, T, {width}), got {tuple(getattr(x, 'shape', ())) or type(x).__name__}")
    if state is not None and not isinstance(state, kind):
        raise TypeError(f"state must be a {kind.__name__} that this layer returned, got {type(state).__name__}")
    return x


def checked_recent(recent: Tensor | None, x: Tensor, count: int, bounds: list[int] | None) -> Tensor:
    """The ``count`` rows before ``x`` (B, T, C), (sequences, count, C) of its dtype: ``recent``, or zeros for None.

    Args:
        bounds: of packed sequences (`bounds_of`), or None.

    Raises:
        ValueError: if ``recent`` has another shape, as in a state of other sequences or of another layer.
    """
    wanted = (sequences(bounds, x.shape[0]), count, x.shape[2])
    if recent is None:
        return x.new_zeros(wanted)
    if tuple(recent.shape) != wanted:
        raise ValueError(f"state.recent must be {wanted}, with a row for each sequence, got {tuple(recent.shape)}")
    return recent.to(x.dtype)


def checked_head_width(hidden: int, heads: int, head_width: int | None) -> int:
    """``head_width``, or hidden / heads for None.

    Raises:
        TypeError, ValueError: if one of them is not a whole number of at least 1, or ``heads`` does not divide
            ``hidden`` where ``head_width`` is None.
    """
    check_count("hidden", hidden)
    check_count("heads", heads)
    if head_width is None:
        if hidden % heads:
            raise ValueError(f"heads must divide hidden = {hidden} where no head_width is given, got {heads}")
        return hidden // heads
    check_count("head_width", head_width)
    return head_width


class ShortConvolution(nn.Module):
    """y_t = silu(sum over j < width of w_j * x_{t-j}) for each channel.

    Args:
        channels: C. width: tokens that an output depends on.
    """

    def __init__(self, channels: int, width: int = 4):
        super().__init__()
        check_count("convolution", width)
        self.width = width
        self.weight = nn.Parameter(torch.randn(width, channels) * 0.1 / width)
        with torch.no_grad():
            self.weight[0] += 1.0

    def forward(self, x: Tensor, recent: Tensor | None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(y, the latest inputs) of x (B, T, C); ``recent`` (B, width - 1, C) holds those before it, None for zeros."""
        bounds = bounds_of(cu_seqlens, x.shape[0], x.shape[1])
        recent = checked_recent(recent, x, self.width - 1, bounds)
        return over_sequences(lambda tensors, state: self._one(tensors[0], state), (x,), recent, bounds)

    def _one(self, x, recent):
        whole = torch.cat([recent, x], 1)
        tokens, last = x.shape[1], self.width - 1
        y = whole[:, last:] * self.weight[0]
        for j in range(1, self.width):
            y = y + whole[:, last - j : last - j + tokens] * self.weight[j]
        return nn.functional.silu(y), last_rows(whole, last)


def last_rows(t: Tensor, count: int, dim: int = 1) -> Tensor:
    """The last ``count`` rows of ``t``, copied if there are many others, whose memory a view would keep."""
    size = t.shape[dim]
    rows = t.narrow(dim, size - count, count)
    return rows.clone() if size > 2 * count else rows


def widened(t: Tensor) -> Tensor:
    """``t`` in the dtype in which rates and norms are computed: float64 as it is, all others in float32."""
    return t.to(accumulation(t.dtype))


class Heads(nn.Module):
    """Queries, keys and values (B, T, H, D) of a convolved projection, and a projection of outputs with a gate.

    y = W_o (RMSNorm(o) * silu(W_g x)), as in Gated DeltaNet (Yang, Kautz and Hatamizadeh 2025).

    Args:
        hidden: C. heads: H. head_width: D, from `checked_head_width`. convolution: width of the short convolution.
        unit: whether queries and keys are scaled to length 1.
    """

    def __init__(self, hidden: int, heads: int, head_width: int, convolution: int, unit: bool = True):
        super().__init__()
        self.heads, self.head_width, self.unit = heads, head_width, unit
        inner = heads * head_width
        self.qkv_proj = nn.Linear(hidden, 3 * inner, bias=False)
        self.convolution = ShortConvolution(3 * inner, convolution)
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.out_norm = nn.RMSNorm(head_width, eps=1e-6)
        self.out_proj = nn.Linear(inner, hidden, bias=False)

    def read(
        self, x: Tensor, recent: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """((q, k, v), the latest inputs of the convolution)."""
        mixed, recent = self.convolution(self.qkv_proj(x), recent, cu_seqlens)
        q, k, v = mixed.view(*x.shape[:2], 3, self.heads, self.head_width).unbind(2)
        if self.unit:
            q, k = (nn.functional.normalize(widened(t), dim=-1).to(x.dtype) for t in (q, k))
        return (q, k, v), recent

    def write(self, o: Tensor, x: Tensor) -> Tensor:
        """The layer's outputs of the op's outputs ``o`` (B, T, H, D)."""
        gate = nn.functional.silu(self.gate_proj(x))
        return self.out_proj(self.out_norm(o).flatten(2) * gate)
