"""Reading and learning with one set of weights, which all sequences of a batch share."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ttt.learn.huggingface import cache_of, cached, detached
from ttt.learn.loop import ObserveOutput
from ttt.learn.step import ScoredChunk, learn_from
from ttt.learn.stream_rule import Chunk
from ttt.learn.text import Span, Text
from ttt.nn import Capturing

if TYPE_CHECKING:
    from ttt.learn.learner import Learner


class SingleWeights:
    """The strategy of a `ttt.Learner` whose model has one set of weights (`ttt.learn.loop.Strategy`).

    Args:
        learner: whose layers learn.
        text: what is read.
        learn: False to score only.

    Attributes:
        cache: the model's cache of the present segment; None before it, and after a rejected chunk.
        learned, rejected: numbers of chunks.
    """

    def __init__(self, learner: Learner, text: Text, learn: bool) -> None:
        self.learner, self.text = learner, text
        self.learns = learn and learner.config.lr > 0
        self.cache: Any = None
        self.learned = self.rejected = 0
        self._rollbacks = 0 if learner.guard is None else learner.guard.rollbacks

    def read(self, span: Span) -> tuple[Tensor, bool]:
        """See `ttt.learn.loop.Strategy`."""
        learner, columns = self.learner, span.columns
        wanted = None if self.text.wanted is None else self.text.wanted[:, columns]
        teaches = self.learns and (wanted is None or bool(wanted.any()))
        if self.learns and learner.access.joins:  # the backward pass is one of all processes
            teaches = learner.access.anywhere(teaches)
        ruled = teaches and bool(learner.rules)
        inputs = span.inputs() | cached(learner.model, self.cache if span.start else None)
        capturing: Any = Capturing(learner.layers, learner.access.joins) if teaches else contextlib.nullcontext()
        finite = True
        with torch.set_grad_enabled(teaches), capturing:
            with learner.head as head:
                out, scores = head.run(inputs, span.targets, keep=ruled)
            if teaches:
                shown = Chunk.of(span, scores.logits, wanted) if ruled else None
                finite = learn_from(learner, capturing, ScoredChunk(scores, wanted, shown, self.text.emphasis))
                self.learned, self.rejected = self.learned + finite, self.rejected + (not finite)
        if learner.guard is not None:
            learner.guard.check_if_due()
        self.cache = detached(cache_of(out)) if finite else None
        return scores.nll, finite

    def output(self, nll: Tensor) -> ObserveOutput:
        """What was found, with the scores ``nll`` (B, T - 1)."""
        guard = self.learner.guard
        rollbacks, strength = (0, 1.0) if guard is None else (guard.rollbacks - self._rollbacks, guard.strength)
        return ObserveOutput(nll, self.text.scored, self.learned, self.rejected, rollbacks, strength)
