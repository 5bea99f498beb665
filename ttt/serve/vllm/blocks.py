"""The top blocks by hand: forward and backward, a block at a time, so that a lesson can pause between any two of them.

Autograd computes a whole forward or backward pass in one piece, keeps for each block what a gradient of its weights
would need, and takes half of its time for small operations. Here no gradient of a weight is computed, but for the rows
of the layers that learn (`ttt.nn.LowRankLinear`, in place of ``down_proj``), and none at the input of the lowest block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from ttt.nn import LowRankLinear
from ttt.ops.dtypes import accumulation


class Rotation(NamedTuple):
    """Cosines and sines (T, D) of the rotary embedding of T positions."""

    cos: Tensor
    sin: Tensor

    def of(self, x: Tensor) -> Tensor:
        """``x`` (..., T, D), rotated."""
        return x * self.cos + _half_turn(x) * self.sin

    def back(self, gradient: Tensor) -> Tensor:
        """The gradient at what was rotated, from that at the outcome: both (..., T, D)."""
        return gradient * self.cos - _half_turn(gradient * self.sin)


class Memory(NamedTuple):
    """The keys and values (groups, T, D) of a sequence in one block."""

    keys: Tensor
    values: Tensor

    def until(self, end: int) -> Memory:
        """Those of the first ``end`` tokens."""
        return Memory(self.keys[:, :end], self.values[:, :end])


class Norm:
    """The root mean square norm of a transformers module, which has a ``weight`` and a ``variance_epsilon``."""

    def __init__(self, module: Any) -> None:
        self.weight, self.eps = module.weight.detach(), module.variance_epsilon

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(T, d) -> (T, d), and what `backward` needs."""
        wide = x.to(accumulation(x.dtype))
        inverse = wide.square().mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        unit = wide * inverse
        return self.weight * unit.to(x.dtype), (unit, inverse)

    def backward(self, saved: tuple[Tensor, Tensor], gradient: Tensor) -> Tensor:
        """The gradient at the input, (T, d), from that at the output."""
        unit, inverse = saved
        scaled = (gradient * self.weight).to(unit.dtype)
        along = (scaled * unit).mean(-1, keepdim=True)
        return scaled.addcmul_(unit, along, value=-1).mul_(inverse).to(gradient.dtype)


@dataclasses.dataclass
class Inner:
    """What a block computes of T tokens before the layer that learns.

    Attributes:
        residual: (T, d), what the block's output adds that layer's to.
        active: (T, n), the layer's input.
        saved: what the backward pass needs; None where there is to be none.
    """

    residual: Tensor
    active: Tensor
    saved: Any = None


