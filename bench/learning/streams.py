"""The text suite's streams: eight kinds of text that are on any machine with the `benchmark` extra.

The demo model was trained on none of them. They differ between machines with the versions installed, so each run
records how many bytes of a kind it found, and a hash of those it read.

* ``english``: Python's reference text, ``pydoc_data.topics``.
* ``html``: pages that pydoc makes of modules that are mostly C, whose docstrings are in no Python file.
* ``rst``: scikit-learn's descriptions of data sets, then its docstrings.
* ``licences``: of the installed packages, each text once (many differ from another in a few words).
* ``headers`` (C++, second half) and ``javascript``: options are tuned on them, and on nothing else; but for methods
  that say so, on ``readmes`` of the installed packages and ``docs`` (torch's docstrings), too.

The last fifth of each is never streamed: there a model is tested on what it has read.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import pydoc
import re
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ttt.demo import text as texts
from ttt.demo.model import CONTEXT, as_ids, windows

REPORTED = ("english", "html", "rst", "licences")
TUNING = ("headers", "javascript", "readmes", "docs")
SCENARIOS = (*(f"adapt-{domain}" for domain in REPORTED), "recurring")
TUNED_ON = "tuning"
"""The scenario that options are chosen in: seeds 1000, 1001, ... read the kinds of `TUNING` in turn."""

SWEPT = ("adapt-english", "adapt-rst")  # whose trade-off curves are drawn: prose and markup
ADAPT, SEGMENT, SEARCH = 12288, 6144, 8192  # bytes; multiples of CONTEXT
HELD_WINDOWS = 4
MINIMUM = 60_000
_HELD = 5  # one part in so many
_SEPARATOR = b"\n\0"
_PAGES = ("array", "bz2", "datetime", "decimal", "functools", "hashlib", "io", "itertools", "math", "mmap", "select",
          "sqlite3", "zlib")  # fmt: skip


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the package {name} is missing: pip install 'ttt[bench]'")
    return Path(spec.origin).parent


def _joined(files: Iterable[Path]) -> bytes:
    return _SEPARATOR.join(path.read_bytes() for path in files)


def _html() -> bytes:
    pages = []
    for name in _PAGES:
        html = pydoc.HTMLDoc()
        try:
            module = importlib.import_module(name)
        except ImportError:  # Python can be built without some of them
            continue
        page = html.page(name, html.document(module))
        page = re.sub(r'<a href="file:[^>]*>[^<]*</a>', "", page)  # where Python is installed
        pages.append(re.sub(r"0x[0-9a-f]+", "0x", page).encode())
    return _SEPARATOR.join(pages)


def _docstrings(folder: Path) -> list[bytes]:
    parts = []
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                parts.append((ast.get_docstring(node) or "").encode())
    return parts


def _long(parts: Iterable[bytes]) -> bytes:
    """Each once, without the short ones."""
    return _SEPARATOR.join(part for part in dict.fromkeys(parts) if len(part) >= CONTEXT)


def _rst() -> bytes:
    root = _package("sklearn")
    parts = [path.read_bytes() for path in sorted((root / "datasets" / "descr").glob("*.rst"))]
    return _long(parts + _docstrings(root / "linear_model"))


def _docs() -> bytes:
    root = _package("torch")
    folders = ("nn/modules", "optim", "distributions", "utils/data")
    return _long(part for folder in folders for part in _docstrings(root / folder))


def _distributions() -> list[tuple[str, importlib.metadata.Distribution]]:
    """The installed packages by name, each once."""
    return sorted({str(d.metadata["Name"]).lower(): d for d in importlib.metadata.distributions()}.items())


def _readmes() -> bytes:
    whole = [d.read_text("METADATA") or "" for name, d in _distributions() if name != "ttt"]
    return _long(text.partition("\n\n")[2].encode() for text in whole)  # without the fields above it


def _licences() -> bytes:
    found = [Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"]
    for _, package in _distributions():
        for file in sorted(package.files or (), key=str):
            name = file.name.lower()
            if ".dist-info" in str(file) and name.startswith(("license", "licence", "copying")):
                found.append(Path(str(file.locate())))
    parts = dict.fromkeys(path.read_bytes() for path in found if path.is_file())
    return _SEPARATOR.join(parts)


def _headers() -> bytes:
    data = texts.stream_of("headers")
    return data[len(data) // 2 :]


def _javascript() -> bytes:
    places = (("torch", "utils/model_dump"), ("matplotlib", "backends/web_backend"), ("sklearn", "utils"))
    folders = [_package(name) / folder for name, folder in places]
    return _joined(path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix in (".js", ".mjs"))


_SOURCES: dict[str, Callable[[], bytes]] = {
    "english": lambda: texts.stream_of("english"), "html": _html, "rst": _rst, "licences": _licences,
    "headers": _headers, "javascript": _javascript, "readmes": _readmes, "docs": _docs,
}  # fmt: skip


@functools.cache
def read(domain: str) -> bytes:
    """All bytes of ``domain``.

    Raises:
        ValueError: for a domain that is none.
        FileNotFoundError: if this machine holds less than `MINIMUM` bytes of it.
    """
    if domain not in _SOURCES:
        raise ValueError(f"domain must be one of {list(_SOURCES)}, got {domain!r}")
    data = _SOURCES[domain]()
    if len(data) < MINIMUM:
        raise FileNotFoundError(f"{domain} must have at least {MINIMUM} bytes on this machine, got {len(data)}")
    return data


@functools.cache
def missing() -> dict[str, str]:
    """Domains that this machine has not enough of, and why."""
    found = {}
    for domain in _SOURCES:
        try:
            read(domain)
        except (ImportError, FileNotFoundError) as error:
            found[domain] = str(error)
    return found


def streamed(domain: str) -> bytes:
    """The part of ``domain`` that streams are cut from."""
    data = read(domain)
    return data[: len(data) - len(data) // _HELD]


def held_out(domain: str) -> Tensor:
    """(HELD_WINDOWS, CONTEXT) int64: windows of the part that is never streamed."""
    data = read(domain)
    return windows(data[len(data) - len(data) // _HELD :], HELD_WINDOWS)


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive text of one domain. ``ids`` (1, T + 1) int64: the first byte is only context."""

    domain: str
    ids: Tensor


