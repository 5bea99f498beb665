"""Figures with confidence intervals, tables and bar plots from finished runs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from bench.learning.metrics import interval
from bench.learning.suite import Figure, Record, Suite, swept

COLOURS = {
    "reference": "#7f7f7f", "regularisation": "#1f77b4", "replay": "#2ca02c", "architecture": "#d62728",
    "distillation": "#17becf", "orthogonal": "#9467bd", "combination": "#ff7f0e", "workaround": "#8c564b",
}  # fmt: skip
"""Family of methods -> colour, in all suites."""


def summarise(suite: Suite, records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row for each scenario and method: its options, the number of seeds, and its figures.

    A figure is [mean, half the width of the 95 % confidence interval over seeds]. The width is None for a single seed;
    the figure is None where it is not defined.
    """
    records = [r for r in records if not swept(r)]
    same: dict[tuple[str, int], dict[str, Record]] = {}
    for record in records:
        same.setdefault((record["scenario"], record["seed"]), {})[record["method"]] = record
    rows = []
    for scenario in suite.scenarios:
        for method in suite.methods:
            mine = [r for r in records if r["scenario"] == scenario and r["method"] == method]
            if not mine:
                continue
            measured = [suite.measure(r, same[scenario, r["seed"]]) for r in mine]
            row: dict[str, Any] = {"scenario": scenario, "method": method, "family": suite.family(method)}
            row |= {"options": mine[0]["options"], "seeds": len(mine)}
            for figure in suite.figures:
                values = [m[figure.name] for m in measured]
                row[figure.name] = _interval([v for v in values if v is not None]) if None not in values else None
            rows.append(row)
    return rows


def _interval(values: list[float]) -> list[float | None]:
    mean, width = interval(values)
    return [round(mean, 5), None if math.isnan(width) else round(width, 5)]


def table_of(suite: Suite, scenario: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of one scenario as a table."""
    mine = [row for row in rows if row["scenario"] == scenario]
    seeds = sorted({row["seeds"] for row in mine})
    many = " or ".join(map(str, seeds))
    table = Table(title=f"{suite.name}, {scenario}", caption=f"mean ± 95 % interval over {many} seeds")
    table.add_column("method")
    for figure in (shown := shown_figures(suite, mine)):
        table.add_column(figure.title, justify="right")
    for row in mine:
        table.add_row(row["method"], *(cell(row[f.name], f.digits) for f in shown))
    return table


def shown_figures(suite: Suite, rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """The figures that are defined in at least one of ``rows``."""
    return [f for f in suite.figures if any(row[f.name] is not None for row in rows)]


def cell(value: Sequence[float | None] | None, digits: int) -> str:
    """A figure of `summarise` as text: mean ± half width, with ``digits`` digits."""
    if value is None:
        return ""
    mean, width = value
    return f"{mean:.{digits}f}" + ("" if width is None else f" ± {width:.{digits}f}")


def about_gpu(found: Mapping[str, Any], command: str) -> list[tuple[str, ...]]:
    """The head of tables of runs that were made on a GPU: a head and a line of cells.

    Args:
        found: the results.
        command: that made them.
    """
    machine = found["machine"]
    columns = ("gpu", "processor", "processes", "torch", "triton")
    cells = (f"`{command}`", *(str(machine[name]) for name in columns), found["date"])
    return [("command", "GPU", "processor", "processes at once", "torch", "Triton", "date"), cells]


def bars(suite: Suite, rows: Sequence[Mapping[str, Any]], figure: str, label: str, title: str, path: str) -> None:
    """Draw a share of every method as bars with intervals, in one panel for each scenario."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scenarios = [s for s in suite.scenarios if any(r["scenario"] == s for r in rows)]
    # All panels have the same rows, so that only the first one needs their names.
    methods = [m for m in suite.methods if any(r["method"] == m for r in rows)]
    names = ["\n".join(textwrap.wrap(method, 36)) for method in methods]
    height = 0.27 * len(methods) + 0.1 * sum(name.count("\n") for name in names) + 1.3
    drawing, axes = plt.subplots(
        1, len(scenarios), figsize=(2.2 * len(scenarios) + 3, height), squeeze=False, sharey=True, layout="constrained"
    )
    for ax, scenario in zip(axes[0], scenarios, strict=True):
        mine = [r for r in rows if r["scenario"] == scenario and r[figure] is not None]
        ax.barh(
            [methods.index(r["method"]) for r in mine],
            [r[figure][0] for r in mine],
            xerr=[math.nan if r[figure][1] is None else r[figure][1] for r in mine],
            color=[COLOURS[r["family"]] for r in mine],
            error_kw={"elinewidth": 1, "capsize": 2},
        )
        ax.set_xlim(0, 1)
        ax.set_title(scenario, fontsize=10)
        ax.tick_params(labelsize=8)
        ax.set_xlabel(label, fontsize=8)
        ax.grid(axis="x", alpha=0.3)
    axes[0][0].set_yticks(range(len(methods)), names)
    axes[0][0].set_ylim(len(methods) - 0.5, -0.5)
    drawing.suptitle(title, fontsize=9)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)