class Block:
    """One decoder block of Llama's architecture, of one sequence.

    Args:
        module: of transformers, whose ``mlp.down_proj`` is a `LowRankLinear`. Weights are shared with it where those of
            queries, keys and values, and those of gate and up, lie one after the other in memory, as vLLM's do;
            otherwise they are copied.
    """

    def __init__(self, module: Any) -> None:
        attention, mlp = module.self_attn, module.mlp
        self.down: LowRankLinear = mlp.down_proj
        self.norms = Norm(module.input_layernorm), Norm(module.post_attention_layernorm)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.qkv, self.qkv_bias = _joined(projections)
        self.out, self.out_bias = attention.o_proj.weight.detach(), attention.o_proj.bias
        self.gate_up, self.gate_up_bias = _joined((mlp.gate_proj, mlp.up_proj))
        self.width, self.scale = attention.head_dim, attention.scaling
        self.groups = attention.k_proj.weight.shape[0] // self.width
        self.sizes = [each.weight.shape[0] for each in projections]

    def memory(self, tokens: int) -> Memory:
        """Room for the keys and values of so many tokens."""
        return Memory(*self.qkv.new_empty((2, self.groups, tokens, self.width)).unbind())

    def inner(self, x: Tensor, begin: int, rotation: Rotation, memory: Memory, *, keep: bool) -> Inner:
        """What stands before the layer that learns, of the tokens ``x`` (T, d) that ``begin`` others stand before.

        Args:
            rotation: of the tokens.
            memory: of the sequence; the tokens' keys and values are put there.
            keep: what `backward` needs.
        """
        normed, first = self.norms[0].forward(x)
        q, k, v = linear(normed, self.qkv, self.qkv_bias).split(self.sizes, 1)
        known = self._put(memory, begin, k, v, rotation)
        queries = rotation.of(self._heads(q)).view(self.groups, -1, self.width)
        p = self._attention(queries, known.keys, begin, len(x))
        residual = x + linear(_by_token(p @ known.values, len(x)), self.out, self.out_bias)
        normed, second = self.norms[1].forward(residual)
        gate, up = linear(normed, self.gate_up, self.gate_up_bias).chunk(2, 1)
        opened = silu(gate)
        saved = (first, second, queries, p, gate, up, opened, known, rotation) if keep else None
        return Inner(residual, opened * up, saved)

    def remember(self, x: Tensor, begin: int, rotation: Rotation, memory: Memory) -> None:
        """Put the tokens' keys and values into ``memory``, as `inner` does, and compute nothing else of them."""
        normed, _ = self.norms[0].forward(x)
        queries = self.sizes[0]
        bias = None if self.qkv_bias is None else self.qkv_bias[queries:]
        k, v = linear(normed, self.qkv[queries:], bias).split(self.sizes[1:], 1)
        self._put(memory, begin, k, v, rotation)

    def outer(self, inner: Inner) -> Tensor:
        """The block's output (T, d)."""
        return inner.residual + self.down(inner.active.unsqueeze(0))[0]

    def backward(self, inner: Inner, gradient: Tensor, users: Tensor) -> Tensor:
        """The gradient at the block's input (T, d), from that at its output, of tokens of ``users`` (T,) int32."""
        first, second, queries, p, gate, up, opened, known, rotation = inner.saved
        active = self.down.transposed_product(gradient, users)
        at_gate = torch.ops.aten.silu_backward(active * up, gate)
        normed = torch.cat([at_gate, active * opened], 1) @ self.gate_up
        residual = gradient + self.norms[1].backward(second, normed)
        normed = self._attention_backward(residual @ self.out, queries, p, known, rotation) @ self.qkv
        return residual + self.norms[0].backward(first, normed)

    def _put(self, memory: Memory, begin: int, keys: Tensor, values: Tensor, rotation: Rotation) -> Memory:
        """Put ``keys`` and ``values`` (T, groups D) of tokens into ``memory``: what it has until their end."""
        end = begin + len(keys)
        memory.keys[:, begin:end] = rotation.of(self._heads(keys))
        memory.values[:, begin:end] = self._heads(values)
        return memory.until(end)

    def _attention(self, queries: Tensor, keys: Tensor, begin: int, count: int) -> Tensor:
        """The weights that each query has for each key: (groups, T queries of each head of a group, keys)."""
        wide = accumulation(queries.dtype)  # a score that is rounded to 8 bits would change its probability by percents
        scores = torch.bmm(queries.to(wide) * self.scale, keys.to(wide).transpose(1, 2))
        later = torch.ones((count, count), dtype=torch.bool, device=scores.device).triu_(1)
        scores.view(self.groups, -1, count, keys.shape[1])[..., begin:].masked_fill_(later, -torch.inf)
        return scores.softmax(-1).to(queries.dtype)

    def _attention_backward(
        self, gradient: Tensor, queries: Tensor, p: Tensor, known: Memory, rotation: Rotation
    ) -> Tensor:
        """The gradient at queries, keys and values, (T, rows of ``qkv``), from that at attention's output (T, heads D).

        What earlier tokens' keys and values get is not computed: they are of weights that have changed since.
        """
        count = len(gradient)
        own = slice(known.keys.shape[1] - count, None)
        gradient = self._heads(gradient).view(self.groups, -1, self.width)
        wide = accumulation(p.dtype)
        at_p, shares = (gradient @ known.values.transpose(1, 2)).to(wide), p.to(wide)
        at_p.sub_((at_p * shares).sum(-1, keepdim=True)).mul_(shares).mul_(self.scale)
        scores = at_p.to(p.dtype)
        at_queries = rotation.back((scores @ known.keys).view(-1, count, self.width))
        at_keys = rotation.back(scores[..., own].transpose(1, 2) @ queries)
        at_values = p[..., own].transpose(1, 2) @ gradient
        return torch.cat([_by_token(each, count) for each in (at_queries, at_keys, at_values)], 1)

    def _heads(self, x: Tensor) -> Tensor:
        """(T, heads D) -> (heads, T, D)."""
        return x.unflatten(1, (-1, self.width)).transpose(0, 1).contiguous()


def _by_token(x: Tensor, count: int) -> Tensor:
    """(heads, T, D), or (groups, heads of a group T, D), of T = ``count`` tokens, -> (T, heads D)."""
    return x.reshape(-1, count, x.shape[-1]).transpose(0, 1).flatten(1)


def _half_turn(x: Tensor) -> Tensor:
    """Of each pair of coordinates, D / 2 apart, (-second, first)."""
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _joined(modules: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    """The weights of linear ``modules`` as one, and their biases: a view where they are rows of one tensor already."""
    weights = [each.weight.detach() for each in modules]
    first, rows = weights[0], sum(len(each) for each in weights)
    place, together = first.data_ptr(), all(each.is_contiguous() for each in weights)
    for each in weights:
        together &= each.data_ptr() == place
        place += each.nbytes
    together &= first.untyped_storage().data_ptr() + first.untyped_storage().nbytes() >= place
    weight = first.as_strided((rows, first.shape[1]), first.stride()) if together else torch.cat(weights)
    biases = [each.bias for each in modules]
    return weight, None if biases[0] is None else torch.cat([each.detach() for each in biases])


class TopBlocks:
    """The blocks, the last norm and the head of a `top_blocks` model.

    Args:
        model: of transformers, of which only the weights are used.

    Raises:
        ValueError: if the blocks have another activation than "silu".
    """

    def __init__(self, model: Any) -> None:
        if model.config.hidden_act != "silu":
            raise ValueError(f"the blocks that learn must have the activation 'silu', got {model.config.hidden_act!r}")
        self.blocks = [Block(each) for each in model.model.layers.children()]
        self.norm, self.head = Norm(model.model.norm), model.lm_head.weight.detach()
        self._rotary = model.model.rotary_emb

    def rotation(self, begin: int, end: int) -> Rotation:
        """Of the positions from ``begin`` to ``end``."""
        cos, sin = self._rotary(self.head, torch.arange(begin, end, device=self.head.device).unsqueeze(0))
        return Rotation(cos[0], sin[0])
