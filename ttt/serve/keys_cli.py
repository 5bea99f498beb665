"""``ttt keys``: make, list and revoke API keys of ``ttt serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ttt.serve.errors import BadRequest

keys = typer.Typer(no_args_is_help=True, help="API keys of ttt serve.")
KeyFile = Annotated[Path, typer.Argument(dir_okay=False, help="File of API keys; it holds their hashes only.")]
User = Annotated[str | None, typer.Option(help="The user whose key it is.")]
Operator = Annotated[bool, typer.Option("--operator", help="A key that may act for any user.")]


@keys.command()
def add(file: KeyFile, user: User = None, operator: Operator = False) -> None:
    """Make a key of a user, or of an operator, and print it. It is stored nowhere."""
    from ttt.serve.keys import add_key

    _one_of(user, operator)
    try:
        typer.echo(add_key(file, user))
    except (BadRequest, OSError, ValueError) as error:
        _stop(error)


@keys.command()
def revoke(file: KeyFile, user: User = None, operator: Operator = False) -> None:
    """Remove all keys of a user, or of operators. A running server notices at its next request."""
    from ttt.serve.keys import remove_keys

    _one_of(user, operator)
    try:
        removed = remove_keys(file, user)
    except (OSError, ValueError) as error:
        _stop(error)
    if not removed:
        _stop(f"{file} has no key of {'an operator' if user is None else f'user {user!r}'}; nothing was removed")
    typer.echo(f"{removed} key(s) removed")


@keys.command("ls")
def list_keys(file: KeyFile) -> None:
    """List whose keys there are."""
    from ttt.serve.keys import Keys

    try:
        for digest, entry in Keys(file).entries().items():
            typer.echo(f"{digest[:12]}  {entry.get('user', '(operator)')}")
    except (OSError, ValueError) as error:
        _stop(error)


def add_to(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.add_typer(keys, name="keys")


def _one_of(user: str | None, operator: bool) -> None:
    if (user is None) == (not operator):
        _stop("give either --user or --operator")


def _stop(message: object) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(1)
