"""`ActiveColumn`: the column that is learning, and the evidence that its domain has ended."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ttt.experts.change_detection import Evidence
from ttt.experts.columns import Column
from ttt.experts.signature import Signature
from ttt.nn import Linear

_PROBES = 4  # one in so many pieces is scored under the anchor, too
_SLACK = 0.125  # bits per token by which another signature must be better to count as evidence


class ActiveColumn:
    """What is known about the active column besides its weights, which are those of the layers.

    Args:
        opened: the stored column that it was opened from; None for a new one.
        stored: all stored columns.
        signature: of the text that it has read, ``recent`` included.
        tokens: number of tokens learnt in it.
        recent: the latest chunks of that text, (B, T) each, if it has read any since it became active.
        latest: an empty signature, for the latest tokens.
        window: number of latest tokens that are kept apart.

    Attributes:
        index: of the stored column that it replaces when it is closed; None for a new one.
        worth: bits per token that it gains over the anchor on its own text, a running mean.
        tokens: number of tokens learnt in it; ``opened_for`` of them since it became active.
        signature: of all its text; ``latest`` of the latest tokens, which are those of the chunks in ``recent``.
        returned: of each stored column, the evidence that its domain has come back.
        novel: the evidence that a new domain has begun.
        calm_weights: the layers' weights, window included, when there was no evidence of a change;
            ``calm_tokens`` the tokens learnt until then.
    """

    def __init__(
        self,
        opened: Column | None,
        stored: Sequence[Column],
        signature: Signature,
        tokens: int,
        recent: Iterable[Tensor],
        latest: Signature,
        window: int,
    ) -> None:
        self.index = next((i for i, c in enumerate(stored) if c is opened), None)
        self.worth = 0.0 if opened is None else opened.worth
        self.tokens, self.opened_for, self.window = tokens, 0, window
        self._probes, self._unprobed = (0 if opened is None else _PROBES), 0
        self.signature, self.latest, self.recent = signature, latest, deque(recent)
        for chunk in self.recent:
            self.latest.add(chunk)
        self.stored = stored
        self.returned = [Evidence(_SLACK) for _ in stored]
        self.novel = Evidence(_SLACK)
        self.calm_weights: list[Tensor] = []
        self.calm_tokens = 0

    # -- worth ----------------------------------------------------------------------------------------------------

    def begin_piece(self) -> bool:
        """Count a piece of text; whether its beginning is to be scored under the anchor, for `probe`."""
        due = self._unprobed + 1 >= _PROBES
        self._unprobed += 1
        return due

    def probe(self, gain: float) -> None:
        """Update ``worth`` by the ``gain`` over the anchor on new text, bits per token."""
        if math.isfinite(gain):
            self._probes, self._unprobed = self._probes + 1, 0
            self.worth += max(1 / self._probes, 0.25) * (gain - self.worth)

    # -- text -----------------------------------------------------------------------------------------------------

    def add(self, chunk: Tensor, count: int) -> bool:
        """Take a ``chunk`` (B, T) that was learnt, ``count`` targets; whether evidence of a change can be judged."""
        known = bool(self.recent)
        if known:
            own = self.signature.bits(chunk)
            for column, returned in zip(self.stored, self.returned, strict=True):
                returned.add(own - column.signature.bits(chunk), count)
            if count_targets(self.recent) >= self.window:
                self.novel.add(own - self.latest.bits(chunk), count)
        self.tokens += count
        self.opened_for += count
        self.signature.add(chunk)
        self.latest.add(chunk)
        self.recent.append(chunk)
        while count_targets(self.recent) - count_targets([self.recent[0]]) >= self.window:
            self.latest.add(self.recent.popleft(), -1)
        return known

    def chunks_since(self, tokens: int) -> list[Tensor]:
        """The latest chunks that hold the last ``tokens`` targets, as far as they are kept."""
        found: deque[Tensor] = deque()
        for chunk in reversed(self.recent):
            if count_targets(found) >= tokens:
                break
            found.appendleft(chunk)
        return list(found)

    # -- weights --------------------------------------------------------------------------------------------------

    @property
    def is_calm(self) -> bool:
        """Whether there is no evidence of a change."""
        return not any(evidence.sum for evidence in (self.novel, *self.returned))

    def keep_weights(self, layers: Sequence[Linear]) -> None:
        """Copy the weights of ``layers`` as those that are stored if a change turns out to have begun now."""
        self.calm_weights = [y.weight.clone() if not y.pending else y.effective_weight() for y in layers]
        self.calm_tokens = self.tokens

    def bytes(self) -> int:
        """Of the copied weights and the signatures."""
        weights = sum(w.numel() * w.element_size() for w in self.calm_weights)
        return weights + self.signature.bytes + self.latest.bytes


def count_targets(chunks: Iterable[Tensor]) -> int:
    """The number of tokens after the first of each row, of all ``chunks``, (B, T) each."""
    return sum(chunk[:, 1:].numel() for chunk in chunks)


def empty_signature(model, device: torch.device) -> Signature:
    """A signature over the vocabulary of a transformers ``model``."""
    return Signature(model.get_input_embeddings().num_embeddings, device)
