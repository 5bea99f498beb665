"""Immutable blobs, each written once under a random name, in a folder for each user, the user's shelf.

A key is ``ab/<shelf>/<random>.safetensors``, with ``ab`` the shelf's first two digits. No name tells a user's id or a
blob's content: equal states of two users have different names. The index, not the name, holds the checksum.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from ttt.files import sync_folder, write_atomically

SUFFIX = ".safetensors"


class Found(NamedTuple):
    """A file on a shelf: ``modified`` in seconds since 1970, 0 where the target does not tell."""

    key: str
    size: int
    modified: float


def new_shelf() -> str:
    """A random name for a user's folder, 32 hexadecimal digits."""
    return secrets.token_hex(16)


def new_key(shelf: str) -> str:
    """A random key on ``shelf``."""
    return f"{_folder_of(shelf)}/{secrets.token_hex(16)}{SUFFIX}"


def _folder_of(shelf: str) -> str:
    return f"{shelf[:2]}/{shelf}"


class Blobs(ABC):
    """Where blobs are kept. All methods raise OSError where the target fails."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Keep ``data`` for good: on return it survives a crash of the machine, as far as the target promises it."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The bytes; FileNotFoundError if there are none."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Bytes of the blob; None if there is none."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Delete the blob, if it is there."""

    @abstractmethod
    def remove_shelf(self, shelf: str) -> None:
        """Delete all that stands on the shelf, finished or not."""

    @abstractmethod
    def on(self, shelf: str) -> list[Found]:
        """All files of one shelf, those of interrupted writes too."""

    @abstractmethod
    def shelves(self) -> Iterator[str]:
        """The names of all shelves that hold something."""


class LocalBlobs(Blobs):
    """In a folder of this machine; files are flushed to the disk, named in one step, and the folder is flushed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        make_folder(root)

    def write(self, key: str, data: bytes) -> None:
        path = self.root / key
        make_folder(path.parent)
        write_atomically(path, data)

    def read(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def size(self, key: str) -> int | None:
        try:
            return (self.root / key).stat().st_size
        except FileNotFoundError:
            return None

    def remove(self, key: str) -> None:
        (self.root / key).unlink(missing_ok=True)

    def remove_shelf(self, shelf: str) -> None:
        folder = self.root / _folder_of(shelf)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)
            sync_folder(folder.parent)

    def on(self, shelf: str) -> list[Found]:
        found = []
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self.root / _folder_of(shelf)):
                with contextlib.suppress(FileNotFoundError):  # a write in progress got its name
                    status = entry.stat()
                    found.append(Found(f"{_folder_of(shelf)}/{entry.name}", status.st_size, status.st_mtime))
        return found

    def shelves(self) -> Iterator[str]:
        yield from sorted(folder.name for folder in self.root.glob("??/*") if folder.is_dir())


class FsspecBlobs(Blobs):
    """On any fsspec target (``s3://bucket/prefix``, ...). Needs ``pip install 'ttt[store]'`` and the target's package.

    A blob that is torn by a crash is one that the index does not name yet, so no rename is needed. How durable a
    written blob is, is the target's promise. A bucket that keeps old versions of objects keeps forgotten users, too.

    Raises:
        ImportError: without fsspec, or without the package of this target.
    """

    def __init__(self, url: str) -> None:
        try:
            import fsspec
        except ImportError as error:
            raise ImportError(f"{url} needs fsspec (pip install 'ttt[store]'): {error}") from error
        self.fs, root = fsspec.core.url_to_fs(url)
        self.root = root.rstrip("/")

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}"

    def write(self, key: str, data: bytes) -> None:
        path = self._path(key)
        self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        self.fs.pipe_file(path, data)

    def read(self, key: str) -> bytes:
        return self.fs.cat_file(self._path(key))

    def size(self, key: str) -> int | None:
        self.fs.invalidate_cache()  # another process may have written or removed it
        try:
            return self.fs.info(self._path(key))["size"]
        except FileNotFoundError:
            return None

    def remove(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._path(key))

    def remove_shelf(self, shelf: str) -> None:
        self.fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(self._path(_folder_of(shelf)), recursive=True)

    def on(self, shelf: str) -> list[Found]:
        self.fs.invalidate_cache()
        try:
            files = self.fs.find(self._path(_folder_of(shelf)), detail=True)
        except FileNotFoundError:
            return []
        names = ((path.rpartition("/")[2], about) for path, about in files.items())
        return [Found(f"{_folder_of(shelf)}/{name}", about["size"], _modified(about)) for name, about in names]

    def shelves(self) -> Iterator[str]:
        self.fs.invalidate_cache()
        try:
            paths = self.fs.find(self.root)
        except FileNotFoundError:
            return
        yield from sorted({path.split("/")[-2] for path in paths})


def open_blobs(url: str) -> Blobs:
    """`LocalBlobs` for a path or ``file://`` URL, `FsspecBlobs` for others.

    Raises:
        ImportError: if the target's package is not installed.
        OSError: if the folder cannot be made.
    """
    if "://" not in url:
        return LocalBlobs(Path(url))
    parts = urlsplit(url)
    if parts.scheme == "file":
        return LocalBlobs(Path(unquote(parts.path)))
    return FsspecBlobs(url)


def make_folder(folder: Path) -> None:
    """Make ``folder`` and its parents, for this user alone, and flush each new name to the disk."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    sync_folder(folder.parent)


def _modified(about: dict[str, Any]) -> float:
    for name in ("mtime", "LastModified", "last_modified", "modified", "updated", "created"):
        value = about.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                return datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp()
    return 0.0
