"""``python -m bench.kernels.check NEW.json``: fails when ttt became slower than in the committed results.

Only ratios are compared (of ttt's time to that of a plain forward pass, and to that of the case's baseline), and only
with results of the same kind of machine: absolute times vary more with the load of the machine than with the code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
ALLOWED = 1.25
RATIOS = ("ratio_to_forward", "ratio")

app = typer.Typer(add_completion=False)


def kind_of(results: dict[str, Any]) -> tuple:
    """(device, instruction set, threads): ratios are comparable where these are equal."""
    machine = results["machine"]
    return machine["device"], machine["isa"], machine["threads"]


def key_of(row: dict[str, Any]) -> tuple[str, str, str, str]:
    """What identifies a row: (suite, case, dtype, contender)."""
    return row["suite"], row["case"], row["dtype"], row["contender"]


def load(path: Path) -> dict[str, Any] | None:
    """The results of `bench.kernels.run` in ``path``; None if the file holds something else."""
    found = json.loads(path.read_text())
    machine = found.get("machine") if isinstance(found, dict) and "rows" in found else None
    known = isinstance(machine, dict) and {"device", "isa", "threads", "date"} <= machine.keys()
    return found if known else None


def committed(paths: list[Path], kind: tuple) -> dict[tuple, dict[str, Any]]:
    """The latest row for each `key_of` in all results of this kind of machine (see `kind_of`)."""
    found = [results for path in paths if (results := load(path)) is not None and kind_of(results) == kind]
    found.sort(key=lambda results: results["machine"]["date"])
    return {key_of(row): row for results in found for row in results["rows"]}


def compare(new: list[dict[str, Any]], old: dict[tuple, dict[str, Any]], allowed: float = ALLOWED) -> list[dict]:
    """Compare the ratios of ttt's own rows that ``new`` and ``old`` both have.

    Returns:
        For each ratio a dict with ``key``, ``ratio`` (its name), ``was``, ``now``, and ``worse``: whether it grew by
        more than the factor ``allowed``.
    """
    found = []
    for row in new:
        before = old.get(key_of(row))
        if not row["ours"] or before is None:
            continue
        for name in RATIOS:
            was, now = before.get(name), row.get(name)
            if was is None or now is None or (name == "ratio" and row["ratio"] == row["ratio_to_forward"]):
                continue
            if name == "ratio" and before["baseline"] != row["baseline"]:
                continue
            found.append({"key": key_of(row), "ratio": name, "was": was, "now": now, "worse": now > allowed * was})
    return found


@app.command()
def main(
    new: Annotated[Path, typer.Argument(exists=True, help="A JSON file written by bench.kernels.run.")],
    against: Annotated[
        Path | None, typer.Option(exists=True, help="Compare with this file (default: all of bench/kernels/results).")
    ] = None,
) -> None:
    """Exit with 1 if a ratio is more than 25 % worse than the committed one of the same kind of machine."""
    console = Console(width=160)
    results = load(new)
    if results is None:
        raise typer.BadParameter(f"{new} is not a result of bench.kernels.run")
    paths = [against] if against else sorted(p for p in RESULTS.glob("*.json") if p.resolve() != new.resolve())
    kind = kind_of(results)
    old = committed(paths, kind)
    failed = [row for row in results.get("not_timed", []) if row["failed"] and row["contender"] in ("ttt", "observe")]
    for row in failed:
        console.print(f"{': '.join(key_of(row))} was not timed: {row['reason']}", markup=False)
    if not old:
        device, isa, threads = kind
        console.print(f"No committed result of {device}, {isa}, {threads} threads: no ratio was compared.")
        raise typer.Exit(1 if failed else 0)
    compared = compare(results["rows"], old)
    worse = [c for c in compared if c["worse"]]
    table = Table(title=f"{len(worse)} of {len(compared)} ratios are more than {100 * (ALLOWED - 1):.0f} % worse")
    for column in ("case", "dtype", "ratio", "committed", "now", "change"):
        table.add_column(column, justify="left" if column in ("case", "dtype", "ratio") else "right")
    for c in sorted(compared, key=lambda c: -c["now"] / c["was"])[: max(len(worse), 10)]:
        suite, case, dtype, _ = c["key"]
        change = f"{100 * (c['now'] / c['was'] - 1):+.0f} %"
        cells = (f"{suite}: {case}", dtype, c["ratio"], f"{c['was']:.3f}", f"{c['now']:.3f}", change)
        table.add_row(*cells, style="bold red" if c["worse"] else None)
    console.print(table)
    if worse or failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
