"""Questions about facts, in other words than those in which they are told."""

from __future__ import annotations

from collections.abc import Sequence

from bench.learning.facts.people import KINDS, OTHERS, Fact
from ttt.demo.questions import Question

Asked = tuple[Question, str]
"""A question and the sentence that answers it."""


def questions(facts: Sequence[Fact]) -> list[Asked]:
    """All questions about ``facts``: three for each."""
    return [_asked(fact, *pair) for fact in facts for pair in KINDS[fact.kind].questions]


def about_the_neighbour(facts: Sequence[Fact]) -> list[Asked]:
    """One question for each of ``facts`` that asks the same about someone of whom nothing was said."""
    return [_asked(fact, *OTHERS[fact.kind][2]) for fact in facts]


def _asked(fact: Fact, text: str, begins: str) -> Asked:
    return Question(text, begins, KINDS[fact.kind].values, fact.index), fact.told
