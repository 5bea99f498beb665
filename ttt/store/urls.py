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


def open_url(url: str, timeout: float) -> tuple[Index, Blobs]:
    """The index and the blobs that ``url`` names, made if they do not exist.

    Raises:
        ValueError: if ``url`` has none of the forms.
        StorageFailure: if they cannot be opened.
        ImportError: if a package is missing.
    """
    try:
        return _open(url, timeout)
    except OSError as error:
        raise StorageFailure(f"{without_password(url)} cannot be opened: {error}") from error


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


def without_password(url: str) -> str:
    """``url`` without the password in it."""
    head, found, tail = url.partition("@")
    scheme, colon, name = head.partition("://")
    return f"{scheme}://{name.partition(':')[0]}@{tail}" if found and colon else url


def _open(url: str, timeout: float) -> tuple[Index, Blobs]:
    if "://" not in url:
        if not url:
            raise ValueError(f"url must be {FORMS}, got ''")
        return _in_folder(Path(url), timeout)
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    blobs = options.pop("blobs", None)
    if parts.scheme == "file" and not parts.netloc and not parts.query:
        return _in_folder(Path(unquote(parts.path)), timeout)
    if parts.scheme == "sqlite" and not parts.netloc and len(parts.path) > 1 and not options:
        path = Path(unquote(parts.path[1:]))
        make_folder(path.parent)
        return SqliteIndex(path, timeout), open_blobs(blobs or str(path.parent / "blobs"))
    if parts.scheme in ("postgresql", "postgres") and blobs:
        from ttt.store.postgres import PostgresIndex

        conninfo = urlunsplit(parts._replace(query=urlencode(options, quote_via=quote)))
        return PostgresIndex(conninfo, timeout), open_blobs(blobs)
    raise ValueError(f"url must be {FORMS}, got {without_password(url)!r}")


def _in_folder(folder: Path, timeout: float) -> tuple[Index, Blobs]:
    make_folder(folder)
    return SqliteIndex(folder / "index.db", timeout), open_blobs(str(folder / "blobs"))
