"""A batch of token sequences with its masks, and how it is cut into segments of one context and into chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ttt.checks import check_dense, check_token_ids
from ttt.learn.huggingface import masked_inputs


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """A batch of B sequences of T tokens, and which of them are scored and learnt.

    Attributes:
        ids: (B, T) int64.
        attend: (B, T) bool, False for padding; None where there is none.
        scored: (B, T - 1) bool, the targets that are scored: neither they nor the token before them is padding.
        teach: (B, T) bool, the tokens that teach; None for all of them.
        wanted: (B, T - 1) bool, the targets whose loss is taken; None for all of them. Rows (x, delta) are written of
            the tokens at which these are predicted. At others the gradient is 0, or that of what comes later only.
        emphasis: what multiplies the steps that are taken on this text.
    """

    ids: Tensor
    attend: Tensor | None
    scored: Tensor
    teach: Tensor | None
    wanted: Tensor | None
    emphasis: float = 1.0

    @classmethod
    def of(cls, ids: Tensor, attend: Tensor | None = None, teach: Tensor | None = None) -> Text:
        """The text of ``ids`` (B, T) int64 under the masks ``attend`` and ``teach``, (B, T) bool; None is all True."""
        batch, length = ids.shape
        scored = torch.ones((batch, max(length - 1, 0)), dtype=torch.bool, device=ids.device)
        if attend is not None:
            scored = attend[:, :-1] & attend[:, 1:]
        if teach is None:
            return cls(ids, attend, scored, attend, None if attend is None else scored)
        return cls(ids, attend, scored, teach if attend is None else attend & teach, scored & teach[:, 1:])

    def restricted(self, sequences: Tensor) -> Text:
        """The same text, of which only some ``sequences`` (B,) bool may teach."""
        allowed = sequences.unsqueeze(1)
        wanted = self.scored if self.wanted is None else self.wanted
        teach = torch.ones_like(self.ids, dtype=torch.bool) if self.teach is None else self.teach
        return dataclasses.replace(self, teach=teach & allowed, wanted=wanted & allowed)


def check_tokens(
    model: Any,
    ids: Tensor,
    attention_mask: Tensor | None = None,
    learn_mask: Tensor | None = None,
    *,
    name: str = "input_ids",
) -> Text:
    """The `Text` that the arguments of `ttt.Learner.observe` describe.

    Args:
        model: a transformers model, whose vocabulary the tokens must belong to.
        ids: (B, T) int64.
        attention_mask, learn_mask: (B, T) bool or 0/1; None for all 1.
        name: of ``ids``, for messages.

    Raises:
        TypeError: if ``ids`` or a mask is no such tensor, or ``model`` no language model.
        ValueError: for a wrong shape, a token outside the vocabulary, or a mask with other values.
    """
    check_token_ids(name, ids, model)
    masks = [_mask("attention_mask", attention_mask, ids), _mask("learn_mask", learn_mask, ids)]
    return Text.of(_usable(ids), *masks)


def _mask(name: str, mask: Tensor | None, ids: Tensor) -> Tensor | None:
    """``mask`` as bool, on the device of ``ids``, if it suits them."""
    if mask is None:
        return None
    check_dense(name, mask)
    if mask.shape != ids.shape:
        raise ValueError(f"{name} must have the shape of input_ids {tuple(ids.shape)}, got {tuple(mask.shape)}")
    if mask.dtype != torch.bool and bool((wrong := (mask != 0) & (mask != 1)).any()):
        raise ValueError(f"{name} must hold True and False, or 0 and 1, got {mask[wrong][0].item()!r}")
    return _usable(mask.to(device=ids.device, dtype=torch.bool))


def _usable(t: Tensor) -> Tensor:
    """``t``, or a copy where it was made in inference mode: autograd cannot save such a tensor."""
    return t.clone() if t.is_inference() else t


@dataclasses.dataclass(eq=False)
class Segment:
    """A part of a text that is read with one context, which is empty at its beginning.

    Two segments are equal only if they are the same object, so that a segment can be a key.

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
    def of(cls, text: Text, start: int, context: int) -> Segment:
        """The segment of ``text`` at ``start``: ``context`` tokens at most, and the target of the last."""
        span = slice(start, start + context + 1)
        attend, teach = (None if mask is None else mask[:, span] for mask in (text.attend, text.teach))
        return cls(text.ids[:, span], attend, teach, start)

    def inputs(self, start: int, end: int) -> dict[str, Tensor]:
        """The model's inputs for the tokens [start, end), beside the cache of those before."""
        inputs = {"input_ids": self.ids[:, start:end]}
        return inputs if self.attend is None else inputs | masked_inputs(self.attend[:, :end], end - start)


@dataclasses.dataclass(frozen=True, eq=False)
class Span:
    """The place of one chunk: the tokens [start, end) of ``segment``, whose targets are [start + 1, end + 1)."""

    segment: Segment
    start: int
    end: int

    @property
    def columns(self) -> slice:
        """The same tokens in the whole text; also the columns of their scores in (B, T - 1)."""
        return slice(self.segment.start + self.start, self.segment.start + self.end)

    @property
    def targets(self) -> Tensor:
        """(B, end - start) int64."""
        return self.segment.ids[:, self.start + 1 : self.end + 1]

    def inputs(self) -> dict[str, Tensor]:
        """As `Segment.inputs`."""
        return self.segment.inputs(self.start, self.end)


class Spans:
    """Iterates over the chunks of ``text``: ``chunk`` tokens each, fewer at the end of a segment of ``context`` tokens.

    The text's last token is a target only. The first ``start`` tokens, which belong to the first segment, were read
    before.
    """

    def __init__(self, text: Text, chunk: int, context: int, start: int = 0) -> None:
        self.text, self.chunk, self.context, self.start = text, chunk, context, start
        self._segment: Segment | None = None

    def restart(self) -> None:
        """Begin a new segment with the next chunk."""
        self._segment = None

    def __iter__(self) -> Iterator[Span]:
        position, end = self.start, self.text.ids.shape[1] - 1
        if position:
            self._segment = Segment.of(self.text, 0, self.context)
        while position < end:
            segment = self._segment
            if segment is None or position - segment.start >= self.context:
                segment = self._segment = Segment.of(self.text, position, self.context)
            last = min(position + self.chunk, segment.start + self.context, end)
            yield Span(segment, position - segment.start, last - segment.start)
            position = last
