"""The demo's report: ``index.html``, its plots, and ``results.json`` with every figure that they show."""

from __future__ import annotations

import html
import json
import os
from pathlib import Path

from ttt.info import info

COLOURS = {
    "frozen": "#7f7f7f",
    "in-context only": "#17becf",
    "SGD": "#d62728",
    "EWC": "#ff7f0e",
    "replay": "#9467bd",
    "orthogonal": "#2ca02c",
    "combined": "#bcbd22",
    "default": "#1f77b4",
    "columns": "#8c564b",
}

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.ours { font-weight: 600; background: #eef5fb; }
img { max-width: 100%; }
.small { color: #666; font-size: .85rem; }
"""


def machine() -> str:
    """Processor, cores, threads, Python and torch, in one line."""
    found = info(file=None)
    versions = f"Python {found['python']}, torch {found['torch']}"
    return f"{found['processor']}, {os.cpu_count()} cores, {found['threads']} threads, {versions}"


def write(found: dict, folder: Path) -> None:
    """Write the report on ``found``, the results of `ttt.demo.run.main`, into ``folder``; make the folder if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    body = []
    for number, (domain, one) in enumerate(found["domains"].items()):
        _plot(one, folder / f"domain{number}.png")
        body.append(_section(domain, one, f"domain{number}.png"))
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>ttt: a model that learns while it reads</title><style>{STYLE}</style>
<h1>A model that learns while it reads</h1>
<p>A byte-level language model of 4.4 million parameters, trained on Python sources, reads text of a kind that it was
not trained on. Every byte is scored <em>before</em> the model learns from it, and nothing is read twice. Afterwards the
model is tested on Python modules that it was not trained on: the increase of its bits per byte there is what it has
forgotten. The method "columns" keeps the original weights, stores what it learns from each kind of text apart from
them, and chooses among these by likelihood.</p>
{"".join(body)}
<p class="small">{html.escape(found["machine"])}; {found["date"]}; {found["seconds"]} s in total. All figures are in
<a href="results.json">results.json</a>. Times are per byte read, relative to the frozen model; the methods took turns
on the same pieces of text. "Combined" is EWC, replay and orthogonal updates together. It and the single protections
were tuned on C++ headers that the demo does not read
(<code>python -m bench.learning.experiments.tune</code>); the default was chosen on another model.</p>
</html>
"""
    (folder / "index.html").write_text(page)


def _section(domain: str, one: dict, picture: str) -> str:
    cells = []
    for row in one["rows"]:
        share = ["" if row[k] is None else f"{100 * row[k]:.0f} %" for k in ("gain_share", "forgetting_share")]
        values = [f"{row['new_bpb']:.3f}", share[0], f"{row['old_bpb']:.3f}", share[1], f"{row['time_ratio']:.2f} x"]
        ours = ' class="ours"' if row["method"] == "default" else ""
        line = "".join(f"<td>{value}</td>" for value in (html.escape(row["method"]), *values))
        cells.append(f"<tr{ours}>{line}</tr>")
    r = one["recall"]
    return f"""
<h2>{html.escape(domain)}</h2>
<table><tr><th>method<th>new text, bits/byte<th>gain, % of SGD's<th>Python afterwards, bits/byte
<th>forgetting, % of SGD's<th>time</tr>
{"".join(cells)}</table>
<img src="{picture}" alt="learning curve, gain and forgetting, time">
<p>The weights learnt by the <b>default</b> method were saved
({r["file_bytes"] / 1e6:.1f} MB) and loaded in a new process. On {r["bytes"]} further bytes of the same text, which no
method has read, the model needs {r["loaded"]:.3f} bits per byte with these weights, and {r["frozen"]:.3f} without them.
In-context learning starts with an empty context there, so it needs as many as the frozen model.</p>
"""


def _plot(one: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curve, trade, cost) = plt.subplots(
        1, 3, figsize=(13, 4), width_ratios=[1.5, 1.1, 1], constrained_layout=True
    )
    for name, values in one["curves"].items():
        done = [sum(values[: i + 1]) / (i + 1) for i in range(len(values))]
        curve.plot([(i + 1) / 2 for i in range(len(values))], done, color=COLOURS[name], label=name, lw=1.6)
    curve.set(xlabel="KiB read", ylabel="mean bits per byte so far", title="Learning curve")
    curve.legend(fontsize=8)
    rows = {row["method"]: row for row in one["rows"]}
    frozen = rows["frozen"]
    for name, row in rows.items():
        x, y = row["old_bpb"] - frozen["old_bpb"], frozen["new_bpb"] - row["new_bpb"]
        trade.scatter(x, y, color=COLOURS[name], s=50, zorder=3, label=name)
    trade.set(
        xlabel="forgetting: increase of bits per byte on Python",
        ylabel="gain on the new text",
        title="Gain and forgetting",
    )
    trade.legend(fontsize=8, loc="lower right")
    trade.margins(0.1)
    names = list(rows)
    cost.barh(names, [rows[n]["time_ratio"] for n in names], color=[COLOURS[n] for n in names])
    cost.invert_yaxis()
    cost.set(xlabel="time per byte (frozen = 1)", title="Cost")
    for axis in (curve, trade, cost):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    plt.close(figure)
