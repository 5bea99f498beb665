"""Make the tables of the README from the committed results; ``python tests/readme_tables.py`` prints them."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

BENCH = Path(__file__).parents[1] / "bench"
DOMAINS = ("english", "html", "rst", "licences")
SPLITS = ("split-class", "split-domain", "split-task", "permuted")


def _load(name: str) -> dict:
    folder = "kernels" if name.startswith("cpu_") else "learning"
    return json.loads((BENCH / folder / "results" / name).read_text())


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def demo() -> list[str]:
    """The results of the demo: a row for each text and method."""
    lines = []
    for domain, one in _load("demo.json")["domains"].items():
        for row in one["rows"]:
            gain, lost = ("" if row[k] is None else f"{100 * row[k]:.0f} %" for k in ("gain_share", "forgetting_share"))
            method = f"**{row['method']}**" if row["method"] == "default" else row["method"]
            bits = [f"{row['new_bpb']:.3f}", gain, f"{row['old_bpb']:.3f}", lost]
            lines.append(_line(domain, method, *bits, f"{row['tokens_per_second']:.0f}", f"{row['time_ratio']:.2f} x"))
    return lines


def digits() -> list[str]:
    """The suite "digits": a row for each method with its final mean accuracy, 95 % interval and cost."""
    rows = {(r["scenario"], r["method"]): r for r in _load("benchmark_digits.json")["rows"]}
    lines = []
    for method in dict.fromkeys(name for _, name in rows):
        cells = []
        for split in SPLITS:
            row = rows.get((split, method))
            cells.append("" if row is None else f"{row['acc'][0]:.3f} ± {row['acc'][1]:.3f}")
        first = next(rows[split, method] for split in SPLITS if (split, method) in rows)
        lines.append(_line(method, *cells, f"{first['us_per_sample'][0]:.0f}", f"{first['state_kib'][0]:.0f}"))
    return lines


def text() -> list[str]:
    """The suite "text": a row for each method.

    Bits per byte and share of naive's forgetting on each domain, the recurring stream, time and state.
    """
    rows = {(r["scenario"], r["method"]): r for r in _load("benchmark_text.json")["rows"]}
    lines = []
    for method in dict.fromkeys(name for _, name in rows):
        alone = [rows[f"adapt-{domain}", method] for domain in DOMAINS]
        cells = [f"{r['new'][0]:.3f} / {100 * r['forgetting_share'][0]:.0f} %" for r in alone]
        long = rows.get(("recurring", method))
        cells += ["", ""] if long is None else [f"{long[name][0]:.3f}" for name in ("new", "forgetting")]
        time = "" if alone[0]["time"] is None else f"{fmean(r['time'][0] for r in alone):.2f} x"
        lines.append(_line(method, *cells, time, f"{alone[0]['state'][0]:.1f}"))
    return lines


COMMITS = ("1024x1024, T = 1, R = 0", "1024x1024, T = 16, R = 0", "4096x4096, T = 1, R = 0", "4096x4096, T = 16, R = 0",
           "4096x4096, T = 16, R = 4", "4096x4096, T = 16, R = 0, 8bit state", "4096x4096, T = 64, R = 0",
           "4096x4096, T = 1024, R = 0")  # fmt: skip
DECODES = tuple(f"{size}x{size}, window {window}" for size in (512, 4096) for window in (16, 64, 128))


def costs() -> list[str]:
    """The cost of kernels and learning loops: a row for each case, with the baseline timed in the same run."""
    measured = [r for name in ("commit", "layers") for r in _load(f"cpu_{name}.json")["rows"] if r["ours"]]
    lines = []
    for suite, cases in (("commit", COMMITS), ("decode", DECODES), ("observe", None), ("generate", None)):
        rows = [r for r in measured if r["suite"] == suite and (cases is None or r["case"] in cases)]
        for row in sorted(rows, key=lambda r: r["dtype"], reverse=True):
            ratio, name = row["ratio"], row["baseline"]
            if ratio is None:
                beside = ""
            elif name == "plain torch":
                beside = f"{1 / ratio:.2f} x as fast as {name}"
            else:
                beside = f"{ratio:.2f} x the time of {f'`{name}`' if name == 'nn.Linear' else name}"
            of = "" if row["ceiling"] is None else f"{row['percent_of_ceiling']:.0f} % of {row['ceiling']}"
            bound = "" if row["ceiling"] != "copy" else f"{row['ratio_to_bound']:.2f}"
            lines.append(_line(suite, row["case"], row["dtype"], f"{row['us']:.0f}", beside, of, bound))
    return lines


TABLES = {"text": demo, "digits": digits, "streams of text": text, "suite": costs}
"""The first column's title of a table -> the function that makes its rows."""

if __name__ == "__main__":
    for head, table in TABLES.items():
        print(f"\n{head}")
        print("\n".join(table()))
