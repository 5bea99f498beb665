"""Fixtures of the tests of chats."""

import io

import pytest
from chats import Letters
from rich.console import Console
from tiny_models import tiny

from ttt.chat import terminal


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """The folder of this test's calibrations."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ttt"


@pytest.fixture
def base(monkeypatch):
    monkeypatch.setattr("ttt.learn.own_text.LENGTH", 48)
    return tiny()


@pytest.fixture
def talked(monkeypatch):
    """A function that talks with a chat in lines, and returns what the terminal showed.

    An exception in the place of a line is raised where that line is awaited.
    """

    def talk(chat, *lines, streamer=None, **options):
        out, rest = io.StringIO(), iter(lines)
        monkeypatch.setattr("transformers.TextStreamer", lambda *_, **__: streamer)
        console = Console(file=out, width=200)

        def read(*_, **__):
            line = next(rest, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(console, "input", read)
        terminal.talk(chat, Letters(), console, **options)
        return out.getvalue()

    return talk
