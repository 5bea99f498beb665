"""Keys and values that earlier requests have computed, kept for requests that begin with the same tokens.

A conversation sends its whole history with each turn. What a user's weights computed of it may be used again as long
as the weights are the same.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ttt.serve.row_cache import RowCache
from ttt.serve.session import Session
from ttt.serve.state_rows import StateRows

_SHORTEST = 16  # tokens below which reading them anew is no work worth keeping anything for


@dataclasses.dataclass(frozen=True)
class Weights:
    """Whose weights computed something, and in which state they were.

    Attributes:
        user: None for the base model, whose weights never change.
        session: the user's; a user who was forgotten, or opened anew, has another one.
        updates: the session's then.
    """

    user: str | None
    session: Session | None = None
    updates: int = 0

    def same(self, other: Weights) -> bool:
        """Whether ``other`` are the same weights in the same state."""
        return (self.user, self.updates) == (other.user, other.updates) and self.session is other.session


@dataclasses.dataclass(frozen=True)
class _Prefix:
    weights: Weights
    tokens: list[int]
    held: list[Tensor]

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in self.held)


class Prefixes:
    """Keeps what sequences have read, each for the weights that read it: nothing is ever used for another user.

    Args:
        cache: of the sequences.
        most: bytes that are kept; beyond it, what was not used for the longest time is dropped.
        session: the session of a user who has a slot, or None.
        reused: called with the number of tokens that a request need not read.
    """

    def __init__(
        self,
        cache: RowCache,
        most: int,
        session: Callable[[str], Session | None],
        reused: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        self.cache, self.most, self._session, self._reused = cache, most, session, reused
        self._prefixes: OrderedDict[int, _Prefix] = OrderedDict()  # in the order in which they were last used
        self._next, self.bytes = 0, 0

    @classmethod
    def of(
        cls, cache: RowCache | StateRows, most: int, session: Callable[[str], Session | None], observer: Any
    ) -> Prefixes | None:
        """What keeps prefixes of ``cache``; None with ``most`` 0.

        Raises:
            ValueError: if users have states: what a state has read cannot be cut.
        """
        if not most:
            return None
        if not isinstance(cache, RowCache):
            raise ValueError(
                f"prefix_cache must be 0 for a model of sequence layers, whose states cannot be cut, got {most} bytes"
            )
        return cls(cache, most, session, observer.reused)

    def __len__(self) -> int:
        return len(self._prefixes)

    def _weights(self, user: str | None) -> Weights | None:
        """The present state of a user's weights; None for one who has no slot."""
        if user is None:
            return Weights(None)
        session = self._session(user)
        return None if session is None else Weights(user, session, session.updates)

    def drop_stale(self) -> None:
        """Drop what weights have computed that have changed since, or are not here any more."""
        for number, prefix in list(self._prefixes.items()):
            now = self._weights(prefix.weights.user)
            if now is None or not now.same(prefix.weights):
                self._drop(number)

    def begin(self, user: str | None, prompt: list[int], row: int) -> int:
        """Put what is known of the beginning of ``prompt`` into ``row``, which is empty: how many tokens it now holds.

        The last one is always left to be read, as its logits are needed.
        """
        self.drop_stale()
        weights, best, found = self._weights(user), _SHORTEST - 1, None
        for number, prefix in self._prefixes.items():
            if weights is not None and prefix.weights.same(weights):
                length = _common(prefix.tokens, prompt[:-1])
                if length > best:
                    best, found = length, number
        if found is None:
            return 0
        self._prefixes.move_to_end(found)
        self.cache.put(row, self._prefixes[found].held, best)
        self._reused(best)
        return best

    def end(self, user: str | None, tokens: list[int], row: int) -> None:
        """Keep what ``row`` holds of ``tokens``, which it has read whole with the present weights of ``user``.

        If that is more than ``most`` bytes, nothing changes: the beginning of it may be kept already.
        """
        self.drop_stale()
        weights, size = self._weights(user), self.cache.bytes(len(tokens))
        if weights is None or len(tokens) < _SHORTEST or size > self.most:
            return
        for number, prefix in list(self._prefixes.items()):  # what the new one begins with
            if prefix.weights.same(weights) and _common(prefix.tokens, tokens) == len(prefix.tokens):
                self._drop(number)
        while self.bytes + size > self.most:  # before the copy is made, which takes memory, too
            self._drop(next(iter(self._prefixes)))
        self._next += 1
        made = self._prefixes[self._next] = _Prefix(weights, tokens, self.cache.taken(row, len(tokens)))
        self.bytes += made.bytes

    def _drop(self, number: int) -> None:
        self.bytes -= self._prefixes.pop(number).bytes


def _common(ones: list[int], others: list[int]) -> int:
    """How many tokens both begin with."""
    for at, (one, other) in enumerate(zip(ones, others, strict=False)):
        if one != other:
            return at
    return min(len(ones), len(others))
