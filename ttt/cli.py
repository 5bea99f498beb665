"""The command ``ttt``: ``ttt info``, ``ttt demo``, ``ttt chat``, and ``ttt users`` and ``ttt verify`` for a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ttt.store import cli as store_cli

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Models that learn while they are used.")
store_cli.add_to(app)


@app.command()
def info() -> None:
    """Print versions, backends, instruction set and threads in use, and why a backend is missing."""
    from ttt.info import info as show

    show()


@app.command()
def demo(
    text: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Read this file instead of the built-in texts."),
    ] = None,
    report: Annotated[Path, typer.Option(help="Folder to write index.html and the plots to.")] = Path("report"),
    bytes_per_domain: Annotated[
        int, typer.Option("--bytes", min=2048, help="Bytes to read of each kind of text.")
    ] = 20480,
) -> None:
    """Let a small language model learn from real text as it reads, and report what it gained and forgot.

    The model is in the repository of ttt, not in the installed package: run this in a clone, or let TTT_BYTE_MODEL
    name the folder that holds it.
    """
    from ttt.demo.model import model_folder

    try:
        model_folder()
    except FileNotFoundError as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from None
    from ttt.demo.run import main

    main(text, report, bytes_per_domain)


@app.command()
def chat(
    model: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder of a transformers model; by default SmolLM2-135M."),
    ] = None,
    store: Annotated[str, typer.Option(help="URL of the store that keeps what is learnt; a path names a folder.")] = (
        "chat-store"
    ),
    user: Annotated[str, typer.Option(help="Id of the user who talks.")] = "me",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Bound on the length of an answer.")] = 128,
    learn: Annotated[bool, typer.Option(help="Whether the model learns from what is said.")] = True,
) -> None:
    """Talk with a language model that learns from what you say, and remembers it the next time."""
    from ttt.chat.terminal import run

    run(model, store, user, max_new_tokens, learn)
