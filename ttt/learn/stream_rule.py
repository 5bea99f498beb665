"""`StreamRule`, the base class of rules for streams of text, and the `Chunk` that rules are shown.

`ttt.Learner` reads chunk by chunk, and rules add terms to the loss of every chunk that teaches. A rule sees the chunk's
logits as a leaf, so its graph and the chunk's own do not overlap. The rows (x, delta) of a rule's own forward passes
are therefore collected apart from those of the chunk, and the gradient of its term at the logits is added to the
chunk's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ttt.checks import check_type
from ttt.learn.text import Segment, Span
from ttt.nn import Capturing
from ttt.ops.dtypes import accumulation

Pairs = list[tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """T = end - start tokens of B sequences that were scored and are being learnt from.

    Attributes:
        segment: the part of the text that they belong to.
        start, end: the tokens [start, end) of the segment were read; their targets are [start + 1, end + 1).
        logits: (B, T, V) float32 (float64 for a float64 model), from before learning. A leaf that requires grad.
        wanted: (B, T) bool, the targets that teach; None for all.
    """

    segment: Segment
    start: int
    end: int
    logits: Tensor
    wanted: Tensor | None = None

    @classmethod
    def of(cls, span: Span, logits: Tensor, wanted: Tensor | None) -> Chunk:
        """The chunk at ``span`` with a leaf made of ``logits`` (B, T, V)."""
        wide = accumulation(logits.dtype)
        return cls(span.segment, span.start, span.end, logits.detach().to(wide).requires_grad_(), wanted)

    @property
    def targets(self) -> Tensor:
        """(B, T) int64: the tokens that ``logits`` predict."""
        return self.segment.ids[:, self.start + 1 : self.end + 1]


class StreamRule:
    """A term of the loss, against forgetting while reading. ``ttt.Learner(model, rules=[...])`` takes any number.

    One object serves one learner. Its memory changes only in `seen`, `consolidated`, `reset` and `load_state`, so a
    rejected chunk leaves it as it was. (Random draws do go on after a rejected chunk: otherwise a sequence that causes
    the rejection would be drawn again and again.)

    The memory is part of `ttt.Learner.snapshot`, but not of the files that `ttt.save` writes.
    """

    learner: Any = None

    def attach(self, learner: Any) -> None:
        """Called once, by the learner, when it is ready.

        Raises:
            ValueError: if the rule serves another learner, or cannot serve this one.
        """
        if self.learner is not None:
            raise ValueError(f"{type(self).__name__} serves a learner already; rules must have one each")
        self.learner = learner

    def term(self, chunk: Chunk) -> Tensor | None:
        """A scalar term of the loss, summed over tokens; None for no term.

        It is called in grad mode, after the chunk was scored and before anything is learnt. The learning layers learn
        from the rule's own forward passes through ``learner.model`` together with the chunk. A term that is not finite
        rejects the chunk.
        """
        return None

    def seen(self, chunk: Chunk) -> None:
        """Called after the model learnt from ``chunk``."""

    def consolidated(self) -> None:
        """Called after `ttt.Learner.consolidate` changed anchors and importance."""

    def reset(self) -> None:
        """Forget the stream; called after the layers were reset."""

    def state(self) -> Any:
        """A copy of the memory, as `load_state` takes it; for `ttt.Learner.snapshot`."""
        return None

    def load_state(self, state: Any) -> None:
        """Go back to ``state`` exactly; called by `ttt.Learner.rollback` after the layers went back."""

    def tensors(self) -> Iterable[Tensor]:
        """The tensors that the rule keeps between chunks, for counting bytes."""
        return ()


def check_rules(rules: Iterable[StreamRule]) -> list[StreamRule]:
    """``rules`` as a list.

    Raises:
        TypeError: if one is no `StreamRule`.
    """
    found = list(check_type("rules", rules, Iterable, "a list of ttt.rules.StreamRule"))
    for rule in found:
        if not isinstance(rule, StreamRule):
            raise TypeError(f"rules must be ttt.rules.StreamRule, which learn from text, got {type(rule).__name__}")
    return found


def backward_terms(
    rules: Sequence[StreamRule], chunk: Chunk, capturing: Capturing
) -> tuple[Tensor | None, list[Pairs]]:
    """Propagate the rules' terms back: (their sum, None for no term; the (x, delta) pairs that each layer captured).

    Afterwards the gradient at the chunk's own logits is in ``chunk.logits.grad``.
    """
    terms = [term for rule in rules if (term := rule.term(chunk)) is not None]
    total = torch.stack(terms).sum() if terms else None
    if total is not None and total.requires_grad:
        total.backward()
    return None if total is None else total.detach(), capturing.renew()


def joined(own: Pairs, trace: Pairs | None, rows: Tensor | None, replayed: Pairs) -> tuple[Pairs, Any, Any]:
    """The arguments of `ttt.nn.Linear.update_from` for one layer: a chunk's ``own`` rows, then the ``replayed`` ones.

    Args:
        own: captured in the backward pass of the chunk's loss.
        trace: captured in that of the trace's own loss (MAS), in which replayed rows have gradients of 0; or None.
        rows: (T,) bool, the chunk's rows that may teach; None for all. Replayed rows always may.
        replayed: captured in the backward pass of the rules' terms.
    """
    if rows is not None:
        if places := getattr(own, "places", None):
            rows = rows[torch.cat(places)]
        rows = torch.cat([rows, *(rows.new_ones(len(x)) for x, _ in replayed)])
    if trace is not None:
        trace = trace + [(x, torch.zeros_like(delta)) for x, delta in replayed]
    return own + replayed, trace, rows
