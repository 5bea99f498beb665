"""Blobs on any target of fsspec: buckets and many others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from ttt.installing import how_to_install
from ttt.store.blobs import BlobFile, Blobs, folder_path


class FsspecBlobs(Blobs):
    """Blobs on an fsspec target (``s3://bucket/prefix``, ...). Needs the extra ``store`` and the target's package.

    Blobs are written without a rename: one that a crash tears is never named by the index. The target decides how
    durable a written blob is. A bucket that keeps old versions of objects keeps those of forgotten users, too.

    Raises:
        ImportError: without fsspec, or without the package of this target.
    """

    def __init__(self, url: str) -> None:
        try:
            import fsspec
        except ImportError as error:
            raise ImportError(f"{url} needs fsspec ({how_to_install('store')}): {error}") from error
        self.fs, root = fsspec.core.url_to_fs(url)
        self.root = root.rstrip("/")

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}"

    def close(self) -> None:
        """Does nothing: fsspec shares and closes its connections itself."""

    def write(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with _as_oserror():
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.fs.pipe_file(path, data)

    def read(self, key: str) -> bytes:
        with _as_oserror():
            return self.fs.cat_file(self._path(key))

    def size(self, key: str) -> int | None:
        with _as_oserror():
            self.fs.invalidate_cache()  # another process may have written or removed it
            try:
                return self.fs.info(self._path(key))["size"]
            except FileNotFoundError:
                return None

    def remove(self, key: str) -> None:
        with _as_oserror(), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._path(key))

    def check_in_place(self) -> None:
        """Does nothing: of a remote target only a request could tell."""

    def remove_folder(self, folder: str) -> None:
        with _as_oserror(), contextlib.suppress(FileNotFoundError):
            self.fs.invalidate_cache()
            self.fs.rm(self._path(folder_path(folder)), recursive=True)

    def list_files(self, folder: str) -> list[BlobFile]:
        with _as_oserror():
            self.fs.invalidate_cache()
            try:
                files = self.fs.find(self._path(folder_path(folder)), detail=True)
            except FileNotFoundError:
                return []
            names = ((path.rpartition("/")[2], details) for path, details in files.items())
            return [BlobFile(f"{folder_path(folder)}/{name}", d["size"], _modified(d)) for name, d in names]

    def list_folders(self) -> Iterator[str]:
        with _as_oserror():
            self.fs.invalidate_cache()
            try:
                paths = self.fs.find(self.root)
            except FileNotFoundError:
                return
        yield from sorted({path.split("/")[-2] for path in paths})


@contextlib.contextmanager
def _as_oserror() -> Iterator[None]:
    """Raise the errors of a target's own package as OSError: not all of them are."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _modified(details: dict[str, Any]) -> float:
    """When a file was last written, in seconds since 1970, under whichever name the target gives it; else 0."""
    for name in ("mtime", "LastModified", "last_modified", "modified", "updated", "created"):
        value = details.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                return datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp()
    return 0.0
