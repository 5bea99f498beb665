"""``ttt users ...``, ``ttt verify`` and ``ttt gc``: a store from the command line.

``--store`` is a URL of `ttt.Store`, as for ``ttt chat`` and ``ttt serve``, and has no default. Exit codes: 0 done;
1 the store refused or failed (unknown user, held lease, damage); 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from ttt.files import write_atomically
from ttt.store.errors import DamagedStateWarning, StoreError
from ttt.store.serialization import decode, encode
from ttt.store.store import State, Store
from ttt.store.table import print_table
from ttt.user_name import check_user_name

users = typer.Typer(no_args_is_help=True, help="Per-user weights in a store: list, show, roll back, forget, exchange.")

_NUMBERS = ("version", "kept", "bytes", "repeats")  # columns that align right

StoreUrl = Annotated[str, typer.Option("--store", metavar="STORE", help="URL of the store; a path names a folder.")]
UserId = Annotated[str, typer.Argument(metavar="USER", help="Id of the user.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON for machines instead of a table.")]
Steal = Annotated[bool, typer.Option("--steal", help="Take the user over from a process that holds the lease.")]


@users.command("ls")
def list_users(store: StoreUrl, as_json: AsJson = False) -> None:
    """List all users."""
    with _opened(store) as opened:
        found = opened.users()
        if as_json:
            _print_json([user._asdict() for user in found])
            return
        rows = [(_shown(u.name), str(u.head), str(u.versions), str(u.bytes), _date(u.updated)) for u in found]
        print_table(("user", "version", "kept", "bytes", "written"), rows, _NUMBERS)


@users.command()
def show(store: StoreUrl, user: UserId, as_json: AsJson = False) -> None:
    """Show a user's versions, and the tensors and metadata of the newest."""
    with _opened(store) as opened:
        history, state = opened.history(user), _served(opened, user)
        tensors = {name: (str(t.dtype).removeprefix("torch."), _shape(t)) for name, t in state.tensors.items()}
        if as_json:
            about = {"user": user, "served": state.version, "damaged": state.damaged, "meta": state.meta}
            _print_json(about | {"tensors": tensors, "versions": [version._asdict() for version in history]})
            return
        rows = []
        for version in history:
            repeats = "" if version.source is None else str(version.source)
            numbers = str(version.number), str(version.size)
            rows.append((*numbers, _date(version.created), repeats, version.sha256[:16]))
        print_table(("version", "bytes", "written", "repeats", "sha256"), rows, _NUMBERS)
        shapes = [(_shown(name), dtype, shape) for name, (dtype, shape) in tensors.items()]
        print_table(("tensor", "dtype", "shape"), shapes)
        _print_json(state.meta)


@users.command()
def rollback(
    store: StoreUrl,
    user: UserId,
    version: Annotated[int, typer.Argument(min=1, help="The version to go back to.")],
    steal: Steal = False,
) -> None:
    """Make a new version that equals an old one, bit for bit."""
    with _opened(store) as opened:
        opened.history(user)  # a lease would add an unknown user to the index
        with opened.lease(user, steal=steal) as lease:
            print(f"version {opened.rollback(user, version, lease=lease)} repeats version {version}")


@users.command()
def forget(
    store: StoreUrl, user: UserId, yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False
) -> None:
    """Remove a user for good, with all versions, or complete a removal that was interrupted."""
    with _opened(store) as opened:
        # Of an unknown user nothing can be lost, but an interrupted removal may have left something to erase.
        if not yes and opened.index.knows(user):
            count = len(opened.index.versions(user, missing_ok=True))
            typer.confirm(f"Remove {_shown(user)} and {count} versions for good?", abort=True)
        opened.forget(user)
        print(f"{_shown(user)} is forgotten")


@users.command("export")
def export_user(
    store: StoreUrl,
    user: UserId,
    file: Annotated[Path, typer.Argument(metavar="FILE", dir_okay=False, help="The safetensors file to write.")],
    version: Annotated[int | None, typer.Option(min=1, help="By default the newest.")] = None,
) -> None:
    """Write a user's state to a safetensors file."""
    with _opened(store) as opened:
        state = opened.get(user, version) if version else _served(opened, user)
        write_atomically(file, encode(state.tensors, state.meta))
        print(f"version {state.version} of {_shown(user)} is in {file}")


