"""Checks of stored states: of one version as it is read, and of all."""

from __future__ import annotations

import errno
import hashlib
from typing import Any, NamedTuple

from torch import Tensor

from ttt.store.blobs import BlobFile, Blobs
from ttt.store.errors import StorageFailure, blobs_failure
from ttt.store.index import Index
from ttt.store.records import Version
from ttt.store.serialization import decode


class Damage(ValueError):
    """A blob is missing, torn or altered, or the disk cannot read it; the message says which."""


class Broken(NamedTuple):
    """A version whose state cannot be served, and why."""

    user: str
    version: int
    reason: str


class Report(NamedTuple):
    """What `Store.verify` found.

    Attributes:
        versions, blobs: how many were looked at.
        damaged: versions whose blob is missing or not what was put.
        orphans: files that no version names: of a write in progress, or left by a crash. They are harmless.
        unreadable: versions whose blob could not be read, which does not mean that it is damaged.
        unlisted: folders whose files could not be listed, and why.
        journal: how the index makes its commits durable, see `Store.journal`.
    """

    versions: int
    blobs: int
    damaged: list[Broken]
    orphans: list[BlobFile]
    unreadable: list[Broken]
    unlisted: list[str]
    journal: str

    @property
    def sound(self) -> bool:
        """Whether every version was read and can be served, and every folder was listed."""
        return not (self.damaged or self.unreadable or self.unlisted)


def read_version(blobs: Blobs, version: Version) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, meta) of a version.

    Raises:
        Damage: if its blob is not what was put.
        StorageFailure: if the target is out of reach, which tells nothing about the blob.
    """
    try:
        data = blobs.read(version.key)
    except FileNotFoundError:
        raise Damage("its blob is missing") from None
    except OSError as error:
        if error.errno == errno.EIO:
            raise Damage(f"its blob cannot be read ({error})") from error
        raise blobs_failure("the blobs are out of reach", error) from error
    if len(data) != version.size:
        raise Damage(f"its blob has {len(data)} bytes, not {version.size}")
    if hashlib.sha256(data).hexdigest() != version.sha256:
        raise Damage("its blob was altered: the checksum differs")
    try:
        return decode(data)
    except ValueError as error:
        raise Damage(f"its blob is {error}") from error


def verify(index: Index, blobs: Blobs) -> Report:
    """Read every blob that a version names, and list all files; see `Store.verify`."""
    files, unlisted = [], []
    for folder in blobs.list_folders():  # before the index is read, as in `maintenance.collect`
        try:
            files += blobs.list_files(folder)
        except OSError as error:
            unlisted.append(f"{folder}: {error}")
    versions = index.all_versions()
    problems: dict[str, Damage | StorageFailure | None] = {}
    for _, version in versions:
        if version.key not in problems:
            problems[version.key] = _problem_of(blobs, version)
    affected = {user for user, version in versions if problems[version.key] is not None}
    # Versions that were removed since they were listed are no problem.
    kept = {(user, version.number, version.key) for user in affected for version in index.versions(user, True)}
    damaged: list[Broken] = []
    unreadable: list[Broken] = []
    for user, version in versions:
        problem = problems[version.key]
        if problem is not None and (user, version.number, version.key) in kept:
            found = damaged if isinstance(problem, Damage) else unreadable
            found.append(Broken(user, version.number, str(problem)))
    orphans = [file for file in files if file.key not in problems]
    return Report(len(versions), len(problems), damaged, orphans, unreadable, unlisted, index.journal)


def _problem_of(blobs: Blobs, version: Version) -> Damage | StorageFailure | None:
    try:
        read_version(blobs, version)
    except (Damage, StorageFailure) as problem:
        return problem
    return None
