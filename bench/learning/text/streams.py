"""The streams of the suite "text": eight kinds of text that every machine with the `benchmark` extra has.

The demo model was not trained on any of them. They depend on the installed versions, so each run records how many
bytes of a kind this machine has, and a hash of the bytes that it read. Results are reported on

* ``english``: the Python reference, ``pydoc_data.topics``,
* ``html``: the pages that pydoc makes for modules written mostly in C, whose docstrings are in no Python file,
* ``rst``: scikit-learn's descriptions of data sets, then its docstrings,
* ``licences``: those of the installed packages, each text once (many differ from another in a few words).

Options are tuned on

* ``headers`` (C++, the second half) and ``javascript``,
* for some methods (see `TextMethod.streams`) also ``readmes`` of the installed packages and ``docs``, torch's
  docstrings.

The last fifth of each kind is held out: it is not streamed, and tests what a model has learnt of that kind.
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
"""The scenario in which options are chosen: seeds 1000, 1001, ... read the kinds of `TUNING` in turn."""

SWEPT = ("adapt-english", "adapt-rst")  # scenarios with trade-off curves: prose and markup
ADAPT, SEGMENT, SEARCH = 12288, 6144, 8192  # bytes; multiples of CONTEXT
HELD_WINDOWS = 4
MINIMUM = 60_000  # bytes of a kind; below it the kind is left out
_HELD = 5  # one part in 5 is held out
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
        except ImportError:  # Python can be built without some of these modules
            continue
        page = html.page(name, html.document(module))
        page = re.sub(r'<a href="file:[^>]*>[^<]*</a>', "", page)  # the path of the installation
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
    """Each of ``parts`` once, without those shorter than `CONTEXT`, joined."""
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
    """(name, package) for each installed package, sorted by name."""
    return sorted({str(d.metadata["Name"]).lower(): d for d in importlib.metadata.distributions()}.items())


def _readmes() -> bytes:
    whole = [d.read_text("METADATA") or "" for name, d in _distributions() if name != "ttt"]
    return _long(text.partition("\n\n")[2].encode() for text in whole)  # without the fields before it


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
    """All bytes of ``domain`` on this machine.

    Raises:
        ValueError: for an unknown domain.
        FileNotFoundError: if this machine has less than `MINIMUM` bytes of it.
    """
    if domain not in _SOURCES:
        raise ValueError(f"domain must be one of {list(_SOURCES)}, got {domain!r}")
    data = _SOURCES[domain]()
    if len(data) < MINIMUM:
        raise FileNotFoundError(f"{domain} must have at least {MINIMUM} bytes on this machine, got {len(data)}")
    return data


@functools.cache
def missing() -> dict[str, str]:
    """Domains of which this machine has too little, with the reason."""
    found = {}
    for domain in _SOURCES:
        try:
            read(domain)
        except (ImportError, FileNotFoundError) as error:
            found[domain] = str(error)
    return found


def yaml() -> bytes:
    """torchgen's list of operators: a further kind of text, which only `bench.learning.experiments` read."""
    spec = importlib.util.find_spec("torchgen")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the domain 'yaml' reads torchgen's operator list, which comes with torch; it is missing"
        )
    return (Path(spec.origin).parent / "packaged/ATen/native/native_functions.yaml").read_bytes()


def streamed(domain: str) -> bytes:
    """The part of ``domain`` from which streams are cut: all but the held-out text."""
    data = read(domain)
    return data[: len(data) - len(data) // _HELD]


def held_out(domain: str) -> Tensor:
    """(HELD_WINDOWS, CONTEXT) int64: windows of the held-out text of ``domain``."""
    data = read(domain)
    return windows(data[len(data) - len(data) // _HELD :], HELD_WINDOWS)


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive text of one domain: ``ids`` (1, T + 1) int64, of which the first byte is only context."""

    domain: str
    ids: Tensor


@dataclasses.dataclass(frozen=True)
class Stream:
    """What a method reads.

    Attributes:
        segments: in order, without overlap.
        other: (N, CONTEXT + 1) int64: as much text of the same domains that is in no segment, for joint training.
    """

    segments: list[Segment]
    other: Tensor

    @property
    def domains(self) -> list[str]:
        """The domains, in the order of their first segments."""
        return list(dict.fromkeys(segment.domain for segment in self.segments))

    def sources(self) -> dict[str, dict[str, int | str]]:
        """Domain -> ``bytes``, the number of its bytes on this machine, and ``sha256`` of those in the segments."""
        found: dict[str, dict[str, int | str]] = {}
        for domain in self.domains:
            digest = hashlib.sha256()
            for segment in self.segments:
                if segment.domain == domain:
                    digest.update(bytes(segment.ids[0].tolist()))
            found[domain] = {"bytes": len(read(domain)), "sha256": digest.hexdigest()[:16]}
        return found


def cut(data: bytes, lengths: Sequence[int], generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
    """Cut consecutive pieces of the given ``lengths``, and as much text that follows them, from a random place.

    Returns:
        (pieces (1, length + 1), rows (N, CONTEXT + 1) of the text that follows, with N CONTEXT = sum of ``lengths``).

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
    """The order of the segments of ``count`` domains, each of which occurs twice: A B A C B D C D for four."""
    order = [0]
    for domain in range(1, count):
        order += [domain, domain - 1]
    return [*order, count - 1]


def stream(scenario: str, seed: int, *, tuning: bool = False) -> Stream:
    """The text of ``scenario``; ``seed`` draws the places from which it is cut and the order of the domains.

    * ``adapt-DOMAIN``: `ADAPT` bytes of one domain.
    * ``recurring``: segments of `SEGMENT` bytes of all reported domains, in the order of `visits`.
    * ``tuning``: `SEARCH` bytes of a domain that is not reported.

    Raises:
        ValueError: for a scenario that is unknown, or only for ``tuning``, or not for it.
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
