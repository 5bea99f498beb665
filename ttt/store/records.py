"""What the index returns: named tuples for leases, versions and users."""

from __future__ import annotations

from typing import NamedTuple


class Grant(NamedTuple):
    """The right to write a user's versions, as the index knows it; valid while ``token`` is the user's latest.

    Attributes:
        user: the user's id.
        row: primary key of the user's row.
        folder: name of the folder of the user's blobs.
        token: greater than the token of every lease before it.
        sweeps: how often garbage of this user had been collected when the index was last asked.
        expires: when others may take over: seconds since 1970, by the index's clock.
    """

    user: str
    row: int
    folder: str
    token: int
    sweeps: int
    expires: float


class Version(NamedTuple):
    """One version of a user's state.

    Attributes:
        number: 1, 2, ... for each user.
        created: seconds since 1970, by the index's clock.
        size, sha256: bytes of its blob, and their checksum in hexadecimal digits.
        key: name of its blob.
        source: the version that it repeats, if a rollback made it; else None.
    """

    number: int
    created: float
    size: int
    sha256: str
    key: str
    source: int | None


class User(NamedTuple):
    """A user that has at least one version.

    Attributes:
        name: the user's id.
        head: number of the newest version.
        versions, bytes: how many versions are stored, and the bytes of their blobs.
        updated: when the newest version was written; seconds since 1970.
        lease_expires: when the latest lease expires or expired; seconds since 1970.
    """

    name: str
    head: int
    versions: int
    bytes: int
    updated: float
    lease_expires: float


class UserRow(NamedTuple):
    """A user's row, as maintenance needs it; ``name`` is None while the user is being forgotten."""

    row: int
    name: str | None
    folder: str
    head: int