@dataclasses.dataclass(frozen=True)
class Stream:
    """What a method reads.

    Attributes:
        segments: in order; no byte stands in two.
        other: (N, CONTEXT + 1) int64: as much text of the same domains, in none of the segments, for joint training.
    """

    segments: list[Segment]
    other: Tensor

    @property
    def domains(self) -> list[str]:
        """In order of their first segment."""
        return list(dict.fromkeys(segment.domain for segment in self.segments))

    def sources(self) -> dict[str, dict[str, int | str]]:
        """Domain -> how many ``bytes`` of it this machine holds, and ``sha256`` of those in the segments."""
        found: dict[str, dict[str, int | str]] = {}
        for domain in self.domains:
            seen = hashlib.sha256()
            for segment in self.segments:
                if segment.domain == domain:
                    seen.update(bytes(segment.ids[0].tolist()))
            found[domain] = {"bytes": len(read(domain)), "sha256": seen.hexdigest()[:16]}
        return found


def cut(data: bytes, lengths: Sequence[int], generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
    """Consecutive pieces of ``data`` from a random place, (1, length + 1) each, and as many bytes that follow them.

    Returns:
        The pieces, and (N, CONTEXT + 1) rows with N CONTEXT = the sum of ``lengths``.

    Raises:
        ValueError: if ``data`` is too short.
    """
    rows = sum(lengths) // CONTEXT
    need = sum(lengths) + len(lengths) + rows * (CONTEXT + 1)
    if len(data) < need:
        raise ValueError(f"data must hold at least {need} bytes, got {len(data)}")
    at = int(torch.randint(len(data) - need + 1, (1,), generator=generator))
    pieces = []
    for length in lengths:
        pieces.append(as_ids(data[at : at + length + 1]))
        at += length + 1
    return pieces, as_ids(data[at : at + rows * (CONTEXT + 1)]).view(rows, CONTEXT + 1)


def visits(count: int) -> list[int]:
    """The order in which ``count`` domains come and come back: A B A C B D C D for four. Each comes twice."""
    order = [0]
    for domain in range(1, count):
        order += [domain, domain - 1]
    return [*order, count - 1]


def stream(scenario: str, seed: int, *, tuning: bool = False) -> Stream:
    """The text of ``scenario`` for ``seed``, which draws the places it is cut from and the order of the domains.

    * ``adapt-DOMAIN``: `ADAPT` bytes of one domain.
    * ``recurring``: segments of `SEGMENT` bytes of all the reported domains, in the order of `visits`.
    * ``tuning``: `SEARCH` bytes of a domain that is not reported.

    Raises:
        ValueError: for an unknown scenario, or one that ``tuning`` does not fit.
    """
    allowed = (TUNED_ON,) if tuning else SCENARIOS
    if scenario not in allowed:
        raise ValueError(f"scenario must be one of {allowed} (tuning = {tuning}), got {scenario!r}")
    generator = torch.Generator().manual_seed(seed)
    if scenario == "recurring":
        domains = [d for d in REPORTED if d not in missing()]
        domains = [domains[i] for i in torch.randperm(len(domains), generator=generator)]
        lengths, order = [SEGMENT], [domains[i] for i in visits(len(domains))]
    else:
        domains = [TUNING[seed % len(TUNING)] if tuning else scenario.removeprefix("adapt-")]
        lengths, order = [SEARCH if tuning else ADAPT], domains
    cuts = {d: cut(streamed(d), lengths * order.count(d), generator) for d in domains}
    fresh = {d: iter(pieces) for d, (pieces, _) in cuts.items()}
    return Stream([Segment(d, next(fresh[d])) for d in order], torch.cat([other for _, other in cuts.values()]))
