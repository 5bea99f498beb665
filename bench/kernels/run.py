"""``python -m bench.kernels.run``: check and time the cases, print a table and write the figures as JSON.

For example ``python -m bench.kernels.run --suite commit,decode --json commit_and_decode.json``. Every contender is
checked against a reference; then all contenders of a case are timed in turn.
"""

from __future__ import annotations

import enum
import gc
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.kernels.measure import measure, summary_of_ceilings
from bench.kernels.suites import SUITES, select
from bench.machine import provenance

app = typer.Typer(add_completion=False)


class Device(str, enum.Enum):
    """Where to measure."""

    cpu = "cpu"
    cuda = "cuda"


class Clock(str, enum.Enum):
    """What times are measured with: see `bench.kernels.timing.CLOCKS`."""

    wall = "wall"
    cpu = "cpu"


@app.command()
def main(
    device: Annotated[Device, typer.Option(help="Where to measure.")] = Device.cpu,
    suite: Annotated[str, typer.Option(help=f"Comma-separated list of {', '.join(SUITES)}.")] = ",".join(SUITES),
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write after every case.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Number of samples of each contender.")] = 9,
    seconds: Annotated[float, typer.Option(help="A case stops after this time, but not before 3 rounds.")] = 10.0,
    threads: Annotated[int | None, typer.Option(min=1, help="torch threads (default: torch's own choice).")] = None,
    clock: Annotated[
        Clock, typer.Option(help="cpu: leave out the time that other processes have the core; one thread only.")
    ] = Clock.wall,
    only: Annotated[str, typer.Option(help='Only cases whose "suite: name, dtype" contains this text.')] = "",
) -> None:
    """Check every contender of every case against a reference, then time them in turn."""
    try:
        cases = select(device.value, suite.split(","), only)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not cases:
        raise typer.BadParameter(f"no case of {suite} has {only!r} in its name")
    if device is Device.cuda and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda: torch.cuda.is_available() is False")
    used = threads or torch.get_num_threads()
    if clock is Clock.cpu and (device is not Device.cpu or used > 1):
        raise typer.BadParameter(f"--clock cpu takes --device cpu and --threads 1, got {device.value} and {used}")
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    console = Console(width=190)
    found: dict[str, Any] = {"machine": provenance(device.value), "ceilings": {}, "rounds": rounds}
    found |= {"clock": clock.value, "rows": [], "not_timed": []}
    console.print(found["machine"])
    for number, case in enumerate(cases, 1):
        rows, not_timed = measure(case, rounds, seconds, clock.value)
        gc.collect()
        found["rows"] += rows
        found["not_timed"] += not_timed
        found["ceilings"] = summary_of_ceilings(found["rows"])
        console.print(f"{number}/{len(cases)} {case.suite}: {case.name}, {case.dtype}", style="dim", highlight=False)
        for row in not_timed:
            console.print(f"  {row['contender']} not timed: {row['reason'].splitlines()[0]}", markup=False)
        if json_file is not None:  # after every case, so that an interrupted run leaves what it has measured
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(found, indent=1) + "\n")
    about = found["machine"]
    title = f"{about['device']}, {about['threads']} threads, {about['isa']}, {about['date']}; {found['ceilings']}"
    console.print(table_of(found["rows"], title))
    if any(row["failed"] for row in found["not_timed"]):
        console.print("Some contenders failed their checks; they were not timed:", style="bold")
        console.print_json(data=found["not_timed"])
        if any(
            row["contender"] in ("ttt", "observe", "observe, captured") for row in found["not_timed"] if row["failed"]
        ):
            raise typer.Exit(1)


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    """The rows of the JSON as a table. "to forward" and "to baseline" are ratios of times."""
    table = Table(title=title)
    columns = ("case", "dtype", "contender", "us", "quartiles", "GB/s", "TFLOP/s", "% of", "to forward", "to baseline")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:3] else "right")
    before = None
    for r in rows:
        case = (r["suite"], r["case"], r["dtype"])
        if before is not None and case != before:
            table.add_section()
        share = "" if r["percent_of_ceiling"] is None else f"{r['percent_of_ceiling']:.0f} % of {r['ceiling']}"
        table.add_row(
            f"{r['suite']}: {r['case']}" if case != before else "",
            r["dtype"] if case != before else "",
            r["contender"],
            f"{r['us']:.1f}",
            f"{r['us_q1']:.1f}-{r['us_q3']:.1f}",
            *("" if r[key] is None else f"{r[key]:.4g}" for key in ("gb_per_s", "tflop_per_s")),
            share,
            *(
                "" if r[key] is None else f"{r[key]:.3f}"
                for key in ("ratio_to_forward", "ratio")
            ),
            style="bold" if r["ours"] else None,
        )  # fmt: skip
        before = case
    return table


if __name__ == "__main__":
    app()
