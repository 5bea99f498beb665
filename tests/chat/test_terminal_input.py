"""What is typed into ``ttt chat``, and what it says where it cannot begin."""

import copy
import importlib.util
import os
import select
import shlex
import subprocess
import sys
import time

import pytest
from chats import Letters, chat_of, file_of
from typer.testing import CliRunner

import ttt
from ttt.chat import session, terminal
from ttt.cli import app


@pytest.fixture
def command(base, monkeypatch, tmp_path):
    """A function that runs ``ttt chat`` with a store and what is typed; its result."""
    monkeypatch.setattr(terminal, "check_present", lambda model: None)
    monkeypatch.setattr(terminal, "load", lambda model: (copy.deepcopy(base), Letters()))
    monkeypatch.setattr("transformers.TextStreamer", lambda *_, **__: None)

    def run(typed=b"", store=tmp_path / "store", *options):
        arguments = ["chat", "--store", str(store), "--user", "ada", "--max-new-tokens", "5", *options]
        return CliRunner().invoke(app, arguments, input=typed, env={"COLUMNS": "500"})

    return run


def test_a_line_that_is_not_utf_8_is_refused_and_the_chat_goes_on(command, tmp_path):
    done = command(b"hello\nna\xefve\n/\xff\n\xc3\xa9t\xc3\xa9\n/quit\n")
    assert done.exit_code == 0, done.exception
    assert "the line is not valid UTF-8 at character 3: nothing was said" in done.output
    assert "the line is not valid UTF-8 at character 2: nothing was said" in done.output
    assert "learnt 7 tokens" in done.output
    assert "learnt 5 tokens" in done.output  # of the line after them
    assert len(ttt.Store(tmp_path / "store").history("ada")) == 2


def test_text_that_is_no_unicode_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="text must be valid Unicode, got a lone surrogate at character 2"):
        chat_of(base, tmp_path).say("na\udcefve")


@pytest.mark.parametrize("wrong", ["a file", "no index", "an unknown form"])
def test_a_store_that_cannot_be_opened_is_said_before_the_model_is_loaded(command, tmp_path, monkeypatch, wrong):
    monkeypatch.setattr(terminal, "load", lambda model: pytest.fail("loaded"))
    store = tmp_path / "store"
    if wrong == "a file":
        store.write_text("hello")
    elif wrong == "no index":
        store.mkdir()
        (store / "index.db").write_bytes(b"no database" * 500)
    else:
        store = "ftp://nowhere"
    done = command(b"hello\n", store)
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert str(store) in done.output or "the index failed" in done.output
    assert "Traceback" not in done.output


def test_a_user_of_whom_everything_is_damaged_is_said_before_the_model_is_loaded(command, base, tmp_path, monkeypatch):
    store = tmp_path / "the store"
    chat = chat_of(base, store)
    chat.say("hello")
    chat.store.close()
    file_of(store, chat.versions()[0]).write_bytes(b"torn")
    with monkeypatch.context() as patch:
        patch.setattr(terminal, "load", lambda model: pytest.fail("loaded"))
        done = command(b"hello\n", store)
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert "no sound state of 'ada' can be served; version 1: " in done.output
    (advice,) = [line for line in done.output.splitlines() if line.startswith("ttt users forget")]
    name, *arguments = shlex.split(advice.removesuffix(" removes this user, who can then begin anew"))
    assert name == "ttt"
    assert CliRunner().invoke(app, arguments, input="y\n").exit_code == 0
    assert "version 1" in command(b"hello\n", store).output


def test_a_damaged_version_is_said_in_the_chat(command, base, tmp_path):
    store = tmp_path / "store"
    chat = chat_of(base, store)
    chat.say("hello")
    chat.say("my dog is called Biscuit")
    file_of(store, chat.versions()[0]).write_bytes(b"torn")
    done = command(b"hello\n", store)
    assert done.exit_code == 0, done.exception
    assert "version 2 is damaged (" in done.output
    assert "version 1 is loaded in its place" in done.output
    assert "DamagedStateWarning" not in done.output
    assert ttt.Store(store).history("ada")[0].number == 3


@pytest.mark.parametrize(
    ("typed", "said"),
    [("a\0b\x1b[A c\x9bd\te\x7f", ["ab cd\te"]), ("\x1b[1;5Dword\x1b[3~", ["word"]), ("\x1bOAone\x1bOK", ["oneOK"]),
     ("two\nlines", ["two\nlines"]), ("caf\u00e9 \U0001f468\u200d\U0001f469", ["caf\u00e9 \U0001f468\u200d\U0001f469"]),
     ("\x1b[A", []), ("\x07/versions\x1b", [])],
)  # fmt: skip
def test_control_characters_are_dropped(base, tmp_path, talked, monkeypatch, typed, said):
    chat, heard = chat_of(base, tmp_path), []
    monkeypatch.setattr(chat, "say", lambda text, streamer: (heard.append(text), session.Turn("", None, 0, 0.0))[1])
    text = talked(chat, typed)
    assert heard == said
    assert ("there is no version yet" in text) == ("/versions" in typed)


TALK = """
import sys, types
from rich.console import Console
from ttt.chat import Turn, terminal

class Chat:
    user, stored, version = "[b]ada", 0, None

    def versions(self):
        return []

    def say(self, text, streamer):
        print("said", ascii(text))
        return Turn("", None, 0, 0.0)

transformers = types.ModuleType("transformers")
transformers.TextStreamer = lambda *_, **__: None
sys.modules["transformers"] = transformers
terminal.talk(Chat(), None, Console(highlight=False))
"""


@pytest.mark.skipif(importlib.util.find_spec("readline") is None, reason="this Python has no readline")
def test_lines_can_be_edited_at_a_terminal():
    import pty

    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "INPUTRC": os.devnull, "COLUMNS": "120"}
    talking = subprocess.Popen(
        [sys.executable, "-c", TALK], stdin=theirs, stdout=theirs, stderr=theirs, env=environment,
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    shown, ends = b"", time.monotonic() + 240

    def until(text):
        nonlocal shown
        while text not in shown:
            assert select.select([ours], [], [], ends - time.monotonic())[0], shown
            shown += os.read(ours, 4096)
        before, _, shown = shown.partition(text)
        return before.decode()

    question = b"Remove 0 version(s) of [b]ada, all that was learnt, for good? (yes/no) "
    try:
        prompt = until(b"you>")
        assert "\033[1m" in prompt
        assert "\001" not in prompt
        for keys, found in (
            (b"hallo wrld" + 3 * b"\x1b[D" + b"o\n", b"said 'hallo world'"),
            (b"\x1b[A\x01oh, \n", b"said 'oh, hallo world'"),  # the line before, with words at its beginning
            (b"/forget\n", question),
            (b"nono\x7f\x7f\n", b"nothing was removed"),
            (b"\x1b[A\n", question),  # the answer is not among the lines before
            (b"\n", b"nothing was removed"),
        ):
            os.write(ours, keys)
            until(found)
            if found != question:
                until(b"you>")
        os.write(ours, b"\x04")
        assert talking.wait(60) == 0
    finally:
        talking.kill()
        talking.wait()
        os.close(ours)
