"""Real text that is on every machine with Python and torch: no network is needed.

Three domains, each a list of (name, bytes):

* ``python``: the standard library's own sources. The demo model is trained on them, without the
  modules named in `HELD_OUT`, which measure forgetting.
* ``english``: the Python reference text of ``pydoc_data.topics``.
* ``headers``: the C++ headers that ship inside the torch package.
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
"""Standard-library modules that the demo model never saw, by path below the stdlib folder."""

# Tests and tables are most of the bytes of the standard library and the least like the code people
# write; the reference text is the demo's other domain and must not be trained on.
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
    # Found without importing torch: the folder is all that is wanted.
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the domain 'headers' reads the C++ headers of the torch package; torch is missing")
    root = Path(spec.origin).parent / "include" / "c10"
    files = sorted(root.rglob("*.h"))
    if not files:
        raise FileNotFoundError(f"no C++ headers under {root}; this torch package was installed without them")
    return _SEPARATOR.join(path.read_bytes() for path in files)


DOMAINS = {"english": _english, "headers": _headers}
"""Name -> function that returns the bytes of a domain the demo model was not trained on."""


def stream_of(domain: str) -> bytes:
    """The bytes of a domain in `DOMAINS`, in their natural order.

    Raises:
        ValueError: if ``domain`` is not one of `DOMAINS`.
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain must be one of {sorted(DOMAINS)}, got {domain!r}")
    return DOMAINS[domain]()
