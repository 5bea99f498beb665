"""Checks of lists of users' names."""

from __future__ import annotations

from collections.abc import Sequence

from ttt.checks import check_type
from ttt.user_name import check_user_name


def check_user_list(users: Sequence[str | None]) -> None:
    """Raise TypeError or ValueError unless ``users`` is a list with at least one user or None."""
    allowed = "a list with a user or None for each row of the batch"
    if isinstance(check_type("users", users, Sequence, allowed), (str, bytes)) or not len(users):
        raise ValueError(f"users must be {allowed}, got {users!r:.80}")
    for user in users:
        if user is not None:
            check_user_name(user)
