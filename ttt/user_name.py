"""What can be the name of a user: one rule for weights in memory and for the store, which must be able to keep them."""

from __future__ import annotations

LONGEST = 512
"""Bytes of the longest name, in UTF-8."""


def check_user_name(user: str) -> str:
    """``user``, if it can be the name of a user: text of 1 to 512 bytes in UTF-8, without NUL.

    Names are strings only: 1, True and 1.0 would be one key, and NaN a new one each time.

    Raises:
        TypeError: if it is no string. ValueError: if it is None, which stands for the base model, empty or too long, or
            holds NUL or what UTF-8 cannot hold, as half of a character.
    """
    if user is None:
        raise ValueError("user must be the name of a user, got None, which stands for the base model")
    if not isinstance(user, str):
        raise TypeError(f"user must be a string, got {type(user).__name__} {user!r:.80}")
    try:
        size = len(user.encode())
    except UnicodeEncodeError:
        raise ValueError(f"user must be text that UTF-8 can hold, got {user!r:.80}") from None
    if not 1 <= size <= LONGEST or "\0" in user:
        raise ValueError(f"user must be a string of 1 to {LONGEST} bytes without NUL, got {user!r:.80} ({size} bytes)")
    return user
