"""What commands show while something takes long."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text


def doing(console: Console, what: str) -> contextlib.AbstractContextManager:
    """Shows ``what`` is being done: beside a spinner in a terminal, as a line where the output goes elsewhere.

    ``what`` is shown as it is, without rich's markup.
    """
    if console.is_terminal:
        return console.status(Text(what))
    _line(console, what)
    return contextlib.nullcontext()


@contextlib.contextmanager
def progress(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows how far ``what`` is: a bar in a terminal; lines, one for each quarter, where the output goes elsewhere.

    ``what`` is shown as it is, without rich's markup. Yields a function that is to be called with how much is done, and
    how much there is to be done, above 0.
    """
    if console.is_terminal:
        columns = TextColumn("{task.description}", markup=False), BarColumn(bar_width=10), TaskProgressColumn()
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, of: bar.update(task, completed=done, total=of)
        return
    _line(console, f"{what} ...")
    shown = 0

    def told(done: int, of: int) -> None:
        nonlocal shown
        if (quarters := 4 * done // of) > shown:
            shown = quarters
            _line(console, f"{what}: {25 * quarters} %")

    yield told


def _line(console: Console, text: str) -> None:
    """Print ``text`` at once, as it is and as one line, however wide the console is taken to be."""
    console.print(text, markup=False, soft_wrap=True)
    console.file.flush()
