"""Rehearsal: text of the model's own that a study reads beside what was said, so that the rest stays as it was.

The loss of a study gets a second term, as in learning without forgetting (Li & Hoiem, ECCV 2016) on pseudo-patterns
(Robins, Connection Science 1995):

    rehearse * mean_t KL(p(. | x_<t) before the study || p(. | x_<t) now)          x: text that the model wrote
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from ttt.learn.own_text import first_token, words_of, written_in_steps

SEQUENCES, LENGTH = 32, 48
"""Number and tokens of the texts that are drawn."""
GROUP = 4  # texts of one step


def draw_in_steps(model: Any, *, context: int, seed: int) -> Generator[None, None, Tensor]:
    """Texts (32, 48) int64 that ``model`` writes, drawn from its whole distribution (temperature 1), token by token.

    They begin with the token that begins a text; with a random one each, where the model's config names none.

    Args:
        context: bound on the length.
        seed: of the draws.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    token = first_token(model)
    if token is None:
        first = torch.randint(words_of(model), (SEQUENCES, 1), generator=generator, device=device)
    else:
        first = torch.full((SEQUENCES, 1), token, device=device)
    return (yield from written_in_steps(model, first, min(LENGTH, context), generator))


def group(texts: Tensor, step: int) -> Tensor:
    """The texts (4, T) that step ``step`` of a study reads, of all ``texts`` (32, T): in turns."""
    at = step * GROUP % len(texts)
    return texts[at : at + GROUP]


@torch.no_grad()
def divergence(before: Tensor, now: Tensor) -> tuple[float, Tensor]:
    """KL(before || now) of the next token in nats, the mean over the tokens, and its gradient at the logits ``now``.

    Args:
        before, now: logits (B, T, V).

    Returns:
        The mean, and the gradient (B, T, V) of the dtype of ``now``.
    """
    total, gradient, tokens = 0.0, torch.empty_like(now), now.shape[0] * now.shape[1]
    for old, new, into in zip(before, now, gradient, strict=True):  # one text at a time: vocabularies are large
        wide = torch.promote_types(new.dtype, torch.float32)
        log_old, log_new = old.to(wide).log_softmax(-1), new.to(wide).log_softmax(-1)
        p = log_old.exp()
        total += float((p * (log_old - log_new)).sum(dtype=torch.float64))
        into.copy_((log_new.exp_() - p) / tokens)
    return total / tokens, gradient
