"""The command ``ttt``: what is active, the demo, and the store of users."""

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
