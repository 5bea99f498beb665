"""Regular expressions from files, matched in bounded time.

Python's ``re`` backtracks: on some expressions, such as ``(a+)+$``, it takes time exponential in the text. A `Pattern`
follows all ways through the expression at once (Thompson, "Regular Expression Search Algorithm", 1968), as sets of
positions in the text, and counts its work against a `Budget`. It knows what such expressions need for names of modules:
characters, ``.``, classes, escapes, groups, ``|``, ``*``, ``+``, ``?``, ``^`` and ``$``, with the meaning that they
have in ``re``. Everything else is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_DEPTH = 16  # of nested groups
_LENGTH = 1000
_ESCAPES = "dDwWsS"

Positions = frozenset[int]
Follow = Callable[[str, Positions, "Budget"], Positions]
"""(text, positions before, budget) -> positions after one part of an expression."""


class Budget:
    """Bound on the work of all matches that share it, in positions visited."""

    def __init__(self, steps: int = 20_000_000) -> None:
        self.allowed = self.left = steps

    def spend(self, steps: int) -> None:
        """Raise ValueError once more than the allowed steps were spent."""
        self.left -= steps
        if self.left < 0:
            raise ValueError(f"matching the patterns takes more than {self.allowed} steps")


class Pattern:
    """One regular expression of the subset.

    Raises:
        ValueError: if ``text`` is longer than 1000 characters, nests groups more than 16 deep, is no regular
            expression, or uses what the subset lacks: counts (``{2}``), back references, look-around, possessive
            quantifiers, flags.
    """

    def __init__(self, text: str) -> None:
        self.text, self._at = text, 0
        if len(text) > _LENGTH:
            raise self._refusal(f"it must have at most {_LENGTH} characters, got {len(text)}")
        self._follow = self._alternatives(0)
        if self._at < len(text):
            raise self._refusal(f"unbalanced ')' at {self._at}")

    def matches_end(self, name: str, budget: Budget) -> bool:
        """Whether the expression matches all of ``name``, or all of it after one of its dots."""
        budget.spend(len(name))
        starts = frozenset([0, *(i + 1 for i, character in enumerate(name) if character == ".")])
        return len(name) in self._follow(name, starts, budget)

    # -- parsing: one method for each level of precedence ---------------------------------------------------------

    def _alternatives(self, depth: int) -> Follow:
        """Sequences with ``|`` between them."""
        options = [self._sequence(depth)]
        while self._next() == "|":
            self._at += 1
            options.append(self._sequence(depth))
        return options[0] if len(options) == 1 else _any_of(options)

    def _sequence(self, depth: int) -> Follow:
        parts = []
        while self._next() not in ("", "|", ")"):
            parts.append(self._quantified(depth))
        return _all_of(parts)

    def _quantified(self, depth: int) -> Follow:
        part = self._atom(depth)
        quantifier = self._next()
        if quantifier not in ("*", "+", "?"):
            return part
        self._at += 1
        if self._next() == "?":  # a lazy quantifier matches the same texts
            self._at += 1
        if self._next() in ("*", "+", "?"):
            raise self._refusal(f"a second quantifier at {self._at}")
        return _repeated(part, least=int(quantifier == "+"), many=quantifier != "?")

    def _atom(self, depth: int) -> Follow:
        start, character = self._at, self._next()
        self._at += 1
        if character == "(":
            return self._group(depth + 1)
        if character in ("^", "$"):
            return _anchor(character)
        if character == "[":
            return _one_of(self._compiled(start, self._end_of_class()))
        if character == "\\":
            escaped = self._next()
            self._at += 1
            if not escaped or (escaped.isalnum() and escaped not in _ESCAPES):
                raise self._refusal(f"the escape {self.text[start : self._at]!r} at {start}")
            return _one_of(self._compiled(start, self._at)) if escaped.isalnum() else _literal(escaped)
        if character in "*+?{":
            raise self._refusal(f"{character!r} at {start}")
        return _one_of(re.compile(".")) if character == "." else _literal(character)

    def _group(self, depth: int) -> Follow:
        if depth > _DEPTH:
            raise self._refusal(f"groups must be nested at most {_DEPTH} deep")
        if self._next() == "?":
            if not self.text.startswith("?:", self._at):
                raise self._refusal(f"an extension at {self._at}")
            self._at += 2
        inner = self._alternatives(depth)
        if self._next() != ")":
            raise self._refusal("unbalanced '('")
        self._at += 1
        return inner

    def _end_of_class(self) -> int:
        """The position after the class that began just before the present one, which becomes the present one."""
        if self._next() == "^":
            self._at += 1
        first = self._at
        while (character := self._next()) and (character != "]" or self._at == first):
            self._at += 2 if character == "\\" else 1
        self._at += 1
        return self._at

    def _compiled(self, start: int, end: int) -> re.Pattern[str]:
        """An expression for a single character, which ``re`` matches in constant time."""
        try:
            return re.compile(self.text[start:end])
        except re.error as error:
            raise self._refusal(str(error)) from None

    def _next(self) -> str:
        return self.text[self._at : self._at + 1]

    def _refusal(self, why: str) -> ValueError:
        return ValueError(f"pattern {self.text!r:.120} is not supported: {why}")


def _literal(wanted: str) -> Follow:
    def follow(text: str, before: Positions, _: Budget) -> Positions:
        return frozenset(i + 1 for i in before if text.startswith(wanted, i))

    return follow


def _one_of(wanted: re.Pattern[str]) -> Follow:
    def follow(text: str, before: Positions, _: Budget) -> Positions:
        return frozenset(i + 1 for i in before if i < len(text) and wanted.fullmatch(text[i]))

    return follow


def _anchor(kind: str) -> Follow:
    def follow(text: str, before: Positions, _: Budget) -> Positions:
        return before & {0 if kind == "^" else len(text)}

    return follow


def _all_of(parts: list[Follow]) -> Follow:
    def follow(text: str, before: Positions, budget: Budget) -> Positions:
        for part in parts:
            if not before:
                break
            budget.spend(1 + len(before))
            before = part(text, before, budget)
        return before

    return follow


def _any_of(options: list[Follow]) -> Follow:
    def follow(text: str, before: Positions, budget: Budget) -> Positions:
        budget.spend(len(options) * (1 + len(before)))
        return frozenset().union(*(option(text, before, budget) for option in options))

    return follow


def _repeated(part: Follow, least: int, many: bool) -> Follow:
    def follow(text: str, before: Positions, budget: Budget) -> Positions:
        found = frozenset() if least else before
        latest = before
        while latest:
            budget.spend(1 + len(found))
            latest = part(text, latest, budget) - found
            found |= latest
            if not many:
                break
        return found

    return follow
