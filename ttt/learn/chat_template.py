"""Where the words of a message stand in a chat template, and which tokens they are."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from ttt.learn.plain_text import (
    Message,
    Piece,
    ids_and_places,
    ids_of,
    marked_pieces,
    neutral,
    plain_pieces,
    require_no_more_controls,
    with_marks,
)  # fmt: skip


def words_in_template(tokenizer: Any, messages: Sequence[Message], *, answer: bool = False) -> tuple[str, int, int]:
    """``messages`` in the chat template, and where the last one's words begin and end in it.

    Args:
        answer: whether the template's beginning of an answer follows.

    Raises:
        ValueError: as `spans_in_template`.
    """
    text, ((start, stop),) = spans_in_template(tokenizer, messages, [len(messages) - 1], answer=answer)
    return text, start, stop


def spans_in_template(
    tokenizer: Any, messages: Sequence[Message], chosen: Sequence[int], *, answer: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """``messages`` in the chat template, and where the words of the ``chosen`` ones begin and end in it.

    What follows the words up to the template's next line is their end. Templates may leave out blanks around the words.

    Args:
        chosen: places of messages, in ascending order.
        answer: whether the template's beginning of an answer follows.

    Returns:
        The text, and for each chosen message its [start, stop) in characters.

    Raises:
        ValueError: if the template changes the words.
    """

    def text(messages: Sequence[Message]) -> str:
        return tokenizer.apply_chat_template(list(messages), add_generation_prompt=answer, tokenize=False)

    # Looking for the words could find them in the template's own text, or in another message: marks are put in their
    # places, which cannot be there.
    marked, mark = list(messages), secrets.token_hex(16)
    for at in chosen:
        marked[at] = {**messages[at], "content": f"the words {mark} of a turn"}
    whole, parts = text(messages), text(marked).split(f"the words {mark} of a turn")
    spans = None if len(parts) != len(chosen) + 1 else _spans(whole, parts, [messages[at]["content"] for at in chosen])
    if spans is None:
        shown = ", ".join(f"{messages[at]['content']!r:.80}" for at in chosen[:3])
        raise ValueError(f"the chat template changes what was said, which cannot be found in it: {shown}")
    return whole, spans


def _spans(whole: str, parts: Sequence[str], words: Sequence[str]) -> list[tuple[int, int]] | None:
    """Where ``words`` stand in ``whole``, if it is ``parts`` with the words between them; None if it is not."""
    spans, at = [], len(parts[0])
    for word, part in zip(words, parts[1:], strict=True):
        found = next((each for each in (word, word.strip()) if whole.startswith(each + part, at)), None)
        if found is None:
            return None
        end = part.find("\n")
        spans.append((at, at + len(found) + (len(part) if end < 0 else end)))
        at += len(found) + len(part)
    return spans if whole.startswith(parts[0]) and at == len(whole) else None


def prompt_tokens(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The tokens of ``messages`` in the chat template, with the beginning of an answer.

    Control tokens in the messages' contents are read as plain text, here and in `turn_tokens`.

    Raises:
        ValueError: if that is not possible. And whatever the template raises.
    """
    changed, marks = with_marks(tokenizer, messages)

    def text(messages: Sequence[Message]) -> str:
        return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)

    ids = ids_of(tokenizer, marked_pieces(text(changed), marks))
    require_no_more_controls(tokenizer, ids, tokenizer(text(neutral(messages)), add_special_tokens=False).input_ids)
    return ids


def turn_tokens(
    tokenizer: Any, messages: Sequence[Message], chosen: Sequence[int], *, answer: bool = False, cut: bool = False
) -> tuple[list[int], list[bool], list[bool]]:
    """The tokens of ``messages`` in the chat template, and which of them are words of the ``chosen`` ones.

    Args:
        chosen, answer: as for `spans_in_template`.
        cut: leave out what follows the words of the last chosen message.

    Returns:
        The tokens; which of them are words of the chosen messages, or their end; and which teach, see `teaching_words`.

    Raises:
        ValueError: as `spans_in_template` and `prompt_tokens`.
    """
    changed, marks = with_marks(tokenizer, messages)

    def found(messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        whole, spans = spans_in_template(tokenizer, messages, chosen, answer=answer)
        return whole[: spans[-1][1]] if cut else whole, spans

    text, spans = found(changed)
    ids, inside = tokens_at(tokenizer, marked_pieces(text, marks), spans)
    expected, _ = found(neutral(messages))
    require_no_more_controls(tokenizer, ids, tokenizer(expected, add_special_tokens=False).input_ids)
    return ids, inside, teaching_words(inside)


def plain_tokens_at(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
    """`tokens_at` of a ``text`` that stands in no template, of which nothing is a control token.

    Raises:
        ValueError: as `tokens_at`, and if the tokenizer makes a control token of it all the same.
    """
    ids, inside = tokens_at(tokenizer, plain_pieces(tokenizer, text), spans)
    require_no_more_controls(tokenizer, ids)
    return ids, inside


def tokens_at(
    tokenizer: Any, text: str | Sequence[Piece], spans: Sequence[tuple[int, int]]
) -> tuple[list[int], list[bool]]:
    """The tokens of ``text``, and which of them hold a character of one of ``spans`` [start, stop).

    Args:
        text: a text, or its pieces, see `ttt.learn.plain_text`.

    Raises:
        ValueError: as `ttt.learn.plain_text.ids_and_places`.
    """
    pieces = [Piece(text, False, 0, len(text))] if isinstance(text, str) else text
    ids, places = ids_and_places(tokenizer, pieces)
    merged, at, inside = _merged(spans), 0, []
    for first, last in places:
        while at < len(merged) and merged[at][1] <= first:
            at += 1
        inside.append(at < len(merged) and first < merged[at][1] and last > merged[at][0])
    return ids, inside


def teaching_words(inside: Sequence[bool]) -> list[bool]:
    """The tokens that teach of the words of a chat's turns, ``inside``: all but the first of each turn's.

    The first token is predicted at the template's own one, which stands before every turn. To learn it there would
    teach the model how a turn begins, and take a part of the steps away from what is said. A token alone does teach.
    """
    before, after = [False, *inside][: len(inside)], [*inside[1:], False]
    return [each and (one or not other) for each, one, other in zip(inside, before, after, strict=False)]


def openings(tokenizer: Any, most: int) -> set[tuple[int, ...]]:
    """What the chat template puts before the words of a turn: the last tokens of it, at most ``most``, in each form.

    The forms are those of the roles "system", "user" and "assistant" that the template accepts, in first and later
    turns; there are none if it cannot be told where words stand in it.
    """
    found, words = set(), "words"
    for roles in (("user",), ("system", "user"), ("user", "assistant", "user")):
        messages = [{"role": role, "content": words} for role in roles]
        try:
            whole, spans = spans_in_template(tokenizer, messages, range(len(messages)))
            # Without their end, which stands before the next turn.
            ids, inside = tokens_at(tokenizer, whole, [(start, start + len(words)) for start, _ in spans])
        except Exception:  # templates raise what they like, as for a role that they do not know
            continue
        before: list[int] = []
        for token, is_word in zip(ids, inside, strict=True):
            if not is_word:
                before.append(token)
            elif before:
                found.add(tuple(before[-most:]))
                before = []
    return found


def _merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """``spans`` in ascending order, those that touch each other as one."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(span for span in spans if span[0] < span[1]):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found
