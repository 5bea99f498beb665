"""Learning without Forgetting on streams of text: distillation of the anchor's logits."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from ttt.checks import check_number
from ttt.learn.huggingface import cache_of, cached
from ttt.learn.protection import anchored
from ttt.learn.stream_rule import Chunk, Segment, StreamRule
from ttt.rules.task.distillation import distillation


class LogitDistillation(StreamRule):
    """On the new text the model is to answer as it does under its anchor weights.

    Learning without Forgetting (Li & Hoiem, ECCV 2016) at the logits:

        loss += weight T^2 sum_t KL(softmax(f*(x_<=t) / T) || softmax(f(x_<=t) / T))

    over the tokens that teach. f* is the model under its anchor weights, which reads the same text with a cache of its
    own during one call of `ttt.Learner.observe`. No weight is copied, so a rollback, a reset or a loaded file moves the
    teacher with the anchor. The gradient is added to that of the chunk's own loss at the logits.

    Costs one forward pass.

    Args:
        weight: of the distillation against the loss, both summed over tokens; >= 0.
        temperature: T > 0.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(self, weight: float = 1.0, *, temperature: float = 2.0) -> None:
        self.weight = check_number("weight", weight, 0.0)
        self.temperature = check_number("temperature", temperature, 0.0, above=True)
        self._read: weakref.WeakKeyDictionary[Segment, tuple[Any, int]] = weakref.WeakKeyDictionary()

    def term(self, chunk: Chunk) -> Tensor:
        student, teacher = chunk.logits, self.teacher_logits(chunk)
        if chunk.wanted is None:
            student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
        else:
            student, teacher = student[chunk.wanted], teacher[chunk.wanted]
        return self.weight * distillation(student, teacher, self.temperature, [slice(None)])

    def teacher_logits(self, chunk: Chunk) -> Tensor:
        """The logits (B, T, V) of ``chunk`` under the anchor weights, in the context of its segment."""
        segment, learner = chunk.segment, self.learner
        cache, at = self._read.get(segment, (None, 0))

        def read(end: int) -> Tensor:
            nonlocal cache, at
            out = learner.model(**segment.inputs(at, end), **cached(learner.model, cache))
            cache, at = cache_of(out), end
            return out.logits

        with anchored(learner.layers):
            while at < chunk.start:  # what did not teach is context, too
                read(min(at + learner.config.chunk, chunk.start))
            logits = read(chunk.end).to(chunk.logits.dtype)
        self._read[segment] = cache, at
        return logits

    def tensors(self) -> list[Tensor]:
        held = [t for cache, _ in self._read.values() for layer in cache.layers for t in vars(layer).values()]
        return [t for t in held if isinstance(t, Tensor)]
