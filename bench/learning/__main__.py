"""``python -m bench.learning``: methods of continual learning, tuned, run and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.learning.command import main as run
from bench.learning.page import write

app = typer.Typer(add_completion=False)


@app.command()
def main(
    suite: Annotated[str, typer.Option(help="Which suite to run.")] = "digits",
    scenarios: Annotated[str | None, typer.Option(help="Comma-separated; all by default.")] = None,
    methods: Annotated[str | None, typer.Option(help="Comma-separated; all by default.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ...")] = 5,
    tune: Annotated[bool, typer.Option("--tune", help="Search the methods' options instead, on other seeds.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that run side by side.")] = 1,
    results: Annotated[Path, typer.Option(help="Folder of runs, figures and plots.")] = Path("bench/learning/results"),
    tuned: Annotated[Path | None, typer.Option(help="File of tuned options; by default the package's own.")] = None,
    plots: Annotated[bool, typer.Option(help="Draw plots.")] = True,
    curves: Annotated[bool, typer.Option("--curves", help="Also sweep each method's strength.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Run nothing: write all results as one page.")] = False,
    page: Annotated[Path, typer.Option(help="That page.")] = Path("report/benchmark.html"),
) -> None:
    """Compare methods of continual learning on sequences of tasks. Finished runs are kept, and not run again."""
    try:
        if report:
            write(results, page)
            print(f"{page} written")
            return
        run(suite, scenarios, methods, seeds, tune, jobs, results, tuned, plots, curves)
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    app()
