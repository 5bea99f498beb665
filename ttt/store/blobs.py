"""Blobs: immutable files, each written once under a random name, in one folder for each user.

A key is ``ab/<folder>/<random>.safetensors``, where ``ab`` is the first two digits of the folder's name. Names reveal
neither a user's id nor a blob's content: equal states of two users have different names. The checksum is in the index,
not in the name.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

SUFFIX = ".safetensors"


class BlobFile(NamedTuple):
    """A file in a user's folder: its key, its bytes, and seconds since 1970 (0 if the target does not tell them)."""

    key: str
    size: int
    modified: float


def new_folder_name() -> str:
    """A random name for a user's folder, 32 hexadecimal digits."""
    return secrets.token_hex(16)


def folder_path(folder: str) -> str:
    """The path of a user's folder, relative to the root of the blobs."""
    return f"{folder[:2]}/{folder}"


def new_key(folder: str) -> str:
    """A random key in a user's folder."""
    return f"{folder_path(folder)}/{secrets.token_hex(16)}{SUFFIX}"


class Blobs(ABC):
    """A place for blobs. All methods raise OSError if the target fails."""

    @abstractmethod
    def close(self) -> None:
        """Free what an open target holds on to; the next call opens it again."""

    @abstractmethod
    def check_in_place(self) -> None:
        """Raise OSError if the target is known to be another one than when it was opened."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Write ``data`` durably: on return it survives a crash of the machine, as far as the target promises it."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The bytes of a blob; FileNotFoundError if it does not exist."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """The number of bytes of a blob; None if it does not exist."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Delete a blob, if it exists."""

    @abstractmethod
    def remove_folder(self, folder: str) -> None:
        """Delete all files of a user's folder, those of interrupted writes too.

        Raises:
            OSError: if some could not be deleted; all others have been.
        """

    @abstractmethod
    def list_files(self, folder: str) -> list[BlobFile]:
        """All files of a user's folder, those of interrupted writes too; none if it does not exist."""

    @abstractmethod
    def list_folders(self) -> Iterator[str]:
        """The names of all users' folders that hold something."""
