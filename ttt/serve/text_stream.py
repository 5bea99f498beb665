"""Tokens to text, piece by piece, up to a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"  # what a tokenizer writes for bytes that are no complete character yet
_LONGEST = 8  # tokens after which what is still incomplete is taken as it is


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
        self._from, self._read = 0, 0  # decoding begins at token _from; text up to token _read was given out
        self._held = ""

    def add(self, token: int) -> str:
        """The text that is certain after ``token``, and was not returned before."""
        self._ids.append(token)
        before = self._decode(self._ids[self._from : self._read])
        after = self._decode(self._ids[self._from :])
        if after.endswith(_INCOMPLETE) and len(self._ids) - self._read < _LONGEST:
            return ""
        self._from, self._read = self._read, len(self._ids)
        self._held += after[len(before) :]
        return self._certain()

    def end(self) -> str:
        """The rest of the text."""
        if self._read < len(self._ids) and not self.stopped:
            before = self._decode(self._ids[self._from : self._read])
            self._held += self._decode(self._ids[self._from :])[len(before) :]
            self._read = len(self._ids)
        text = self._certain()
        if self.stopped:
            return text
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
