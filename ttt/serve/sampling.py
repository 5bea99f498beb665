"""Drawing tokens: temperature, nucleus, top-k, penalties, and the log probabilities that are reported."""

from __future__ import annotations

import dataclasses
from collections import Counter

import torch
from torch import Tensor

from ttt.learn.draw import draw_tokens

# A temperature below which only the most probable token is drawn: float32 may not hold the quotients.
_COLDEST = 1e-5


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the tokens of a sequence are drawn, and when it ends.

    Attributes:
        max_tokens: largest number of tokens to generate.
        temperature: divides the logits; 0, or less than 1e-5, takes the most probable token.
        top_p: draw from the most probable tokens that together have this probability.
        top_k: draw from the k most probable tokens; 0 for all.
        frequency_penalty, presence_penalty: subtracted from the logit of a token for each time, or once, that it was
            generated.
        seed: of the draws; None for another one each time.
        stop: texts that end the sequence, and are not part of it.
        logprobs: number of alternatives whose log probabilities are reported at each token; None for no report.
        ignore_eos: go on after the token that ends a text.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False


@dataclasses.dataclass(frozen=True)
class TokenScore:
    """A token and its log probability under the model, before temperature and penalties.

    Attributes:
        token: its number.
        logprob: nats, at most 0.
        top: the most probable tokens in its place, most probable first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def draw(logits: Tensor, sampling: Sampling, counts: Counter[int], generator: torch.Generator | None) -> int:
    """Draw a token from ``logits`` (V,) float32, on the CPU.

    Args:
        counts: how often each token was generated so far.
        generator: of the draws.
    """
    if counts and (sampling.frequency_penalty or sampling.presence_penalty):
        tokens = torch.tensor(list(counts))
        times = torch.tensor(list(counts.values()), dtype=torch.float32)
        logits = logits.clone()
        logits[tokens] -= sampling.frequency_penalty * times + sampling.presence_penalty
    if sampling.temperature < _COLDEST:
        return int(logits.argmax())
    logits = (logits - logits.max()) / sampling.temperature  # at most 0, so that it cannot overflow
    if 0 < sampling.top_k < len(logits):
        lowest = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < lowest, float("-inf"))
    p = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = p.sort(descending=True, stable=True)
        kept = ordered.cumsum(-1) - ordered < sampling.top_p
        kept[0] = True  # float32 may round top_p to 0
        p = torch.zeros_like(p).scatter_(0, order, ordered * kept)
    return int(draw_tokens(p.unsqueeze(0), generator))


def scored(logprobs: Tensor, token: int, alternatives: int) -> TokenScore:
    """The `TokenScore` of ``token`` under ``logprobs`` (V,), with so many ``alternatives``."""
    top: tuple[tuple[int, float], ...] = ()
    if alternatives:
        values, tokens = logprobs.topk(min(alternatives, len(logprobs)))
        top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return TokenScore(token, float(logprobs[token]), top)
