"""Files and folders that survive a crash: written and flushed to the disk before they get their name."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a crash leaves the old file or the new one, never a part.

    The bytes go to a temporary file in the same folder, are flushed to the disk, and get the name in one step.

    Raises:
        OSError: if that fails; its ``filename`` is ``path``. A failed flush is not repeated: the system may have
            dropped the pages.
    """
    with errors_naming(path):
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, f"the folder {str(path.parent)!r} does not exist")
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:48]}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)  # the new name must reach the disk as well


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
    """Make ``folder`` and its parents, accessible to this user only, and flush each new name to the disk."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    sync_folder(folder.parent)


def file_identity(path: Path) -> tuple[int, int] | None:
    """(device, inode) of the file or folder at ``path``; None if there is none. It differs once that is replaced."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino
