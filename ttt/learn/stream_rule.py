"""What a learning rule for streams of text is: `StreamRule`, and the `Chunk` that it is shown.

`ttt.Learner` reads chunk by chunk. Rules add terms to the loss of every chunk that teaches. Their graphs meet the
chunk's own nowhere but at its logits, which are a leaf: so rows (x, delta) that a rule's own forward passes put through
the layers are told from those of the chunk, and what a term says of the chunk's logits is added to its gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ttt.learn.huggingface import masked_inputs
from ttt.nn import Capturing

Pairs = list[tuple[Tensor, Tensor]]


@dataclasses.dataclass(eq=False)
class Segment:
    """A text that is read with one context, from an empty one on. Equal to itself alone, so that it may be a key.

    Attributes:
        ids: (B, L) int64.
        attend: (B, L) bool, False for padding; None where there is none.
        teach: (B, L) bool, the tokens that may teach; None for all of them.
        start: where it begins in the text given to `ttt.Learner.observe`.
    """

    ids: Tensor
    attend: Tensor | None = None
    teach: Tensor | None = None
    start: int = 0

    @classmethod
    def of(cls, ids: Tensor, attend: Tensor | None, teach: Tensor | None, start: int, context: int) -> Segment:
        """The segment at ``start`` of a text, all (B, T): ``context`` tokens at most, and the target of the last."""
        span = slice(start, start + context + 1)
        attend, teach = (None if mask is None else mask[:, span] for mask in (attend, teach))
        return cls(ids[:, span], attend, teach, start)

    def inputs(self, start: int, end: int) -> dict[str, Tensor]:
        """The model's inputs for the tokens [start, end), beside the cache of those before."""
        inputs = {"input_ids": self.ids[:, start:end]}
        return inputs if self.attend is None else inputs | masked_inputs(self.attend[:, :end], end - start)


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """T = end - start tokens that were scored and are being learnt from.

    Attributes:
        segment: what they are part of.
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
    def of(cls, segment: Segment, start: int, end: int, logits: Tensor, wanted: Tensor | None) -> Chunk:
        """A chunk around ``logits``, from whose graph its own are cut."""
        wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
        return cls(segment, start, end, logits.detach().to(wide).requires_grad_(), wanted)

    @property
    def targets(self) -> Tensor:
        """(B, T) int64: the tokens that ``logits`` foretell."""
        return self.segment.ids[:, self.start + 1 : self.end + 1]


class StreamRule:
    """A way not to forget while reading. Rules compose: ``ttt.Learner(model, rules=[...])`` takes any number of them.

    One object serves one learner. What it remembers changes in `seen`, `consolidated`, `reset` and `load_state` alone:
    a chunk that is rejected leaves it as it was. (The draws of what is replayed go on after a rejected chunk, lest one
    bad sequence be drawn for ever.)

    A rule's memory is part of `ttt.Learner.snapshot`, not of the files that `ttt.save` writes.
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
        """A scalar term of the loss, summed over tokens; None for nothing.

        Called in grad mode after the chunk was scored, before anything is learnt. What it sends through
        ``learner.model`` is captured at the learning layers and learnt together with the chunk. A term that is not
        finite rejects the chunk.
        """
        return None

    def seen(self, chunk: Chunk) -> None:
        """After the model learnt from ``chunk``."""

    def consolidated(self) -> None:
        """After anchors and importance have moved."""

    def reset(self) -> None:
        """After the model forgot the stream: the rule forgets it, too."""

    def state(self) -> Any:
        """A copy of what `load_state` goes back to, for `ttt.Learner.snapshot`."""
        return None

    def load_state(self, state: Any) -> None:
        """Go back to ``state``, to the bit; called after the layers went back, by `ttt.Learner.rollback`."""

    def tensors(self) -> Iterable[Tensor]:
        """What the rule keeps between chunks, for counting bytes."""
        return ()


def check_rules(rules: Iterable[StreamRule]) -> list[StreamRule]:
    """``rules`` as a list.

    Raises:
        TypeError: if one is no `StreamRule`.
    """
    found = list(rules)
    for rule in found:
        if not isinstance(rule, StreamRule):
            raise TypeError(f"rules must be ttt.rules.StreamRule, which learn from text, got {type(rule).__name__}")
    return found


def backward_terms(
    rules: Sequence[StreamRule], chunk: Chunk, capturing: Capturing
) -> tuple[Tensor | None, list[Pairs]]:
    """(the sum of the rules' terms, None for none; the pairs that its backward pass left at each layer).

    The gradient at the chunk's own logits is then in ``chunk.logits.grad``.
    """
    terms = [term for rule in rules if (term := rule.term(chunk)) is not None]
    total = torch.stack(terms).sum() if terms else None
    if total is not None and total.requires_grad:
        total.backward()
    return None if total is None else total.detach(), capturing.renew()


def joined(own: Pairs, trace: Pairs | None, rows: Tensor | None, replayed: Pairs) -> tuple[Pairs, Any, Any]:
    """The arguments of `ttt.nn.Linear.update_from` for a chunk's ``own`` rows and the ``replayed``, in this order.

    ``rows`` masks the chunk's alone. Replayed rows have no part in a trace that has gradients of its own (MAS).
    """
    if rows is not None:
        rows = torch.cat([rows, *(rows.new_ones(len(x)) for x, _ in replayed)])
    if trace is not None:
        trace = trace + [(x, torch.zeros_like(delta)) for x, delta in replayed]
    return own + replayed, trace, rows
