"""Blobs in a folder of this machine."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

from ttt.files import make_folder, sync_folder, write_atomically
from ttt.store.blobs import BlobFile, Blobs, folder_path


class LocalBlobs(Blobs):
    """Blobs in a folder; files are flushed to the disk, named in one step, and the folder is flushed.

    All methods raise OSError once ``root`` was removed, replaced or unmounted: a blob must not be written to a folder
    that takes its place, and a blob that cannot be reached must not pass for a missing one.

    Args:
        create: make the folder if it does not exist.

    Raises:
        OSError: if the folder cannot be made, or does not exist and ``create`` is False.
    """

    def __init__(self, root: Path, create: bool = True) -> None:
        self.root = root.absolute()
        if create:
            make_folder(self.root)
        elif not self.root.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the folder of the blobs does not exist", str(self.root))
        self._close_root: weakref.finalize | None = None
        self._require_root()

    def _require_root(self) -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if os.path.samestat(os.stat(self._open_root()), os.stat(self.root)):
                return
        message = "the folder of the blobs was removed or replaced since the store was opened"
        raise OSError(errno.ESTALE, message, str(self.root))

    def _open_root(self) -> int | Path:
        """A handle of the root, on systems that have one of folders; it is opened if need be.

        It stays open, because some file systems (FUSE) may give a folder that is not open another inode number.
        """
        if os.name != "posix":
            return self.root
        if self._close_root is None or not self._close_root.alive:
            self._root_handle = os.open(self.root, os.O_RDONLY)
            self._close_root = weakref.finalize(self, os.close, self._root_handle)
        return self._root_handle

    def close(self) -> None:
        if self._close_root is not None:
            self._close_root()

    def check_in_place(self) -> None:
        self._require_root()

    def write(self, key: str, data: bytes) -> None:
        self._require_root()
        path = self.root / key
        make_folder(path.parent)
        write_atomically(path, data)

    def read(self, key: str) -> bytes:
        try:
            return (self.root / key).read_bytes()
        except FileNotFoundError:
            self._require_root()
            raise

    def size(self, key: str) -> int | None:
        try:
            return (self.root / key).stat().st_size
        except FileNotFoundError:
            self._require_root()
            return None

    def remove(self, key: str) -> None:
        self._require_root()
        (self.root / key).unlink(missing_ok=True)

    def remove_folder(self, folder: str) -> None:
        self._require_root()
        path = self.root / folder_path(folder)
        failures: list[OSError] = []
        try:
            entries = list(os.scandir(path))
        except FileNotFoundError:
            return
        for entry in entries:
            try:
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_dir(follow_symlinks=False):
                        shutil.rmtree(entry.path)
                    else:
                        os.unlink(entry.path)
            except OSError as error:
                failures.append(error)
        if failures:
            remaining = f"{len(failures)} of {len(entries)} files remain: {failures[0]}"
            raise OSError(failures[0].errno, remaining, str(path))
        with contextlib.suppress(FileNotFoundError):
            path.rmdir()
        sync_folder(path.parent)

    def list_files(self, folder: str) -> list[BlobFile]:
        self._require_root()
        files = []
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self.root / folder_path(folder)):
                with contextlib.suppress(FileNotFoundError):  # the temporary file of a write that was just completed
                    status = entry.stat()
                    files.append(BlobFile(f"{folder_path(folder)}/{entry.name}", status.st_size, status.st_mtime))
        return files

    def list_folders(self) -> Iterator[str]:
        self._require_root()
        yield from sorted(folder.name for folder in self.root.glob("??/*") if folder.is_dir())
