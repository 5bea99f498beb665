"""API keys: who is asking, and whose weights may be used.

A key belongs to one user, or to an operator, who may act for any user. The file has the SHA-256 of each key, not the
key: keys are 256 random bits, so a plain hash cannot be searched.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import secrets
import threading
from pathlib import Path
from typing import Any

from ttt.files import in_turns, write_atomically
from ttt.serve.errors import BadRequest, Forbidden, Unauthenticated, Unavailable

log = logging.getLogger("ttt.serve")
USER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:+-]{0,127}")
"""What the id of a user who is served looks like."""
PREFIX = "ttt-"


@dataclasses.dataclass(frozen=True)
class Identity:
    """Who is asking.

    Attributes:
        user: whose weights are used; None for the base model's.
        operator: whether the key may act for any user.
        key: a short name of the key, for limits and logs; it does not tell the key.
    """

    user: str | None
    operator: bool
    key: str

    def require(self, user: str) -> str:
        """``user``, if this key may act for them.

        Raises:
            BadRequest: if it can be no user's id. Forbidden: if the key belongs to another user.
        """
        check_user_id(user)
        if not self.operator and user != self.user:
            raise Forbidden(f"this key may act for user {self.user!r} only, got {user!r:.140}")
        return user


def check_user_id(user: str) -> str:
    """Return ``user``, or raise BadRequest if it can be no user's id."""
    if not USER_ID.fullmatch(user):
        raise BadRequest(
            f"a user's id must have 1 to 128 ASCII letters, digits and . _ @ : + - and begin with a letter or digit, "
            f"got {user!r:.140}",
            param="user",
        )
    return user


def digest(key: str) -> str:
    """The SHA-256 of ``key``, in hexadecimal."""
    return hashlib.sha256(key.encode()).hexdigest()


class Keys:
    """The API keys in a file, which is read again when it has changed.

    The file is JSON: ``{"keys": [{"sha256": "...", "user": "ada"}, {"sha256": "...", "operator": true}]}``.

    Args:
        path: the file.

    Raises:
        ValueError: if the file holds something else. OSError: if it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._read_at: tuple[int, int, int] | None = None
        self._entries: dict[str, dict[str, Any]] = {}
        self.entries()

    def entries(self) -> dict[str, dict[str, Any]]:
        """The entries of the file by the SHA-256 of their key."""
        found = self.path.stat()
        stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
        with self._lock:
            if stamp != self._read_at:
                self._entries, self._read_at = _read(self.path), stamp
            return self._entries

    def identify(self, authorization: str | None, named: str | None = None) -> Identity:
        """Who asks with the header ``Authorization: Bearer KEY``.

        Args:
            authorization: the header's value; None if there is none.
            named: the user that an operator acts for (header ``x-ttt-user``); None for the base model.

        Raises:
            Unauthenticated: if there is no valid key. BadRequest, Forbidden: if ``named`` is wrong or not allowed.
            Unavailable: if the file cannot be read.
        """
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthenticated("an API key is needed, in the header 'Authorization: Bearer KEY'")
        name = digest(key.strip())
        try:
            entry = self.entries().get(name)
        except (OSError, ValueError) as error:
            log.error("API keys cannot be checked: %s", error)  # it names the file, and none of the keys
            raise Unavailable("API keys cannot be checked at present; try again later", retry_after=5) from error
        if entry is None:
            raise Unauthenticated("the API key is not known to this server")
        identity = Identity(entry.get("user"), bool(entry.get("operator")), name[:12])
        if named is None:
            return identity
        return dataclasses.replace(identity, user=identity.require(named))


class NoKeys:
    """For a server without API keys, which only this machine can reach: everyone is an operator.

    Args:
        user: whose weights are used where the header ``x-ttt-user`` names nobody.
    """

    def __init__(self, user: str = "me") -> None:
        self.user = check_user_id(user)

    def identify(self, authorization: str | None, named: str | None = None) -> Identity:
        """As `Keys.identify`, for any key or none."""
        return Identity(check_user_id(self.user if named is None else named), True, "local")


def add_key(path: str | os.PathLike[str], user: str | None) -> str:
    """Add a new key of ``user``, or of an operator (None), to the file at ``path``, which is made if there is none.

    Returns:
        The key, which is stored nowhere.

    Raises:
        BadRequest: if ``user`` can be no user's id. ValueError, OSError: as `Keys`.
    """
    key = PREFIX + secrets.token_urlsafe(32)
    entry = {"operator": True} if user is None else {"user": check_user_id(user)}
    with in_turns(Path(path)):
        entries = _read(Path(path)) if Path(path).exists() else {}
        _write(Path(path), entries | {digest(key): entry})
    return key


def remove_keys(path: str | os.PathLike[str], user: str | None) -> int:
    """Remove all keys of ``user``, or of operators (None), from the file at ``path``: how many there were."""
    with in_turns(Path(path)):
        entries = _read(Path(path))
        kept = {
            name: entry
            for name, entry in entries.items()
            if (not entry.get("operator") if user is None else entry.get("user") != user)
        }
        _write(Path(path), kept)
    return len(entries) - len(kept)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        entries = {entry["sha256"]: _checked(entry) for entry in found["keys"]}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = str(error) if isinstance(error, ValueError) else 'it is not {"keys": [{"sha256": ..., ...}, ...]}'
        raise ValueError(f"{path} must be a file of API keys as 'ttt keys add' writes it: {why}") from None
    return entries


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    user, operator = entry.get("user"), entry.get("operator", False)
    if not re.fullmatch("[0-9a-f]{64}", entry["sha256"]) or not isinstance(operator, bool):
        raise ValueError("sha256 must be 64 hexadecimal digits, and operator true or false")
    if operator == (user is not None) or (user is not None and not USER_ID.fullmatch(user)):
        raise ValueError("each key must have a user, or operator true")
    return {"operator": True} if operator else {"user": user}


def _write(path: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Replace the file in one step; only its owner may read it."""
    keys = [{"sha256": name, **entry} for name, entry in entries.items()]
    write_atomically(path, json.dumps({"keys": keys}, indent=1).encode())
