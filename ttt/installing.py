"""How what is optional is installed, for error messages."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def how_to_install(extra: str) -> str:
    """The command that installs the packages of ``extra``, as "serve", and the clone in which it is to be run."""
    if (ROOT / "pyproject.toml").is_file():
        return f"pip install -e '.[{extra}]' in {ROOT}"
    return f"pip install '.[{extra}]' in a clone of ttt's repository"
