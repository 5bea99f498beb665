"""The texts of the suite "streams", each from an installed package, so that other machines read the same.

``python -m bench.learning.language.texts FOLDER`` writes them to files. Where the environment variable `SAVED` names
such a folder, they are read from there: on a machine without the packages, or with other versions of them.

Options and the package's defaults are chosen on `TUNING`, which is never reported.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import importlib.util
import os
import pydoc_data.topics
import re
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

TUNING = "french"
PAGES = 60  # manual pages of a language, in the order of their names
SHORTEST = 2000  # characters; a shorter page says where another one is
SAVED = "TTT_BENCH_TEXTS"
_LISTS = Path("/var/lib/dpkg/info")  # of Debian: the files of each package


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a text comes from.

    Attributes:
        what: the text in a few words.
        read: reads all of it.
        package: the Debian package that holds it; empty if it comes with Python or with a package that ttt requires.
    """

    what: str
    read: Callable[[], str]
    package: str = ""


def _files(package: str) -> list[Path]:
    """The files of a Debian package.

    The package's own list is read, not a folder: other packages install pages into the same folders.

    Raises:
        FileNotFoundError: if the package is not installed.
    """
    try:
        lines = (_LISTS / f"{package}.list").read_text().splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"the Debian package {package} is missing: apt install {package}") from None
    return sorted(Path(line) for line in lines)


def _file(package: str, end: str) -> Path:
    """The file of a Debian package whose path ends with ``end``.

    Raises:
        FileNotFoundError: if the package or this file of it is not installed.
    """
    for path in _files(package):
        if str(path).endswith(end) and path.is_file():
            return path
    raise FileNotFoundError(f"{end} of the Debian package {package} is missing: apt install --reinstall {package}")


def _unzipped(path: Path) -> str:
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        return file.read()


def _manual(package: str) -> str:
    """The first long manual pages of section 1, without their markup."""
    pages = [path for path in _files(package) if path.parent.name == "man1" and path.suffix == ".gz"]
    found = []
    for path in pages[:PAGES]:
        if not path.is_file():  # Debian can be told to leave manual pages out
            raise FileNotFoundError(f"{path.name} of {package} is missing: apt install --reinstall {package}")
        if len(page := _unzipped(path)) >= SHORTEST:
            found.append(_without_markup(page))
    return "\n\n".join(found)


def _without_markup(page: str) -> str:
    """A manual page without comments, fonts and the names of macros."""
    lines = [line for line in page.split("\n") if not line.startswith(("'\\\"", '.\\"', ".so"))]
    text = re.sub(r"\\f[BIRP]", "", "\n".join(lines)).replace("\\-", "-").replace("\\&", "")
    return re.sub(r"^\.[A-Za-z]+ ?", "", text, flags=re.M)


def _headers() -> str:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package torch is missing: pip install torch")
    return (Path(spec.origin).parent / "include/ATen/core/ivalue.h").read_text(encoding="utf-8")


def _held(name: str, make: Callable[[], str]) -> str:
    """The text in the file ``name`` of the folder that `SAVED` names, or what ``make`` makes where it names none."""
    folder = os.environ.get(SAVED)
    if not folder:
        return make()
    path = Path(folder) / f"{name}.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, and {SAVED} is {folder!r}")
    return path.read_bytes().decode()


@functools.cache
def english() -> str:
    """The reference of Python's language, from ``pydoc_data``: prose of a kind that a language model knows."""
    return _held("english", _english)


def _english() -> str:
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


# Characters of `english`, so far apart that no text reaches the next one: what is kept is measured at its beginning.
KNOWN, SHUFFLED, REPEATED = 100_000, 200_000, 300_000

SOURCES: dict[str, Source] = {
    "french": Source("French manual pages", lambda: _manual("manpages-fr"), "manpages-fr"),
    "german": Source("German manual pages", lambda: _manual("manpages-de"), "manpages-de"),
    # After its table of contents.
    "policy": Source(
        "Debian's policy", lambda: _unzipped(_file("debian-policy", "/policy.txt.gz"))[20_000:], "debian-policy"
    ),
    "headers": Source("a C++ header of torch", _headers),
    "python": Source("Python's tarfile.py", lambda: Path(tarfile.__file__).read_text(encoding="utf-8")),
    "prose": Source(
        "quotations from literature",
        lambda: _file("fortunes-min", "/literature").read_text(encoding="utf-8", errors="replace"),
        "fortunes-min",
    ),
    "tables": Source(
        "the table of time zones",
        lambda: _file("tzdata", "/zone1970.tab").read_text(encoding="utf-8"),
        "tzdata",
    ),
    "known": Source("English that the model knows", lambda: english()[KNOWN:SHUFFLED]),
}
"""Name -> source. `REPORTED` are those that results are reported on."""

REPORTED = tuple(name for name in SOURCES if name != TUNING)
AS_GENERAL = "known"
"""The text of the kind on which the divergence from the frozen model is measured."""


@functools.cache
def read(name: str) -> str:
    """The text ``name``.

    Raises:
        ValueError: for an unknown name.
        FileNotFoundError: if the package that holds it is not installed; it says which one.
    """
    if name not in SOURCES:
        raise ValueError(f"text must be one of {list(SOURCES)}, got {name!r}")
    try:
        return SOURCES[name].read() if name == AS_GENERAL else _held(name, SOURCES[name].read)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the text {name!r} ({SOURCES[name].what}) cannot be read: {error}") from None


def save(folder: Path) -> None:
    """Write all texts to files in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {"english": english(), **{name: read(name) for name in SOURCES if name != AS_GENERAL}}
    for name, text in found.items():
        (folder / f"{name}.txt").write_bytes(text.encode())


if __name__ == "__main__":
    save(Path(sys.argv[1]))
