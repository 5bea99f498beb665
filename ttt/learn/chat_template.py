"""Where the words of a message stand in a chat template, and which tokens they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Message = dict[str, str]
_MARK = "the words of this turn"


def words_in_template(tokenizer: Any, messages: Sequence[Message], *, answer: bool = False) -> tuple[str, int, int]:
    """``messages`` in the chat template, and where the last one's words begin and end in it.

    What follows the words up to the template's next line is their end.

    Args:
        answer: whether the template's beginning of an answer follows.

    Raises:
        ValueError: if the template changes the words.
    """

    def text(content: str) -> str:
        last = {**messages[-1], "content": content}
        return tokenizer.apply_chat_template([*messages[:-1], last], add_generation_prompt=answer, tokenize=False)

    content = messages[-1]["content"]
    # Looking for the words could find them in the template's own text.
    whole, start = text(content), text(_MARK).rindex(_MARK)
    if not whole.startswith(content, start):
        raise ValueError(f"the chat template changes what was said, which cannot be found in it: {content!r:.80}")
    line = whole.find("\n", start + len(content))
    return whole, start, len(whole) if line < 0 else line


def tokens_at(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
    """The tokens of ``text``, and which of them hold a character of one of ``spans`` [start, stop).

    Raises:
        ValueError: if ``tokenizer`` cannot tell where its tokens stand, as only fast ones can.
    """
    try:
        found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    except NotImplementedError:
        raise ValueError(f"tokenizer must be a fast one, got {type(tokenizer).__name__}") from None
    inside = [any(first < stop and last > start for start, stop in spans) for first, last in found["offset_mapping"]]
    return found["input_ids"], inside
