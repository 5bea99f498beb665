"""``ttt chat`` in the terminal: reading lines, commands, and printing answers as they are written."""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import io
import re
import shlex
import sqlite3
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from ttt.chat.session import Chat
from ttt.demo.language_model import check_present, load
from ttt.store import DamagedState, DamagedStateWarning, LeaseHeld, StaleLease, Store, StoreError, UnknownUser
from ttt.terminal import doing, progress

HELP = (
    "/study  /versions  /rollback NUMBER  /forget  /help  /quit; anything else is said to the model, "
    "and //WORDS as /WORDS"
)
SURE = "/forget!"
"""As ``/forget``, without the question."""
FREEING = (
    "the disk is full; ttt gc --store {store} --keep-last 1 --keep-days 0 --grace 0 removes all versions of each user "
    "but the newest"
)
FORGETTING = "ttt users forget --store {store} {user} removes this user, who can then begin anew"

_CONTROL = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|O[A-DFHP-S])|(?![\t\n])[\x00-\x1f\x7f-\x9f]")
"""Control characters other than tabs and line ends, and what terminals send for keys that have no character."""


def run(model: Path | None, store: str, user: str, max_new_tokens: int, learn: bool) -> None:
    """Talk until the input ends; see `ttt.cli.chat`."""
    console = Console(highlight=False)
    try:
        check_present(model)
        opened = Store(store)
        _check_readable(opened, user)  # before the model is loaded, which takes long
        loaded, tokenizer = load(model)
        chat = Chat(
            loaded, tokenizer, opened, user, max_new_tokens=max_new_tokens, learn=learn,
            progress=functools.partial(progress, console), notice=functools.partial(_say, console, style="yellow"),
        )  # fmt: skip
        known = len(chat.versions())
    except (ImportError, OSError, ValueError, StoreError) as error:
        hint = ""
        if isinstance(error, DamagedState):
            hint = f"\n{FORGETTING.format(store=shlex.quote(store), user=shlex.quote(user))}"
        typer.echo(f"{_why(error, store)}{hint}", err=True)
        raise typer.Exit(1) from None
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that cannot be decoded is refused, and the next read
    _say(console, f"{user} has {known} version(s) in {store}. {HELP}", "dim")
    talk(chat, tokenizer, console, store)


def talk(chat: Chat, tokenizer: Any, console: Console, store: str = "STORE") -> None:
    """Read lines and answer them until the input ends or ``/quit``.

    Ctrl-C stops an answer or a command, which then has taught nothing. Where a line is awaited it raises
    KeyboardInterrupt.

    Args:
        store: what advice names as the URL of the chat's store.
    """
    from transformers import TextStreamer

    while True:
        try:
            line = _CONTROL.sub("", _typed(console, "you>")).strip()
        except EOFError:
            return
        if line == "/quit":
            return
        stored = chat.stored
        try:
            _check_decoded(line)
            if _is_command(line):
                command(chat, line, console)
            elif line:
                streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
                turn = chat.say(line[1:] if line.startswith("//") else line, streamer)
                if turn.version is not None:
                    found = f"learnt {turn.tokens} tokens ({turn.nll:.2f} nats each): version {turn.version}"
                    _say(console, found, "dim")
                elif turn.refused is not None:
                    _say(console, f"nothing was learnt: {_why(turn.refused, store)}", "red")
        except (ValueError, FloatingPointError, StoreError) as error:
            _say(console, _why(error, store), "red")
        except KeyboardInterrupt:
            _say(console, _stopped(chat, line, chat.stored > stored), "yellow")


def _is_command(line: str) -> bool:
    return line.startswith("/") and not line.startswith("//")


def _why(error: Exception, store: str) -> str:
    """What to tell who talks of an ``error``: of leases, what another process does; of a full disk, what frees it."""
    if isinstance(error, LeaseHeld):
        return f"another chat or server has the right to write what this user is learning ({error})"
    if isinstance(error, StaleLease):
        return f"another chat or server has taken this user over, or removed them ({error})"
    return f"{error}\n{FREEING.format(store=shlex.quote(store))}" if _is_disk_full(error) else str(error)


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            return True
        if isinstance(error, sqlite3.Error) and "is full" in str(error):
            return True
        error = error.__cause__
    return False


def _stopped(chat: Chat, line: str, stored: bool) -> str:
    """What Ctrl-C has stopped; ``stored``: whether a version was stored before that."""
    if stored:
        return f"\nstopped; version {chat.version} was stored before"
    if not _is_command(line):
        return "\nstopped: what you said is not part of the conversation, and nothing was learnt from it"
    name = line.split()[0]
    if name in ("/forget", SURE):
        return f"\nstopped: something may be left; {SURE} completes it"
    return f"\nstopped: {name} has changed nothing"


