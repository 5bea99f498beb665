"""A key-value cache with a row for each sequence, for batches whose sequences come and go.

Row i holds the keys and values of one sequence from position 0 on, whatever the lengths of the others are. Sequences
that are decoded stand in the first rows, so that a batch is a slice and nothing is copied: the sequence that leaves is
replaced by the last one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ttt.learn.huggingface import cached
from ttt.per_user.pool import Pool

_FIRST = 256  # tokens that the rows hold at first; doubled when one needs more

FULL, SLIDING = "full_attention", "sliding_attention"


class RowCache:
    """Keys and values of up to ``rows`` sequences.

    Memory grows with the longest sequence: two numbers for each row, position, block and feature of the key heads.
    Tokens that follow a row's last one change nothing of the row: no token looks ahead, and its next tokens are written
    over them. So rows of different lengths can be read together, padded on the right.

    Args:
        model: a transformers causal language model, adapted for users, all of whose blocks have full or sliding
            attention.
        pool: its users.
        rows: number of sequences.
        capacity: largest number of tokens of a sequence.

    Raises:
        ValueError: if a block has something else, or its attention is computed by other code than "sdpa" or "eager".
    """

    pads = True
    """Whether tokens after the last one of a row leave the row as it is."""

    def __init__(self, model: Any, pool: Pool, rows: int, capacity: int) -> None:
        from transformers.cache_utils import Cache, CacheLayerMixin

        config = model.config.get_text_config(decoder=True)
        kinds = getattr(config, "layer_types", None) or [FULL] * config.num_hidden_layers
        if not set(kinds) <= {FULL, SLIDING}:
            raise ValueError(f"model must have full or sliding attention in every block, got {sorted(set(kinds))}")
        if (attention := getattr(config, "_attn_implementation", "sdpa")) not in ("sdpa", "eager"):
            raise ValueError(f"model must compute attention by 'sdpa' or 'eager', got {attention!r}")
        window = getattr(config, "sliding_window", None)
        if window and not getattr(config, "layer_types", None) and getattr(config, "use_sliding_window", True):
            kinds = [SLIDING] * config.num_hidden_layers  # as Mistral's first releases
        self.model, self.pool, self.rows, self.capacity = model, pool, rows, capacity
        self.kinds, self.window = set(kinds), window
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self._first, self._positions = 0, torch.zeros(0, dtype=torch.int64)  # of the present call

        rows_cache = self

        class Layer(CacheLayerMixin):
            is_sliding = False

            def __init__(self) -> None:
                super().__init__()
                self.held: list[Tensor] = []

            def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
                self.is_initialized = True

            def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
                return rows_cache._update(self, key_states, value_states)

            def get_seq_length(self, *args: Any) -> int:
                return int(rows_cache._positions.min()) if len(rows_cache._positions) else 0

            def get_mask_sizes(self, *args: Any) -> tuple[int, int]:
                return rows_cache._width, 0

            def get_max_cache_shape(self) -> int:
                return capacity

            get_max_length = get_max_cache_shape

        self.layers = [Layer() for _ in range(config.num_hidden_layers)]
        self.cache = Cache(layers=list(self.layers))
        self._width = 0

    # -- one forward pass -------------------------------------------------------------------------------------------

    def begin(self, row: int, user: str | None) -> None:
        """A new sequence begins in ``row``, which is empty: there is nothing to do."""

    def run(self, users: list[str | None], ids: Tensor, first: int, positions: Tensor, **options: Any) -> Tensor:
        """The logits of the next tokens of the rows from ``first`` on, with the weights of their ``users``.

        Args:
            ids, first, positions: see `inputs`.
            options: further arguments of the model.
        """
        with self.pool.using(users):
            return self.model(**self.inputs(ids, first, positions), **options).logits

    def inputs(self, ids: Tensor, first: int, positions: Tensor) -> dict[str, Any]:
        """The model's arguments for a forward pass; its result must be used before the next call.

        Args:
            ids: (B, T) int64, the next tokens of rows ``first`` to ``first + B``.
            positions: (B,) int64 on the CPU, how many tokens each of these rows holds.
        """
        length = ids.shape[1]
        self._first, self._positions = first, positions
        self._width = int(positions.max()) + length
        self._at = positions.unsqueeze(1) + torch.arange(length)  # (B, T)
        at = self._at.to(self.device)
        masks = {kind: self._mask(at, self.window if kind == SLIDING else None) for kind in self.kinds}
        return {
            "input_ids": ids, "position_ids": at, "attention_mask": masks if len(masks) > 1 else masks.popitem()[1],
        } | cached(self.model, self.cache)  # fmt: skip

    def _mask(self, at: Tensor, window: int | None) -> Tensor:
        """(B, 1, T, width), added to the attention's scores: 0 where a token at ``at`` (B, T) may look."""
        keys = torch.arange(self._width, device=at.device)
        allowed = keys <= at.unsqueeze(-1)
        if window is not None:
            allowed &= keys > at.unsqueeze(-1) - window
        blocked = torch.finfo(self.dtype).min
        return torch.zeros(allowed.shape, dtype=self.dtype, device=at.device).masked_fill_(~allowed, blocked)[:, None]

    def _update(self, layer: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``keys`` and ``values`` (B, heads, T, features) of the present call; all of these rows so far."""
        if not layer.held or layer.held[0].shape[2] < self._width:
            layer.held = [
                self._grown(old, new) for old, new in zip(layer.held or [None, None], (keys, values), strict=True)
            ]
        batch, _, length, _ = keys.shape
        rows = slice(self._first, self._first + batch)
        for held, new in zip(layer.held, (keys, values), strict=True):
            if batch == 1:
                start = int(self._positions[0])
                held[rows, :, start : start + length] = new
            else:
                index = torch.arange(self._first, self._first + batch).unsqueeze(1).to(held.device)
                held[index, :, self._at.to(held.device)] = new.transpose(1, 2)
        return layer.held[0][rows, :, : self._width], layer.held[1][rows, :, : self._width]

    def _grown(self, old: Tensor | None, like: Tensor) -> Tensor:
        size = _FIRST if old is None else old.shape[2]
        while size < self._width:
            size *= 2
        size = min(size, max(self.capacity, self._width))
        new = torch.zeros((self.rows, like.shape[1], size, like.shape[3]), dtype=like.dtype, device=like.device)
        if old is not None:
            new[:, :, : old.shape[2]] = old
        return new

    # -- rows -------------------------------------------------------------------------------------------------------

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of row ``source`` to row ``target``, and zero the rest of ``target``.

        Values of an earlier sequence that are not finite would reach the one that is copied, masked or not.
        """
        for layer in self.layers:
            for held in layer.held:
                held[target, :, :length] = held[source, :, :length]
                held[target, :, length:].zero_()

    def bytes(self, length: int) -> int:
        """How many bytes `taken` has for so many tokens; 0 before anything was read."""
        return sum(held[0, :, :length].nbytes for layer in self.layers for held in layer.held)

    def taken(self, row: int, length: int) -> list[Tensor]:
        """A copy of the keys and values of the first ``length`` tokens of a row."""
        return [held[row, :, :length].clone() for layer in self.layers for held in layer.held]

    def put(self, row: int, taken: list[Tensor], length: int) -> None:
        """Write the first ``length`` tokens of what was `taken` into a row."""
        for held, kept in zip((held for layer in self.layers for held in layer.held), taken, strict=True):
            held[row, :, :length] = kept[:, :length]

    def clear(self, row: int) -> None:
        """Zero a row: values that are not finite would reach its next sequence, masked or not."""
        for layer in self.layers:
            for held in layer.held:
                held[row].zero_()
