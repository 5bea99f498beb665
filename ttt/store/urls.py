"""From a store's URL to its index and blobs; `ttt.store.store.Store` documents the forms."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from ttt.files import make_folder
from ttt.store.blobs import Blobs
from ttt.store.errors import StorageFailure
from ttt.store.fsspec_blobs import FsspecBlobs
from ttt.store.index import Index
from ttt.store.local_blobs import LocalBlobs
from ttt.store.sqlite import SqliteIndex

FORMS = "a path, file:///path, sqlite:///index.db?blobs=URL or postgresql://host/database?blobs=URL"


def open_url(url: str, timeout: float, create: bool = True) -> tuple[Index, Blobs]:
    """The index and the blobs that ``url`` names.

    Args:
        create: make them if they do not exist.

    Raises:
        ValueError: if ``url`` has none of the forms.
        StorageFailure: if they cannot be opened, or do not exist.
        ImportError: if a package is missing.
    """
    try:
        index, blobs = _open_index(url, timeout, create)
        try:
            return index, open_blobs(blobs, create)
        except BaseException:
            index.close()
            raise
    except OSError as error:
        raise StorageFailure(f"{without_password(url)} cannot be opened: {error}") from error


def open_blobs(url: str, create: bool = True) -> Blobs:
    """`LocalBlobs` for a path or ``file://`` URL, `FsspecBlobs` for others.

    Args:
        create: make a folder that does not exist.

    Raises:
        ImportError: if the target's package is not installed.
        OSError: if the folder cannot be made, or does not exist.
    """
    if "://" not in url:
        return LocalBlobs(Path(url), create)
    parts = urlsplit(url)
    if parts.scheme == "file":
        return LocalBlobs(Path(unquote(parts.path)), create)
    return FsspecBlobs(url)


def without_password(url: str) -> str:
    """``url`` without the password in it."""
    head, found, tail = url.partition("@")
    scheme, colon, name = head.partition("://")
    return f"{scheme}://{name.partition(':')[0]}@{tail}" if found and colon else url


def _open_index(url: str, timeout: float, create: bool) -> tuple[Index, str]:
    """The index, and the URL of the blobs."""
    if "://" not in url:
        if not url:
            raise ValueError(f"url must be {FORMS}, got ''")
        return _in_folder(Path(url), timeout, create)
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    blobs = options.pop("blobs", None)
    if parts.scheme == "file" and not parts.netloc and not parts.query:
        return _in_folder(Path(unquote(parts.path)), timeout, create)
    if parts.scheme == "sqlite" and not parts.netloc and len(parts.path) > 1 and not options:
        path = Path(unquote(parts.path[1:]))
        return _index_in_file(path, timeout, create), blobs or str(path.parent / "blobs")
    if parts.scheme in ("postgresql", "postgres") and blobs:
        from ttt.store.postgres import PostgresIndex

        conninfo = urlunsplit(parts._replace(query=urlencode(options, quote_via=quote)))
        return PostgresIndex(conninfo, timeout, create), blobs
    raise ValueError(f"url must be {FORMS}, got {without_password(url)!r}")


def _in_folder(folder: Path, timeout: float, create: bool) -> tuple[Index, str]:
    return _index_in_file(folder / "index.db", timeout, create), str(folder / "blobs")


def _index_in_file(path: Path, timeout: float, create: bool) -> Index:
    if create:
        make_folder(path.parent)
    elif not path.is_file():
        raise StorageFailure(f"there is no store at {path.parent}: {path} does not exist")
    return SqliteIndex(path, timeout, create=create)
