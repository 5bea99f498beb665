"""``python -m bench.learning``: tune, run and compare methods of continual learning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.learning.command import main as run
from bench.learning.page import write

app = typer.Typer(add_completion=False)


@app.command()
def main(
    suite: Annotated[str, typer.Option(help="The suite to run: digits, text, streams or facts.")] = "digits",
    scenarios: Annotated[str | None, typer.Option(help="Comma-separated list; all by default.")] = None,
    methods: Annotated[str | None, typer.Option(help="Comma-separated list; all by default.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, counted from 0.")] = 5,
    tune: Annotated[bool, typer.Option("--tune", help="Search the methods' options, on other seeds.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Number of processes that run in parallel.")] = 1,
    results: Annotated[Path, typer.Option(help="Folder for runs, figures and plots.")] = Path("bench/learning/results"),
    tuned: Annotated[Path | None, typer.Option(help="File of tuned options; by default the committed one.")] = None,
    plots: Annotated[bool, typer.Option(help="Draw plots.")] = True,
    curves: Annotated[bool, typer.Option("--curves", help="Also make the runs of trade-off curves.")] = False,
    tokens: Annotated[int | None, typer.Option(help="Tokens of each text (streams only).")] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, or cuda (streams and facts only).")] = "cpu",
    merge: Annotated[
        Path | None, typer.Option(help="Run nothing; add the runs in this folder, made elsewhere, to the results.")
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Run nothing; write all results as one HTML page.")] = False,
    page: Annotated[Path, typer.Option(help="The file of the page.")] = Path("report/benchmark.html"),
) -> None:
    """Compare methods of continual learning. Runs that are already in the results folder are not repeated."""
    try:
        if report:
            write(results, page)
            print(f"{page} written")
            return
        run(suite, scenarios, methods, seeds, tune, jobs, results, tuned, plots, curves, tokens, device, merge)
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    app()
