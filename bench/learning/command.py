"""What the command ``python -m bench.learning`` does: tune methods, or run and compare them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.learning import report, tuning
from bench.learning.runs import Journal, key_of, run_all, wanted
from bench.learning.suite import Record, Suite, swept
from bench.learning.suites import SUITES
from bench.machine import machine


def pick(name: str, given: str | None, allowed: Sequence[str]) -> list[str]:
    """The items of the comma-separated list ``given``, in the order of ``allowed``; all of them for None.

    Args:
        name: of the option, for the error.

    Raises:
        ValueError: for an item that is not in ``allowed``.
    """
    if given is None:
        return list(allowed)
    items = [item.strip() for item in given.split(",")]
    for item in items:
        if item not in allowed:
            raise ValueError(f"{name} must be among {list(allowed)}, got {item!r}")
    return [item for item in allowed if item in items]


def suite_of(name: str, tokens: int | None = None) -> Suite:
    """The suite ``name``.

    Args:
        tokens: to read of each text, for a suite that has this setting; None for what the suite reads by default.

    Raises:
        ValueError: if there is none, or for ``tokens`` that it cannot read.
    """
    if name not in SUITES:
        raise ValueError(f"suite must be one of {list(SUITES)}, got {name!r}")
    suite = SUITES[name]()
    if tokens is not None:
        if not hasattr(suite, "tokens"):
            raise ValueError(f"tokens must not be given for the suite {name!r}, got {tokens}")
        suite.tokens = tokens
    return suite


def _run(suite: Suite, todo: list[Record], journal: Journal, jobs: int, console: Console, what: str) -> None:
    columns = [TextColumn("{task.description:44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(what, total=len(todo))

        def finished(record: Record) -> None:
            name = f"{what}: {record['scenario']}, {record['method']}"
            progress.update(task, advance=1, description=name)

        run_all(suite, todo, journal, jobs=jobs, finished=finished)
        progress.update(task, description=what)


def tune(
    suite: Suite, scenarios: Sequence[str], methods: Sequence[str], results: Path, tuned: Path, jobs: int,
    console: Console,
) -> None:  # fmt: skip
    """Search the grids of ``methods``, on seeds and samples that are not reported, and write the best to ``tuned``."""
    journal = Journal(results / f"benchmark_{suite.name}_tuning.jsonl")
    todo = tuning.todo(suite, scenarios, methods)
    _run(suite, todo, journal, jobs, console, "tuning")
    chosen = tuning.choose(suite, journal, todo)
    tuning.save(tuned, suite, chosen)
    for scenario, found in chosen.items():
        for method, best in found.items():
            edge = f"  [at the edge of its grid: {', '.join(best['at_edge'])}]" if best["at_edge"] else ""
            line = f"{scenario:13} {method:22} {best['score']:.3f} ({best['worst']:.3f}) {best['options']}{edge}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{tuned} written")


def runs_of(
    suite: Suite, scenarios: Sequence[str], methods: Sequence[str], seeds: int, tuned: Path, curves: bool
) -> list[Record]:
    """The runs to report: every method with its tuned options; with ``curves`` also the sweeps, for seed 0.

    Raises:
        ValueError: for a method without tuned options.
    """
    options = tuning.options_of(suite, tuned)
    todo, sweeps = [], []
    for scenario in scenarios:
        for method in methods:
            if not suite.fits(method, scenario):
                continue
            own = options.get(suite.tuned_on(scenario), {}).get(method)
            if own is None:
                raise ValueError(f"{tuned} has no options for {method!r} in {scenario!r}; run with --tune first")
            todo += [wanted(suite, scenario, method, seed, own, tuning=False) for seed in range(seeds)]
            swept_option, values = suite.sweep(method, scenario) or ("", ())
            for value in values if curves else ():
                if value != own[swept_option]:
                    other = {**own, swept_option: value}
                    sweeps.append(wanted(suite, scenario, method, 0, other, tuning=False, sweep=True))
    return todo + sweeps


def measure(
    suite: Suite, scenarios: Sequence[str], methods: Sequence[str], seeds: int, results: Path, tuned: Path, jobs: int,
    console: Console, plots: bool, curves: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run every method with its tuned options; write runs, figures and plots; print tables.

    Returns:
        The rows of `bench.learning.report.summarise`.
    """
    todo = runs_of(suite, scenarios, methods, seeds, tuned, curves)
    journal = Journal(results / f"benchmark_{suite.name}.jsonl")
    nothing_new = all(key_of(r) in journal.records for r in todo)
    _run(suite, todo, journal, jobs, console, suite.name)
    # Keep the runs of this call, and earlier ones with options that are still the tuned ones.
    asked = {key_of(r) for r in todo}
    options = tuning.options_of(suite, tuned)

    def current(r: Record) -> bool:
        chosen = options.get(suite.tuned_on(r["scenario"]), {}).get(r["method"])
        protocol = {**suite.protocol(), "tuning": False}
        if swept(r):
            protocol["sweep"] = True
            option, values = suite.sweep(r["method"], r["scenario"]) or ("", ())
            if chosen is not None and r["options"].get(option) in values:
                chosen = {**chosen, option: r["options"][option]}
        return key_of(r) in asked or (chosen == r["options"] and r["protocol"] == protocol)

    journal.rewrite(current)
    records = list(journal.records.values())
    rows = report.summarise(suite, records)
    path = results / f"benchmark_{suite.name}.json"
    found: dict[str, Any] = {"suite": suite.name, "machine": machine(), "date": time.strftime("%Y-%m-%d")}
    if nothing_new and path.exists():  # the machine is the one on which the runs were made
        before = json.loads(path.read_text())
        found |= {key: before[key] for key in ("machine", "date")}
    found |= {"protocol": suite.protocol(), **suite.facts(), "rows": rows}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(temporary, path)
    for scenario in scenarios:
        console.print(report.table_of(suite, scenario, [r for r in rows if r["method"] in methods]))
    written = [str(path)]
    if plots:
        prefix = str(results / f"benchmark_{suite.name}")
        made_on = found["machine"]
        title = f"{suite.name}; {made_on['processor']}, torch {made_on['torch']}, {found['date']}"
        written += suite.plot(records, rows, title, prefix)
    console.print(", ".join(written) + " written")
    return rows


def main(
    suite: str, scenarios: str | None, methods: str | None, seeds: int, tune_first: bool, jobs: int, results: Path,
    tuned: Path | None, plots: bool, curves: bool, tokens: int | None = None,
) -> None:  # fmt: skip
    """Tune or compare, with the arguments of the command (see `bench.learning.__main__`).

    Raises:
        ValueError: for an unknown suite, scenario or method.
    """
    found = suite_of(suite, tokens)
    chosen = pick("scenarios", scenarios, found.scenarios), pick("methods", methods, found.methods)
    path = tuned or tuning.tuned_path(found)
    console = Console()
    if tune_first:
        tune(found, *chosen, results, path, jobs, console)
    else:
        measure(found, *chosen, seeds, results, path, jobs, console, plots, curves)
