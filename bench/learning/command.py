"""What the command ``python -m bench.learning`` does: tune methods, or run and compare them."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.learning import report, tuning
from bench.learning.runs import Journal, key_of, run_all, wanted
from bench.learning.suite import Record, Suite, device_of, protocol_of, stem_of, swept
from bench.learning.suites import SUITES
from bench.machine import check_device, machine, name_of


def pick(name: str, given: str | None, allowed: Sequence[str]) -> list[str]:
    """The items of the comma-separated list ``given``, in the order of ``allowed``; all of them for None.

    A comma within parentheses is a part of an item, as in the names of some methods.

    Args:
        name: of the option, for the error.

    Raises:
        ValueError: for an item that is not in ``allowed``.
    """
    if given is None:
        return list(allowed)
    items = [item.strip() for item in re.split(r",(?![^(]*\))", given)]
    for item in items:
        if item not in allowed:
            raise ValueError(f"{name} must be among {list(allowed)}, got {item!r}")
    return [item for item in allowed if item in items]


def suite_of(name: str, tokens: int | None = None, device: str = "cpu") -> Suite:
    """The suite ``name``.

    Args:
        tokens: to read of each text, for a suite that has this setting; None for what the suite reads by default.
        device: where it runs, for a suite that has this setting.

    Raises:
        ValueError: if there is none, or for ``tokens`` that it cannot read, or a device on which it cannot run.
    """
    if name not in SUITES:
        raise ValueError(f"suite must be one of {list(SUITES)}, got {name!r}")
    suite = SUITES[name]()
    if tokens is not None:
        if not hasattr(suite, "tokens"):
            raise ValueError(f"tokens must not be given for the suite {name!r}, got {tokens}")
        suite.tokens = tokens
    if device != "cpu":
        if not hasattr(suite, "device"):
            raise ValueError(f"device must be 'cpu' for the suite {name!r}, got {device!r}")
        suite.device = device
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
    journal = Journal(results / f"{stem_of(suite)}_tuning.jsonl")
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
    journal = Journal(results / f"{stem_of(suite)}.jsonl")
    nothing_new = all(key_of(r) in journal.records for r in todo)
    _run(suite, todo, journal, jobs, console, suite.name)
    asked = {key_of(r) for r in todo}
    return _write(suite, scenarios, methods, journal, asked, nothing_new, results, tuned, console, plots)


def merge(
    suite: Suite, scenarios: Sequence[str], methods: Sequence[str], folder: Path, results: Path, tuned: Path,
    console: Console, plots: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """Add the runs in the journal of ``folder``, made on another machine, to ``results``; write and print as `measure`.

    Returns:
        The rows of `bench.learning.report.summarise`.

    Raises:
        FileNotFoundError: if ``folder`` has no runs of this suite on this device.
        ValueError: if a run there has another protocol than this suite has now, or was made on another kind of machine
            than those in ``results``. Nothing is added then.
    """
    path = folder / f"{stem_of(suite)}.jsonl"
    found, journal = Journal(path).records, Journal(results / path.name)
    if not found:
        raise FileNotFoundError(f"{path} holds no finished runs")
    machines = {name_of(r["machine"]) for r in journal.records.values() if "machine" in r}
    for record in found.values():
        if record["protocol"] != protocol_of(suite, tuning=False, sweep=swept(record)):
            raise ValueError(f"{path} has runs of another protocol than {suite.name} has now: {record['protocol']}")
        if machines and name_of(record["machine"]) not in machines:
            made, there = name_of(record["machine"]), " and ".join(sorted(machines))
            raise ValueError(f"{path} has runs of {made}, but the runs in {results} are of {there}")
    new = [record for key, record in found.items() if key not in journal.records]
    for record in new:
        journal.add(record)
    console.print(f"{len(new)} of {len(found)} runs are new")
    return _write(suite, scenarios, methods, journal, set(found), not new, results, tuned, console, plots)


def _write(
    suite: Suite, scenarios: Sequence[str], methods: Sequence[str], journal: Journal, asked: set[str],
    nothing_new: bool, results: Path, tuned: Path, console: Console, plots: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """Write figures and plots of the runs in ``journal``; print tables."""
    # Keep the runs of this call, and earlier ones with options that are still the tuned ones.
    options = tuning.options_of(suite, tuned)

    def current(r: Record) -> bool:
        chosen = options.get(suite.tuned_on(r["scenario"]), {}).get(r["method"])
        protocol = protocol_of(suite, tuning=False, sweep=swept(r))
        if swept(r):
            option, values = suite.sweep(r["method"], r["scenario"]) or ("", ())
            if chosen is not None and r["options"].get(option) in values:
                chosen = {**chosen, option: r["options"][option]}
        return key_of(r) in asked or (chosen == r["options"] and r["protocol"] == protocol)

    journal.rewrite(current)
    records = list(journal.records.values())
    rows = report.summarise(suite, records)
    path = results / f"{stem_of(suite)}.json"
    found: dict[str, Any] = {"suite": suite.name, **_made_on(suite, [r for r in records if key_of(r) in asked])}
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
        prefix = str(results / stem_of(suite))
        made_on = found["machine"]
        title = f"{suite.name}; {name_of(made_on)}, torch {made_on['torch']}, {found['date']}"
        written += suite.plot(records, rows, title, prefix)
    console.print(", ".join(written) + " written")
    return rows


def _made_on(suite: Suite, records: Sequence[Record]) -> Record:
    """The ``machine`` and ``date`` of the latest of ``records``; ``processes`` is how many ran there at once."""
    told = [r for r in records if "machine" in r]
    if not told:
        return {"machine": machine(device_of(suite)), "date": time.strftime("%Y-%m-%d")}
    latest = max(told, key=lambda r: r["date"])
    return {"machine": {**latest["machine"], "processes": max(r["jobs"] for r in told)}, "date": latest["date"]}


def main(
    suite: str, scenarios: str | None, methods: str | None, seeds: int, tune_first: bool, jobs: int, results: Path,
    tuned: Path | None, plots: bool, curves: bool, tokens: int | None = None, device: str = "cpu",
    merged: Path | None = None,
) -> None:  # fmt: skip
    """Tune, compare or merge, with the arguments of the command (see `bench.learning.__main__`).

    Raises:
        ValueError: for an unknown suite, scenario or method, or a device that is not there.
        FileNotFoundError: as `merge`.
    """
    found = suite_of(suite, tokens, device)
    if merged is None:
        check_device(device)
    chosen = pick("scenarios", scenarios, found.scenarios), pick("methods", methods, found.methods)
    path = tuned or tuning.tuned_path(found)
    console = Console()
    if merged is not None:
        merge(found, *chosen, merged, results, path, console, plots)
    elif tune_first:
        tune(found, *chosen, results, path, jobs, console)
    else:
        measure(found, *chosen, seeds, results, path, jobs, console, plots, curves)
