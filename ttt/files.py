"""Files and folders that survive a crash: written and flushed to the disk before they get their name."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_MARK = ".ttt-"  # in the names of temporary files
_YOUNG = 2.0  # seconds


def write_atomically(path: Path, data: bytes, *, sweep: bool = False) -> None:
    """Write ``data`` to ``path`` so that a crash leaves the old file or the new one, never a part.

    The bytes go to a temporary file in the same folder, are flushed to the disk, and get the name in one step.

    Args:
        sweep: also remove the temporary files that killed writers of ``path`` left there, which lists the folder.

    Raises:
        OSError: if that fails; its ``filename`` is ``path``. A failed flush is not repeated: the system may have
            dropped the pages.
    """
    with errors_naming(path):
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, f"the folder {str(path.parent)!r} does not exist")
        prefix = f".{path.name[:48]}{_MARK}"
        if sweep:
            _sweep(path.parent, prefix)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=prefix)
        try:
            with os.fdopen(handle, "wb") as file:
                if not _locked(file):
                    raise OSError(errno.EAGAIN, "the temporary file is locked by another process")
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)  # the new name must reach the disk as well


def _sweep(folder: Path, prefix: str) -> None:
    """Remove temporary files that a killed writer left in ``folder``; one that is being written is locked."""
    if fcntl is None:
        return
    for found in folder.glob(f"{glob.escape(prefix)}*"):
        with contextlib.suppress(OSError), open(found, "rb") as file:
            # One that was made just now may not be locked yet.
            if time.time() - os.fstat(file.fileno()).st_mtime > _YOUNG and _locked(file):
                found.unlink(missing_ok=True)


def _locked(file: IO[bytes]) -> bool:
    """Lock ``file`` until it is closed, or its process ends; False if another process has locked it."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
    return True


@contextlib.contextmanager
def in_turns(path: Path) -> Iterator[None]:
    """Inside, no other process is that changes the file at ``path`` inside of this; beside it stands a file to lock.

    Without locks (Windows, some file systems) there are no turns.
    """
    with errors_naming(path), open(path.parent / f".{path.name}.lock", "ab") as file:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def errors_naming(path: Path) -> Iterator[None]:
    """An OSError inside becomes one that names ``path``, not a temporary file that the caller does not know."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename == str(path):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_folder(folder: Path) -> None:
    """Flush the names in ``folder`` to the disk, if the system can do so (POSIX)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make ``folder`` and its parents, accessible to this user only, and flush each new name to the disk.

    Raises:
        NotADirectoryError: if there is a file of this name.
    """
    if folder.is_dir():
        return
    make_folder(folder.parent)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:  # another process may have made it
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file is there, and no folder", str(folder)) from None
    sync_folder(folder.parent)


def file_identity(path: Path) -> tuple[int, int] | None:
    """(device, inode) of the file or folder at ``path``; None if there is none. It differs once that is replaced."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino
