"""Tokens to text, piece by piece, up to a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNKNOWN = "\ufffd"  # what a tokenizer writes for bytes that are no character, or not yet a complete one
_BYTES = 3  # of an incomplete character, at most


class TextStream:
    """Turns the tokens of one sequence into text as they come.

    Text that may be the beginning of a stop text, or of a character, is held back until more is known.

    Args:
        tokenizer: of Hugging Face transformers.
        stop: texts that end the sequence; the first one found does, and is no part of the text.
        skip_special: leave out tokens such as that which ends a text.

    Attributes:
        stopped: whether a stop text was found.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), *, skip_special: bool = True) -> None:
        self.tokenizer, self.stop, self.skip_special = tokenizer, tuple(stop), skip_special
        self.stopped = False
        self._ids: list[int] = []
        self._clean = [0, 0]  # the last two places in _ids where the text so far ended with a complete character
        self._given = 0  # how much of the text of the tokens from the first of these places on was taken
        self._held = ""

    def add(self, token: int) -> str:
        """The text that is certain after ``token``, and was not returned before."""
        self._ids.append(token)
        # Decoding begins one part earlier than needed: some tokenizers leave out a space at the beginning.
        text = self._decode(self._ids[self._clean[0] :])
        incomplete = min(len(text) - len(text.rstrip(_UNKNOWN)), _BYTES)
        self._held += text[self._given : len(text) - incomplete]
        self._given = max(self._given, len(text) - incomplete)
        if not incomplete:
            self._clean = [self._clean[1], len(self._ids)]
            self._given = len(self._decode(self._ids[self._clean[0] :]))
        return self._certain()

    def end(self) -> str:
        """The rest of the text."""
        if not self.stopped:
            self._held += self._decode(self._ids[self._clean[0] :])[self._given :]
        text = self._certain()
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=self.skip_special)

    def _certain(self) -> str:
        """Take what is certain from the held text."""
        found = [at for text in self.stop if (at := self._held.find(text)) >= 0]
        if found:
            text, self._held, self.stopped = self._held[: min(found)], "", True
            return text
        keep = 0
        for text in self.stop:
            for size in range(min(len(text) - 1, len(self._held)), keep, -1):
                if self._held.endswith(text[:size]):
                    keep = size
                    break
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text
