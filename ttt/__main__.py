"""``python -m ttt``: info, demo, benchmark, and the store of users."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ttt.store import cli as store_cli

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Models that go on learning while they are used.")
store_cli.add_to(app)


@app.command()
def info() -> None:
    """Print what is active: backends, instruction set, threads, versions, and why anything is missing."""
    from ttt.info import info as show

    show()


@app.command()
def demo(
    text: Annotated[Path | None, typer.Option(help="Stream this file instead of the built-in domains.")] = None,
    report: Annotated[Path, typer.Option(help="Folder for index.html and the plots.")] = Path("report"),
    bytes_per_domain: Annotated[int, typer.Option("--bytes", min=2048, help="Bytes streamed of each domain.")] = 20480,
) -> None:
    """Stream real text through a small language model that learns from it, and report gain and forgetting."""
    from ttt.demo.run import main

    main(text, report, bytes_per_domain)


@app.command()
def benchmark(
    suite: Annotated[str, typer.Option(help="Which suite to run.")] = "digits",
    scenarios: Annotated[str | None, typer.Option(help="Comma-separated; all by default.")] = None,
    methods: Annotated[str | None, typer.Option(help="Comma-separated; all by default.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ...")] = 5,
    tune: Annotated[bool, typer.Option("--tune", help="Search the methods' options instead, on other seeds.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that run side by side.")] = 1,
    results: Annotated[Path, typer.Option(help="Folder of runs, figures and plots.")] = Path("bench/results"),
    tuned: Annotated[Path | None, typer.Option(help="File of tuned options; by default the package's own.")] = None,
    plots: Annotated[bool, typer.Option(help="Draw plots.")] = True,
    curves: Annotated[bool, typer.Option("--curves", help="Also sweep each method's strength.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Run nothing: write all results as one page.")] = False,
    page: Annotated[Path, typer.Option(help="That page.")] = Path("report/benchmark.html"),
) -> None:
    """Compare methods of continual learning on sequences of tasks. Finished runs are kept, and not run again."""
    from ttt.benchmark.command import main

    try:
        if report:
            from ttt.benchmark.page import write

            write(results, page)
            print(f"{page} written")
            return
        main(suite, scenarios, methods, seeds, tune, jobs, results, tuned, plots, curves)
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    app()
