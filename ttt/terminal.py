"""What commands show while something takes long."""

from __future__ import annotations

import contextlib

from rich.console import Console
from rich.text import Text


def doing(console: Console, what: str) -> contextlib.AbstractContextManager:
    """Shows ``what`` is being done: beside a spinner in a terminal, as a line where the output goes elsewhere.

    ``what`` is shown as it is, without rich's markup.
    """
    if console.is_terminal:
        return console.status(Text(what))
    console.print(what, markup=False)
    console.file.flush()
    return contextlib.nullcontext()
