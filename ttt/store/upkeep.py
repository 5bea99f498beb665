"""Retention, garbage collection, verification and forgetting: what goes over a whole store."""

from __future__ import annotations

import time
from typing import NamedTuple

from ttt.store.blobs import Blobs, Found
from ttt.store.errors import UnknownUser
from ttt.store.fetch import Damage, fetch
from ttt.store.index import Index


class Collected(NamedTuple):
    """What `collect` removed: ``versions`` past retention, ``users`` that never wrote, ``blobs`` and ``bytes``."""

    versions: int
    users: int
    blobs: int
    bytes: int


class Broken(NamedTuple):
    """A version whose state cannot be served, and why."""

    user: str
    version: int
    reason: str


class Report(NamedTuple):
    """What `verify` found: ``versions`` and ``blobs`` looked at, those ``damaged``, and ``orphans``.

    Orphans are files that no version names: of a write in progress, or left by a crash, and harmless.
    """

    versions: int
    blobs: int
    damaged: list[Broken]
    orphans: list[Found]

    @property
    def sound(self) -> bool:
        """Every version can be served."""
        return not self.damaged


def collect(index: Index, blobs: Blobs, keep_last: int, keep_seconds: float, grace: float) -> Collected:
    """Drop versions past retention, then remove what no version names; see `Store.gc`."""
    removed = finish_forgetting(index, blobs)
    # Listed before the index is read: a user made in between has no shelf here that could be taken for garbage.
    shelves = list(blobs.shelves())
    versions = index.prune(keep_last, keep_seconds)
    rows = index.rows()
    known = {row.shelf for row in rows}
    for shelf in shelves:
        if shelf not in known:  # of a forgotten user: a write that came too late
            removed += blobs.on(shelf)
            blobs.remove_shelf(shelf)
    oldest = time.time() - grace
    for row in rows:
        old = [found for found in blobs.on(row.shelf) if found.modified <= oldest]
        if old:
            with index.referenced(row.row) as keys:
                garbage = [found for found in old if found.key not in keys]
                for found in garbage:
                    blobs.remove(found.key)
            removed += garbage
    users = sum(index.detach(row.name, grace) for row in rows if row.name is not None and not row.head)
    removed += finish_forgetting(index, blobs)
    return Collected(versions, users, len(removed), sum(found.size for found in removed))


def forget(index: Index, blobs: Blobs, user: str) -> None:
    """Remove a user; see `Store.forget`."""
    known = index.detach(user)
    finish_forgetting(index, blobs)
    index.scrub()
    if not known:
        raise UnknownUser(f"the store holds nothing of {user!r}")


def finish_forgetting(index: Index, blobs: Blobs) -> list[Found]:
    """Empty the shelves of detached users, those of a `forget` that was interrupted too; the files removed."""
    removed: list[Found] = []
    for row in index.rows():
        if row.name is None:
            removed += blobs.on(row.shelf)
            blobs.remove_shelf(row.shelf)
            index.drop(row.row)
    return removed


def verify(index: Index, blobs: Blobs) -> Report:
    """Read every blob that a version names, and list all files; see `Store.verify`."""
    files = [found for shelf in blobs.shelves() for found in blobs.on(shelf)]  # before the index: see `collect`
    everything = index.everything()
    checked: dict[str, str | None] = {}
    damaged = []
    for user, version in everything:
        if version.key not in checked:
            checked[version.key] = _damage_of(blobs, version)
        reason = checked[version.key]
        if reason is not None and version in index.versions(
            user, missing_ok=True
        ):  # it may be gone since it was listed
            damaged.append(Broken(user, version.number, reason))
    orphans = [found for found in files if found.key not in checked]
    return Report(len(everything), len(checked), damaged, orphans)


def _damage_of(blobs: Blobs, version) -> str | None:
    try:
        fetch(blobs, version)
    except Damage as damage:
        return str(damage)
    return None
