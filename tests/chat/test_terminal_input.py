"""What is typed into ``ttt chat``, and what it says where it cannot begin."""

import copy
import shlex

import pytest
from chats import Letters, chat_of, file_of
from typer.testing import CliRunner

import ttt
from ttt.chat import terminal
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
