"""What commands show while something takes long."""

from __future__ import annotations

import contextlib

from rich.console import Console


def doing(console: Console, what: str) -> contextlib.AbstractContextManager:
    """Shows ``what`` is being done: beside a spinner in a terminal, as a line where the output goes elsewhere."""
    if console.is_terminal:
        return console.status(what)
    console.print(what)
    console.file.flush()
    return contextlib.nullcontext()
