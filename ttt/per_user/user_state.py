"""What is kept of a user beside the layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

State = dict[str, Tensor]
GUARDS = "ttt.guard"
"""``prefix`` of `ttt.per_user.guards.UserGuards`."""


class UserState(Protocol):
    """State beside the layers that a `Pool` keeps for users in a slot, such as `ttt.EpisodeLog`."""

    prefix: str
    """Its tensors are ``{prefix}.{name}`` in a user's state."""

    def export(self, user: str) -> State:
        """The tensors kept for ``user``, by name."""

    def check_state(self, state: State) -> object:
        """Raise ValueError or TypeError unless ``state``, which may be empty, can be loaded."""

    def load(self, user: str, state: State) -> None:
        """Start with a user whose layers have just been loaded; ``state`` is empty for a new user."""

    def forget(self, user: str) -> None:
        """Drop everything kept for ``user``."""


class Log(UserState, Protocol):
    """What users learnt from, as `ttt.EpisodeLog` keeps it."""

    def era(self, user: str | None) -> object:
        """Something that stays the same until ``user`` is forgotten."""


class Companion(UserState, Protocol):
    """State of users that takes part in their learning, as `ttt.per_user.guards.UserGuards`."""

    def before_evict(self, user: str) -> None:
        """Called before ``user``, who has a slot, is evicted; may change the user's weights."""

    def pace(self, slots: Tensor, nll: Tensor, targets: Tensor, bad: Tensor) -> Tensor:
        """Called with each chunk that users learn from; (S,) factors of their steps. See `UserGuards.pace`."""

    def remember(self) -> Callable[[], None]:
        """A function that undoes later calls of `pace`, for a chunk that could not be learnt."""

    def check_due(self) -> list[str]:
        """Called after each chunk that users have learnt from; may roll users back, and returns them."""

    def logged(self, user: str) -> None:
        """Called when a text that ``user`` has just learnt was put into the log."""

    def require_within(self, user: str) -> float:
        """Called with changed weights that are in effect and not yet written. See `UserGuards.require_within`."""

    def settle(self, user: str, drift: float) -> object:
        """Called when they are written, with what `require_within` returned."""
