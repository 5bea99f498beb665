"""What one token stands for, on its own: its bytes, and a text to show, also where it is only a part of a character."""

from __future__ import annotations

import codecs
import dataclasses
import re
from typing import Any

_UNKNOWN = "\ufffd"  # what a tokenizer writes for bytes that are no character
_SPACE = "\u2581"  # stands for a space in the tokens of SentencePiece
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")  # a byte in the tokens of SentencePiece


def _bytes_of_letters() -> dict[str, int]:
    """The byte that each letter of a byte-level token stands for.

    GPT-2's alphabet has the printable letters of Latin-1 for their own bytes, and letters from U+0100 on for the rest,
    in order. A tokenizer of bytes alone, such as ByT5's, has the letters of Latin-1 for all of them.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return (
        {chr(byte): byte for byte in range(256)}
        | {chr(256 + at): byte for at, byte in enumerate(rest)}
    )  # fmt: skip


_BYTES = _bytes_of_letters()


@dataclasses.dataclass(frozen=True)
class TokenText:
    """What a token stands for.

    Attributes:
        raw: its bytes. Those of all tokens of a text, one after the other, are the text in UTF-8, for SentencePiece
            with a space in front of it.
    """

    raw: bytes

    @classmethod
    def of(cls, tokenizer: Any, token: int) -> TokenText:
        """That of ``token``, for a tokenizer of Hugging Face transformers."""
        text, piece = tokenizer.decode([token]), tokenizer.convert_ids_to_tokens(token) or ""
        if _UNKNOWN in text or not text:
            raw = _raw(piece)
            if raw is not None:
                return cls(raw)
        spaces = len(piece) - len(piece.lstrip(_SPACE))
        if spaces and not text.startswith(_SPACE):  # decoding leaves out the first space of a text
            text = " " * spaces + text.lstrip(" ")
        return cls(text.encode())

    @property
    def shown(self) -> str:
        r"""The token's text; bytes that are no character are written as in "\xf0\x9f", as OpenAI's chats have them."""
        return self.raw.decode("utf-8", "backslashreplace")

    @property
    def shown_apart(self) -> str:
        r"""The same, with "bytes:" in front of what holds such bytes, as OpenAI's texts have them."""
        try:
            return self.raw.decode()
        except UnicodeDecodeError:
            return f"bytes:{self.shown}"


class Offsets:
    """Where tokens begin in their text, in characters, one after the other.

    A token that begins inside of a character stands where the character does.
    """

    def __init__(self) -> None:
        self._next = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: TokenText) -> int:
        """The place of the next token."""
        place = self._next
        self._next += len(self._decoder.decode(token.raw))
        return place


def _raw(piece: str) -> bytes | None:
    """The bytes of a token that a tokenizer calls ``piece``; None if it has no name for bytes."""
    if (byte := _BYTE.fullmatch(piece)) is not None:
        return bytes([int(byte[1], 16)])
    if not piece or any(letter not in _BYTES for letter in piece):
        return None
    return bytes(_BYTES[letter] for letter in piece)
