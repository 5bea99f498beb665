"""Texts in which the control tokens of a tokenizer, such as "<|im_end|>", are read as the characters that they are.

What people write must not end their turn in a chat, or begin another's: only the chat template may. transformers reads
control tokens wherever they stand, unless told otherwise (``split_special_tokens``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import secrets
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Message = dict[str, str]
_THOUGHT = re.compile("(</?think>)")  # templates look for these in the words of an assistant
_PART = 8  # characters of a mark that a text holds by chance once in billions


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a text, which is turned into tokens by itself.

    Attributes:
        text: its characters.
        plain: whether it is a control token that is read as plain text.
        start, stop: where it stands, in characters of the text that it is a part of.
    """

    text: str
    plain: bool
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class _Control:
    ids: frozenset[int]
    all: re.Pattern[str] | None  # finds them
    spoken: re.Pattern[str] | None  # finds them but for the marks of thoughts


_known: weakref.WeakKeyDictionary[Any, _Control] = weakref.WeakKeyDictionary()


def _control(tokenizer: Any) -> _Control:
    """The control tokens of ``tokenizer``, which must not get others later.

    They are its special tokens, and other added tokens that stand in its chat template, as some models mark turns with
    such ones.
    """
    with contextlib.suppress(KeyError, TypeError):
        return _known[tokenizer]
    template = str(getattr(tokenizer, "chat_template", None) or "")
    added = {id: token for id, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.content.strip()}
    known = {id: each.content for id, each in added.items() if each.special or each.content in template}
    spoken = [text for text in known.values() if not _THOUGHT.fullmatch(text)]
    found = _Control(frozenset(known), _pattern(known.values()), _pattern(spoken))
    with contextlib.suppress(TypeError):  # of a tokenizer that cannot be a key
        _known[tokenizer] = found
    return found


def _pattern(texts: Any) -> re.Pattern[str] | None:
    longest_first = sorted(set(texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def plain_pieces(tokenizer: Any, text: str) -> list[Piece]:
    """``text``, of which nothing is a control token, in pieces."""
    pattern = _control(tokenizer).all
    return _split(text, () if pattern is None else pattern.finditer(text))


def with_marks(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[Message], dict[str, str]]:
    """``messages`` with a mark in the place of each control token in their contents, and what each mark stands for.

    A mark is random text that a chat template leaves as it is. In the words of an assistant the marks of its thoughts,
    <think> and </think>, stay: templates look for them there.
    """
    control, marks = _control(tokenizer), dict[str, str]()

    def mark(found: re.Match[str]) -> str:
        name = secrets.token_hex(16)
        marks[name] = found[0]
        return name

    changed = []
    for message in messages:
        pattern = control.spoken if message["role"] == "assistant" else control.all
        content = message["content"] if pattern is None else pattern.sub(mark, message["content"])
        changed.append({**message, "content": content})
    return changed, marks


def neutral(messages: Sequence[Message]) -> list[Message]:
    """``messages`` with one word for what was said: a chat template puts as many control tokens around it.

    Templates look at blanks, and at the marks of an assistant's thoughts: those stay.
    """
    changed = []
    for message in messages:
        parts = _THOUGHT.split(message["content"]) if message["role"] == "assistant" else [message["content"]]
        words = ["words" if part.strip() and not _THOUGHT.fullmatch(part) else part for part in parts]
        changed.append({**message, "content": "".join(words)})
    return changed


def require_no_more_controls(tokenizer: Any, ids: Sequence[int], expected: Sequence[int] = ()) -> None:
    """Raise ValueError if ``ids`` hold a control token more often than the tokens ``expected`` do.

    What was said can become one although none stands in it: where the tokenizer looks for them only after it has
    changed letters, and where a template puts two messages side by side.
    """
    control = _control(tokenizer).ids
    if more := Counter(each for each in ids if each in control) - Counter(expected):
        token = tokenizer.convert_ids_to_tokens(next(iter(more)))
        raise ValueError(f"what was said cannot be read as plain text: the tokenizer makes {token!r:.80} of it")


def marked_pieces(text: str, marks: Mapping[str, str]) -> list[Piece]:
    """``text``, in which ``marks`` stand, in pieces. A mark may be missing, as where a template drops a thought.

    Raises:
        ValueError: if a mark was changed, or only a part of it is there.
    """
    for mark in [mark for mark in marks if mark not in text]:
        if any(mark[at : at + _PART] in text.lower() for at in range(len(mark) - _PART + 1)):
            raise ValueError(
                f"the chat template changes what was said, in which {marks[mark]!r:.80} cannot be read as plain text"
            )
    return _split(text, re.finditer("|".join(marks), text) if marks else (), marks)


def _split(text: str, places: Any, marks: Mapping[str, str] | None = None) -> list[Piece]:
    def pieces() -> Iterator[Piece]:
        at = 0
        for found in places:
            yield Piece(text[at : found.start()], False, at, found.start())
            yield Piece(marks[found[0]] if marks else found[0], True, found.start(), found.end())
            at = found.end()
        yield Piece(text[at:], False, at, len(text))

    return [piece for piece in pieces() if piece.text] or [Piece(text, False, 0, len(text))]


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of ``text`` without any that ``tokenizer`` has added to those of its model.

    Raises:
        ValueError: if the model of the tokenizer makes a control token of it all the same.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    else:
        normal = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        words = [normal] if backend.pre_tokenizer is None else [
            word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal)
        ]  # fmt: skip
        ids = [token.id for word in words for token in backend.model.tokenize(word)]
    if not _control(tokenizer).ids.isdisjoint(ids):
        raise ValueError(f"{text!r:.80} cannot be read as plain text: the tokenizer makes a control token of it")
    return ids


def ids_of(tokenizer: Any, pieces: Sequence[Piece]) -> list[int]:
    """The tokens of ``pieces``, one after the other. Raises ValueError as `plain_ids`."""
    found: list[int] = []
    for piece in pieces:
        if piece.plain:
            found += plain_ids(tokenizer, piece.text)
        else:
            found += tokenizer(piece.text, add_special_tokens=False).input_ids
    return found


def ids_and_places(tokenizer: Any, pieces: Sequence[Piece]) -> tuple[list[int], list[tuple[int, int]]]:
    """The tokens of ``pieces``, and where each stands, [start, stop) in characters; of a plain piece, all of it.

    Raises:
        ValueError: as `plain_ids`, and if ``tokenizer`` cannot tell where its tokens stand, as only fast ones can.
    """
    ids: list[int] = []
    places: list[tuple[int, int]] = []
    for piece in pieces:
        if piece.plain:
            new = plain_ids(tokenizer, piece.text)
            ids += new
            places += [(piece.start, piece.stop)] * len(new)
            continue
        try:
            found = tokenizer(piece.text, return_offsets_mapping=True, add_special_tokens=False)
        except NotImplementedError:
            raise ValueError(f"tokenizer must be a fast one, got {type(tokenizer).__name__}") from None
        ids += found["input_ids"]
        places += [(piece.start + first, piece.start + last) for first, last in found["offset_mapping"]]
    return ids, places
