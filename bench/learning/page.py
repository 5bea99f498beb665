"""The HTML page of all results: tables and pictures of all suites in one file."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.learning.report import cell, shown_figures
from bench.learning.suite import Suite, candidates, device_of, stem_of
from bench.learning.suites import SUITES
from bench.machine import DEVICES
from ttt.demo.report import STYLE

_STYLE = (
    STYLE
    + """
body { max-width: 76rem; }
table { font-size: .85rem; }
dt { font-weight: 600; }
dd { margin: 0 0 .3rem 1.5rem; }
"""
)


def write(results: Path, path: Path) -> None:
    """Write the page ``path`` from the files ``benchmark_*.json`` and ``benchmark_*.png`` in ``results``.

    Raises:
        FileNotFoundError: if ``results`` has no figures of any suite.
    """
    found = [(suite, file) for suite in _suites() if (file := results / f"{stem_of(suite)}.json").exists()]
    if not found:
        raise FileNotFoundError(f"{results} holds no benchmark_*.json; `python -m bench.learning` writes it")
    body = [_section(suite, json.loads(file.read_text()), results) for suite, file in found]
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>ttt: methods of continual learning compared</title><style>{_STYLE}</style>
<h1>Methods of continual learning compared</h1>
<p>A figure is the mean over seeds ± half the width of its 95 % confidence interval (Student's t). <code>make
benchmark</code> repeats all runs that are missing and writes this page.</p>
{"".join(body)}
</html>
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)


def _suites() -> Iterator[Suite]:
    """Every suite on every device on which it can run."""
    for make in SUITES.values():
        for device in DEVICES:
            suite = make()
            if device == "cpu":
                yield suite
            elif hasattr(suite, "device"):
                suite.device = device
                yield suite


def _pictures(suite: Suite, results: Path) -> list[Path]:
    stem = stem_of(suite)
    longer = [f"{stem}_{device}_" for device in DEVICES]
    return [path for path in sorted(results.glob(f"{stem}_*.png")) if not path.name.startswith(tuple(longer))]


def _section(suite: Suite, found: Mapping[str, Any], results: Path) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    tables = "".join(_table(suite, scenario, found["rows"]) for scenario in suite.scenarios)
    figures = shown_figures(suite, found["rows"])
    meanings = "".join(f"<dt>{html.escape(f.title)}<dd>{html.escape(f.meaning)}" for f in figures if f.meaning)
    pictures = "".join(_picture(path) for path in _pictures(suite, results))
    domains = found.get("domains", {})
    read = ", ".join(f"{name} {size:,} bytes" for name, size in domains.items())
    lacking = "".join(f"<p>Left out: {html.escape(why)}.</p>" for why in found.get("missing", {}).values())
    searched = any(len(candidates(suite.grid(name))) > 1 for name in suite.methods)
    search = f"""The options of every method were chosen by the same search, on data and seeds that are not reported:
<code>python -m bench.learning --suite {suite.name} --tune</code>."""
    device = device_of(suite)
    where = "" if device == "cpu" else f" --device {device}"
    return f"""
<h2>{html.escape(suite.name + where.replace(" --device", " on"))}</h2>
<p class="small">{html.escape(machine)}; {html.escape(found["date"])}. Runs were made with
<code>python -m bench.learning --suite {suite.name}{where}</code>. {search if searched else ""}</p>
{f"<p>Text on that machine: {read}.</p>" if read else ""}{lacking}
<dl>{meanings}</dl>
{pictures}
{tables}"""


def _table(suite: Suite, scenario: str, rows: list[Mapping[str, Any]]) -> str:
    mine = [row for row in rows if row["scenario"] == scenario]
    if not mine:
        return ""
    figures = shown_figures(suite, mine)
    head = "".join(f"<th>{html.escape(f.title)}" for f in figures)
    lines = []
    for row in mine:
        options = ", ".join(f"{name} = {value}" for name, value in row["options"].items())
        cells = "".join(f"<td>{cell(row[f.name], f.digits)}" for f in figures)
        lines.append(f'<tr title="{html.escape(options)}"><td>{html.escape(row["method"])}{cells}</tr>')
    seeds = " or ".join(str(n) for n in sorted({row["seeds"] for row in mine}))
    return f"""
<h3>{html.escape(scenario)} ({seeds} seeds)</h3>
<table><tr><th>method{head}</tr>
{"".join(lines)}</table>
"""


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img src="data:image/png;base64,{data}" alt="{html.escape(path.stem)}"></p>'
