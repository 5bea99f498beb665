"""Real text that every machine with Python and torch has, so that the demo needs no network.

* Python: the sources of the standard library. The demo model was trained on them, except for the modules in
  `HELD_OUT`, on which forgetting is measured.
* ``english``: the Python reference in ``pydoc_data.topics``.
* ``headers``: the C++ headers in the torch package.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path

__all__ = ["DOMAINS", "HELD_OUT", "held_out_python", "stream_of", "training_python"]

HELD_OUT = (
    "argparse.py",
    "bisect.py",
    "calendar.py",
    "configparser.py",
    "csv.py",
    "fractions.py",
    "heapq.py",
    "logging/handlers.py",
    "mailbox.py",
    "shelve.py",
    "tarfile.py",
    "textwrap.py",
    "wsgiref/handlers.py",
    "zipapp.py",
)
"""Modules that the demo model was not trained on: paths below the folder of the standard library."""

# Tests and tables are most of the bytes of the standard library, and unlike the code that people write. ``pydoc_data``
# is the domain "english", which the model must not be trained on.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__", "_pyrepl"}
)
_SEPARATOR = b"\n\0"


def _stdlib_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if _SKIPPED_FOLDERS.isdisjoint(name.split("/")[:-1]):
            files.append((name, path))
    return files


def training_python() -> bytes:
    """The standard library's sources without `HELD_OUT`, joined by a zero byte."""
    return _SEPARATOR.join(path.read_bytes() for name, path in _stdlib_files() if name not in HELD_OUT)


def held_out_python() -> bytes:
    """The sources of the modules in `HELD_OUT`, joined by a zero byte."""
    return _SEPARATOR.join(path.read_bytes() for name, path in _stdlib_files() if name in HELD_OUT)


def _english() -> bytes:
    from pydoc_data.topics import topics

    return _SEPARATOR.join(topics[name].encode() for name in sorted(topics))


def _headers() -> bytes:
    # Found without importing torch: only its folder is needed.
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the domain 'headers' reads the C++ headers of the torch package; torch is missing")
    root = Path(spec.origin).parent / "include" / "c10"
    files = sorted(root.rglob("*.h"))
    if not files:
        raise FileNotFoundError(f"no C++ headers under {root}; this torch package was installed without them")
    return _SEPARATOR.join(path.read_bytes() for path in files)


DOMAINS = {"english": _english, "headers": _headers}
"""Domains that the demo model was not trained on: name -> function that returns the bytes."""


def stream_of(domain: str) -> bytes:
    """The bytes of a domain in `DOMAINS`.

    Raises:
        ValueError: if ``domain`` is not one of `DOMAINS`.
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain must be one of {sorted(DOMAINS)}, got {domain!r}")
    return DOMAINS[domain]()
