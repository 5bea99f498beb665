"""The loop over the chunks of a text, which is the same whatever learns from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator
from typing import Protocol

import torch
from torch import Tensor

from ttt.learn.text import Span, Spans, Text
from ttt.steps import finish


@dataclasses.dataclass(frozen=True)
class ObserveOutput:
    """What `ttt.Learner.observe` returns.

    Attributes:
        nll: (B, T-1) float32, nats: -log p(token t+1 | tokens up to t), each measured before the model learnt from
            that token. Where either token is padding, 0.
        mask: (B, T-1) bool: the tokens that were scored.
        learned: number of chunks that were learnt. With users, a chunk counts once for each user who learnt from it.
        rejected: number of chunks that were not learnt, because a loss or gradient was not finite. They changed
            nothing. With users, counted as ``learned`` is.
        rollbacks: number of times that a `ttt.Guard` rolled the layers, or a user, back during this text.
        strength: the factor by which a `ttt.Guard` multiplies the protection after this text; 1 without a guard.
        rejected_users: the number of rejected chunks of each user who had any.
        rolled_back_users: how often each user's guard rolled them back, of those who were.
    """

    nll: Tensor
    mask: Tensor
    learned: int
    rejected: int
    rollbacks: int = 0
    strength: float = 1.0
    rejected_users: dict[str, int] = dataclasses.field(default_factory=dict)
    rolled_back_users: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def bits(self) -> float:
        """Mean bits per scored token; NaN if none was scored, of which there is no mean."""
        return float(self.nll[self.mask].mean(dtype=torch.float64)) / math.log(2)


class Strategy(Protocol):
    """How a chunk is read and what learns from it: one set of weights, one per user, or one inside a CUDA graph."""

    def read(self, span: Span) -> tuple[Tensor, bool]:
        """Score the chunk at ``span``, then learn from it.

        The context is empty where ``span.start`` is 0; otherwise it is the segment's tokens before the span.

        Returns:
            (B, end - start) nats, measured before learning; and whether the context can be trusted. False where the
            model computed something that is not finite: the next chunk then begins a new segment.
        """


def read_in_steps(
    text: Text,
    strategy: Strategy,
    chunk: int,
    context: int,
    after: Callable[[Tensor, int], None] | None = None,
    start: int = 0,
) -> Generator[None, None, Tensor]:
    """Score ``text`` chunk by chunk with ``strategy``, which learns from each chunk after it was scored.

    Args:
        chunk: tokens of a chunk, at most.
        context: tokens of a segment, at most.
        after: called after every chunk with the scores (B, T - 1) and how many of their columns are final; it may
            change weights.
        start: tokens that the strategy has read before, less than ``context``; they are not scored.

    Yields:
        After every chunk.

    Returns:
        (B, T - 1) float32, nats of every token after the first; 0 where ``text.scored`` is False.
    """
    nll = torch.zeros(text.scored.shape, device=text.ids.device)
    spans = Spans(text, chunk, context, start)
    for span in spans:
        scores, trusted = strategy.read(span)
        columns = span.columns
        nll[:, columns] = scores if text.attend is None else torch.where(text.scored[:, columns], scores, 0.0)
        if after is not None:
            after(nll, columns.stop)
        if not trusted:
            spans.restart()
        yield
    return nll


def read(
    text: Text,
    strategy: Strategy,
    chunk: int,
    context: int,
    after: Callable[[Tensor, int], None] | None = None,
    start: int = 0,
) -> Tensor:
    """All of `read_in_steps` at once: (B, T - 1) float32."""
    return finish(read_in_steps(text, strategy, chunk, context, after, start))
