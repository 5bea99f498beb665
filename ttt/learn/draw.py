"""Drawing a token for each row of probabilities."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_WIDTH = 128  # words of a block


@torch.no_grad()
def draw_tokens(p: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """An index for each row of ``p`` (N, V), each drawn with its share of the row's sum: (N,) int64.

    The distribution function is inverted at one uniform number for each row, in float64, while `torch.multinomial`
    draws a number for each word: first the block of words is found, then the word in it. An index whose ``p`` is 0 is
    never drawn.

    Args:
        p: at least 0; rows need not sum to 1.
        generator: of the numbers, also on another device than ``p``; None for the default one of ``p``'s device.

    Raises:
        FloatingPointError: if a row's sum is 0 or not finite.
    """
    device = p.device if generator is None else generator.device
    uniform = torch.rand((len(p), 1), dtype=torch.float64, generator=generator, device=device).to(p.device)
    blocks = nn.functional.pad(p, (0, -p.shape[1] % _WIDTH)).unflatten(1, (-1, _WIDTH))
    # A block is short, and torch adds up float32 ten times as fast without a conversion.
    held = blocks.sum(2, dtype=torch.promote_types(p.dtype, torch.float32)).double()
    wrong = ~(torch.isfinite(held).all(1) & (held > 0).any(1))
    if bool(wrong.any()):
        raise FloatingPointError(
            f"each row of probabilities must have a finite sum above 0, got {held[wrong].sum(1)[:3].tolist()}"
        )
    block, share = _find(held, uniform)
    inside = blocks.gather(1, block.unsqueeze(2).expand(-1, -1, _WIDTH))[:, 0].double()
    word, _ = _find(inside, share)
    found, impossible = block * _WIDTH + word, inside.gather(1, word) <= 0
    if bool(impossible.any()):  # where sums are made in parallel, as on GPUs, an edge may be rounded in two ways
        found = torch.where(impossible, p.argmax(1, keepdim=True), found)
    return found[:, 0]


def _find(parts: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Where ``share`` (N, 1), in [0, 1), of the sum of each row of ``parts`` (N, K) falls: the index, the share of it.

    A part of 0 is not found.
    """
    sums = parts.cumsum(1)
    total = sums[:, -1:]
    number = torch.minimum(share * total, total.nextafter(torch.zeros_like(total)))  # rounded, it must not be the total
    index = torch.searchsorted(sums, number, right=True).clamp_(max=parts.shape[1] - 1)
    part = parts.gather(1, index)
    return index, ((number - sums.gather(1, index) + part) / part).clamp_(0, 1)