def _typed(console: Console, prompt: str, *, bold: bool = True, remember: bool = True) -> str:
    """The line that is typed after ``prompt``; at a terminal it can be edited, where Python has readline.

    Args:
        remember: whether the arrow keys bring it back later.

    Raises:
        EOFError: at the end of the input.
    """
    readline = _readline(console)
    if readline is None:
        return console.input(Text.assemble((prompt, "bold" if bold else ""), " "))
    if bold and not console.is_dumb_terminal and "libedit" not in (readline.__doc__ or ""):
        prompt = f"\001\033[1m\002{prompt}\001\033[0m\002"  # between 1 and 2: what takes no room on the screen
    readline.set_auto_history(remember)
    return input(f"{prompt} ")


def _readline(console: Console) -> types.ModuleType | None:
    """Python's readline, by which `input` reads lines once it is imported; None without it, or without a terminal."""
    if not (console.is_terminal and sys.stdin.isatty() and sys.stdout.isatty()):
        return None
    try:
        import readline
    except ImportError:
        return None
    return readline


def _check_readable(store: Store, user: str) -> None:
    """Raise StoreError if the store cannot be read, or no sound version is left of ``user``."""
    with warnings.catch_warnings(), contextlib.suppress(UnknownUser):
        warnings.simplefilter("ignore", DamagedStateWarning)  # `Chat` says it
        store.get(user)


def _check_decoded(line: str) -> None:
    """Raise ValueError if ``line`` has bytes that could not be decoded."""
    try:
        line.encode()
    except UnicodeEncodeError as error:
        encoding = getattr(sys.stdin, "encoding", None) or "UTF-8"
        raise ValueError(
            f"the line is not valid {encoding.upper()} at character {error.start + 1}: nothing was said"
        ) from None


def _confirmed(chat: Chat, console: Console) -> bool:
    """Whether who sits at the terminal says yes to forgetting; where lines come from elsewhere nobody is asked."""
    if not sys.stdin.isatty():
        return True
    count = len(chat.versions())
    question = f"Remove {count} version(s) of {chat.user}, all that was learnt, for good? (yes/no)"
    try:
        return _typed(console, question, bold=False, remember=False).strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        console.print()  # the cursor is still behind the question
        return False


def _say(console: Console, text: str, style: str) -> None:
    """Print ``text`` as it is: brackets in it are no markup of rich's, and only the terminal breaks lines."""
    console.print(text, style=style, markup=False, soft_wrap=True)


def command(chat: Chat, line: str, console: Console) -> None:
    """Do what a line that begins with a slash asks for.

    Raises:
        ValueError: if there is no such command, or its argument is wrong.
    """
    name, _, argument = line.partition(" ")
    if argument and name in ("/study", "/versions", "/forget", SURE, "/help", "/quit"):
        raise ValueError(f"{name} takes no argument, got {argument!r}")
    if name == "/versions":
        versions = chat.versions()
        if not versions:
            console.print("there is no version yet: nothing was learnt")
        for found in versions:
            when = datetime.datetime.fromtimestamp(found.created).isoformat(" ", "seconds")
            console.print(f"{found.number:>5}  {when}" + (f"  as {found.source}" if found.source else ""))
    elif name == "/rollback":
        digits = argument.strip()
        if not (digits.isascii() and digits.isdecimal() and len(digits) <= 18):
            raise ValueError(f"/rollback needs the number of a version, got {argument!r}")
        console.print(f"version {chat.rollback(int(digits))} is as {int(digits)} was; the conversation begins anew")
    elif name == "/study":
        with doing(console, "The model reads again what you said ..."):
            output, version = chat.study()
        if version is None:
            console.print("nothing new was said")
        else:
            first, last = output.losses[0], output.losses[-1]
            console.print(
                f"studied {output.episodes} piece(s) {len(output.losses)} times ({first:.2f} to {last:.2f} nats per "
                f"token): version {version}"
            )
    elif name in ("/forget", SURE):
        if name == SURE or _confirmed(chat, console):
            chat.forget()
            console.print("the conversation begins anew, and everything that was learnt is removed")
        else:
            console.print("nothing was removed")
    elif name == "/help":
        _say(console, HELP, "")
    else:
        raise ValueError(f"{name} is no command; {HELP}")
