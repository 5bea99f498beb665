"""Checks of users' names."""

from __future__ import annotations

from collections.abc import Sequence

from ttt.checks import check_type


def check_user(user: str) -> str:
    """``user``, if it can be the name of a user.

    Names are strings only, as in `ttt.Store`: 1, True and 1.0 would be one key, and NaN a new one each time.

    Raises:
        TypeError: if it is no string. ValueError: if it is empty, or None, which stands for the base model.
    """
    if user is None:
        raise ValueError("user must be the name of a user, got None, which stands for the base model")
    if not check_type("user", user, str, "a string"):
        raise ValueError("user must be a string of at least one character, got ''")
    return user


def check_user_list(users: Sequence[str | None]) -> None:
    """Raise TypeError or ValueError unless ``users`` is a list with at least one user or None."""
    allowed = "a list with a user or None for each row of the batch"
    if isinstance(check_type("users", users, Sequence, allowed), (str, bytes)) or not len(users):
        raise ValueError(f"users must be {allowed}, got {users!r:.80}")
    for user in users:
        if user is not None:
            check_user(user)