@users.command("import")
def import_user(
    store: StoreUrl,
    user: UserId,
    file: Annotated[Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="A safetensors file.")],
    steal: Steal = False,
) -> None:
    """Make a safetensors file a user's newest version."""
    with _errors_shown():
        check_user_name(user)
        data = file.read_bytes()
    try:
        tensors, meta = decode(data)
    except ValueError as error:
        raise typer.BadParameter(f"{file} is {error}", param_hint="FILE") from None
    # Opened only now: a wrong argument must leave no store behind.
    with _opened(store, create=True) as opened, opened.lease(user, steal=steal) as lease:
        print(f"{file} is version {opened.put(lease, tensors, meta)} of {_shown(user)}")


def verify(store: StoreUrl, as_json: AsJson = False) -> None:
    """Read every stored state and check it; exit with 1 if one is missing or damaged."""
    with _opened(store) as opened:
        report = opened.verify()
        if as_json:
            names = ("damaged", "orphans", "unreadable")
            lists = {name: [item._asdict() for item in getattr(report, name)] for name in names}
            _print_json({"sound": report.sound} | report._asdict() | lists)
        else:
            rows = [
                (_shown(broken.user), str(broken.version), problem, broken.reason)
                for problem, found in (("damaged", report.damaged), ("unreadable", report.unreadable))
                for broken in found
            ]
            if rows:
                print_table(("user", "version", "problem", "reason"), rows, _NUMBERS)
            for folder in report.unlisted:
                print(f"cannot be listed: {folder}")
            size = sum(file.size for file in report.orphans)
            unreadable = f"; {len(report.unreadable)} unreadable" if report.unreadable else ""
            problems = f"{len(report.damaged)} damaged{unreadable}"
            orphans = f"{len(report.orphans)} files that no version names ({size} bytes; gc removes them)"
            print(f"{report.versions} versions in {report.blobs} blobs; {problems}; {orphans}")
            print(f"journal of the index: {report.journal}")
        if not report.sound:
            raise typer.Exit(1)


def gc(
    store: StoreUrl,
    keep_last: Annotated[int, typer.Option(min=1, help="Versions kept of each user.")] = 10,
    keep_days: Annotated[float, typer.Option(min=0, help="Younger versions are kept, too.")] = 7,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that a file without a version is kept.")] = 3600,
    as_json: AsJson = False,
) -> None:
    """Remove versions past retention, and files that no version names."""
    with _opened(store) as opened:
        removed = opened.gc(keep_last=keep_last, keep_days=keep_days, grace=grace)
        if as_json:
            _print_json(removed._asdict())
        else:
            blobs = f"{removed.blobs} blobs ({removed.bytes} bytes)"
            print(f"removed {removed.versions} versions, {blobs}, {removed.users} users")


def add_to(app: typer.Typer) -> None:
    """Add ``users``, ``verify`` and ``gc``."""
    app.add_typer(users, name="users")
    app.command()(verify)
    app.command()(gc)


@contextlib.contextmanager
def _opened(url: str, create: bool = False) -> Iterator[Store]:
    """Open the store, which must exist unless ``create``; its errors end the command with a line on stderr."""
    with _errors_shown(), Store(url, create=create) as store:
        yield store


@contextlib.contextmanager
def _errors_shown() -> Iterator[None]:
    """Errors of the store and of files end the command with a line on stderr."""
    try:
        yield
    except (StoreError, OSError, ImportError) as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from error
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _served(store: Store, user: str) -> State:
    """The state that `Store.get` serves; damage is reported on stderr."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DamagedStateWarning)
        state = store.get(user)
    for warning in caught:
        typer.echo(f"warning: {warning.message}", err=True)
    return state


def _shown(text: str) -> str:
    """``text`` with what could control a terminal escaped."""
    return text if text.isprintable() else repr(text)


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))
