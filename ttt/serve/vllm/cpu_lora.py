"""vLLM's low-rank product on the CPU, for batches in which some tokens belong to no user.

vLLM indexes the stacked adapters with -1 for such tokens, which reads the *last slot*: beside a user's request, the
base model's requests would be computed with that user's weights. This one leaves their rows alone, bit for bit, and
gathers no weights for each token.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def add_lora_linear(
    self: Any,
    y: Tensor,
    x: Tensor,
    lora_a_stacked: tuple[Tensor, ...],
    lora_b_stacked: tuple[Tensor, ...],
    scale: float,
    output_slices: tuple[int, ...],
    *,
    buffer: Any = None,
    **kwargs: Any,
) -> None:
    """As ``PunicaWrapperCPU.add_lora_linear``: add each token's low-rank product to ``y`` in place."""
    if self.no_lora:
        return
    starts, lengths, slots, *_ = self.prefill_metadata
    y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
    for start, length, slot in zip(starts.tolist(), lengths.tolist(), slots.tolist(), strict=True):
        if slot < 0:
            continue
        tokens = slice(start, start + length)
        part, first = x[tokens].float(), 0
        for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            change = (part @ a[slot, 0].float().T) @ b[slot, 0].float().T
            y[tokens, first : first + size] += change.mul_(scale).to(y.dtype)
            first += size
