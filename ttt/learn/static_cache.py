"""A key-value cache for CUDA graphs: of a fixed size, at fixed addresses, with its position on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def static_cache(model: Any, position: Tensor, offsets: Tensor, capacity: int) -> Any:
    """A transformers cache of ``capacity`` tokens at fixed addresses.

    Keys and values of all blocks are in one tensor, so that one operation clears them. Autograd sees an alias of it:
    gradients reach the keys and values of the present chunk, and never cross chunks.

    Args:
        model: a transformers causal language model.
        position: (1,) int64, where the next chunk is written; read on the device at every forward pass.
        offsets: (T,) int64, the places of a chunk's tokens from there on.
        capacity: number of tokens.

    Raises:
        ValueError: if a block of the model has no full attention, or one computed by other code than "sdpa" or "eager".
    """
    from transformers.cache_utils import Cache, CacheLayerMixin

    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(f"model must have full attention in every block, got {sorted(kinds)}")
    attention = getattr(config, "_attn_implementation", "sdpa")
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"model must compute attention by 'sdpa' or 'eager', got {attention!r}")

    class Layer(CacheLayerMixin):
        is_compileable, is_sliding = True, False

        def lazy_initialization(self, key_states, value_states=None):
            self.is_initialized = True

        def update(self, key_states, value_states, *args, **kwargs):
            held, positions = cache.storage(key_states, value_states)[cache.number[self]], position + offsets
            keys = held[0].detach().index_copy_(2, positions, key_states)
            return keys, held[1].detach().index_copy_(2, positions, value_states)

        def get_seq_length(self, *args):
            return position[0]

        def get_mask_sizes(self, *args):
            return capacity, 0

        def get_max_cache_shape(self):
            return capacity

        get_max_length = get_max_cache_shape

    class Static(Cache):
        def __init__(self) -> None:
            super().__init__(layers=[Layer() for _ in range(config.num_hidden_layers)])
            self.number = {layer: i for i, layer in enumerate(self.layers)}
            self.held: Any = None

        def storage(self, keys: Tensor, values: Tensor) -> Tensor:
            """(blocks, 2, B, heads, capacity, features)."""
            if keys.shape != values.shape:
                raise ValueError(
                    f"model must have keys and values of one shape, got {tuple(keys.shape)} and {tuple(values.shape)}"
                )
            if self.held is None:
                shape = (len(self.layers), 2, *keys.shape[:2], capacity, keys.shape[-1])
                self.held = torch.zeros(shape, dtype=keys.dtype, device=keys.device)
            return self.held

        def clear_unless(self, finite: Tensor, positions: Tensor) -> None:
            """Zero ``positions`` (T,) of the cache unless ``finite``: a masked NaN times its weight of 0 is a NaN."""
            if self.held is not None:
                rows = self.held.index_select(4, positions)
                self.held.index_copy_(4, positions, torch.where(finite, rows, 0.0))

    cache = Static()
    return cache
