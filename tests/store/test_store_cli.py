"""``ttt users``, ``ttt verify`` and ``ttt gc``."""

import io
import json
import sys
import time

import pytest
import safetensors.torch
import torch
import typer
from states import assert_same_state, blob_paths, files_with, put, small_state
from typer.testing import CliRunner

import ttt
from ttt.cli import app
from ttt.store.table import print_table


@pytest.fixture
def url(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    url = str(tmp_path / "store")
    with ttt.Store(url) as store:
        for seed in (1, 2, 3):
            put(store, "ada", seed)
        put(store, "[red]bob[/red]", 4)
    return url


def run(*arguments, code=0, answer=None):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], input=answer)
    assert done.exit_code == code, done.output
    assert code != 0 or done.exception is None
    return done


def commands(group, *names):
    """Every command of a typer application, with the words that call it."""
    for name, command in group.commands.items():
        yield from commands(command, *names, name) if hasattr(command, "commands") else [((*names, name), command)]


def test_every_command_that_takes_a_store_takes_it_as_the_same_option():
    found = {words: parameter for words, command in commands(typer.main.get_command(app))
             for parameter in command.params if parameter.name == "store"}  # fmt: skip
    of_users = {("users", name) for name in ("ls", "show", "rollback", "forget", "export", "import")}
    assert set(found) == {("chat",), ("serve",), ("verify",), ("gc",)} | of_users
    assert {tuple(parameter.opts) for parameter in found.values()} == {("--store",)}


def test_a_store_has_to_be_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (("users", "ls"), ("users", "show", "ada"), ("verify",), ("gc",)):
        assert "--store" in run(*words, code=2).output
    assert not list(tmp_path.iterdir())


def test_ls_lists_all_users(url, tmp_path):
    lines = run("users", "ls", "--store", url).stdout.splitlines()
    (ada,) = (line for line in lines if "ada" in line)
    with ttt.Store(url) as store:
        (user,) = (u for u in store.users() if u.name == "ada")
    assert [cell.strip() for cell in ada.split("│")[1:5]] == ["ada", "3", "3", str(user.bytes)]
    assert any("[red]bob[/red]" in line for line in lines)  # not markup
    found = json.loads(run("users", "ls", "--store", url, "--json").stdout)
    assert [(u["name"], u["head"], u["versions"]) for u in found] == [("[red]bob[/red]", 1, 1), ("ada", 3, 3)]
    ttt.Store(tmp_path / "new").close()
    assert json.loads(run("users", "ls", "--store", tmp_path / "new", "--json").stdout) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("users", "ls"), ("users", "show", "ada"), ("users", "rollback", "ada", "1"), ("verify",), ("gc",),
        ("users", "forget", "ada", "--yes"), ("users", "export", "ada", "file"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["folder", "file", "sqlite", "empty folder", "empty index", "no blobs"])
def test_commands_refuse_a_store_that_does_not_exist_and_create_nothing(tmp_path, monkeypatch, arguments, kind):
    monkeypatch.chdir(tmp_path)
    url = {"file": f"file://{tmp_path}/gone", "sqlite": f"sqlite:///{tmp_path}/gone/index.db"}.get(kind, "gone")
    if kind in ("empty folder", "empty index"):
        (tmp_path / "gone").mkdir()
    if kind == "empty index":
        (tmp_path / "gone" / "index.db").touch()
    if kind == "no blobs":
        ttt.Store("gone").close()
        (tmp_path / "gone" / "blobs").rmdir()
    before = sorted(tmp_path.rglob("*"))
    done = run(*arguments, "--store", url, code=1)
    assert "StorageFailure: " in done.stderr
    assert str(tmp_path / "gone") in done.stderr or "at gone" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_import_makes_a_store_but_not_for_a_wrong_argument(url, tmp_path):
    torn, sound = tmp_path / "torn", tmp_path / "sound"
    run("users", "export", "--store", url, "ada", sound)
    torn.write_bytes(b"torn")
    run("users", "import", "--store", tmp_path / "new", "ada", torn, code=2)
    run("users", "import", "--store", tmp_path / "new", "a" * 513, sound, code=2)
    assert not (tmp_path / "new").exists()
    run("users", "import", "--store", tmp_path / "new", "ada", sound)
    assert [user.name for user in ttt.Store(tmp_path / "new", create=False).users()] == ["ada"]


def test_show_prints_versions_tensors_and_metadata(url):
    run("users", "rollback", "--store", url, "ada", 1)
    text = run("users", "show", "--store", url, "ada").stdout
    for word in ("layers.0.a", "float64", "3 x 7", '"seed": 1'):
        assert word in text
    found = json.loads(run("users", "show", "--store", url, "ada", "--json").stdout)
    assert [v["number"] for v in found["versions"]] == [4, 3, 2, 1]
    assert found["versions"][0]["source"] == 1
    assert (found["served"], found["damaged"], found["meta"]) == (4, [], {"seed": 1})
    assert found["tensors"]["layers.0.b"] == ["float64", "3 x 5"]


def test_ids_cannot_control_the_terminal(url):
    with ttt.Store(url) as store:
        put(store, "\x1b[2Jeve", 1)
    for command in (
        ("users", "ls", "--store", url),
        ("users", "show", "--store", url, "\x1b[2Jeve"),
        ("users", "forget", "--store", url, "\x1b[2Jeve", "--yes"),
    ):
        assert "\x1b[2J" not in run(*command).output


def test_rollback_respects_leases_unless_told_to_steal(url):
    assert run("users", "rollback", "--store", url, "ada", 1).stdout == "version 4 repeats version 1\n"
    with ttt.Store(url) as store:
        assert_same_state(store.get("ada").tensors, small_state(1))
        with store.lease("ada"):
            assert "LeaseHeld" in run("users", "rollback", "--store", url, "ada", 2, code=1).stderr
            run("users", "rollback", "--store", url, "ada", 2, "--steal")
        assert store.get("ada").version == 5
    assert "it has 1-5" in run("users", "rollback", "--store", url, "ada", 9, code=1).stderr
    assert "UnknownUser" in run("users", "rollback", "--store", url, "eve", 1, code=1).stderr
    run("users", "rollback", "--store", url, "ada", 0, code=2)
    assert [u["name"] for u in json.loads(run("users", "ls", "--store", url, "--json").stdout)] == [
        "[red]bob[/red]",
        "ada",
    ]


def test_forget_asks_before_it_removes(url):
    assert "Remove ada and 3 versions" in run("users", "forget", "--store", url, "ada", code=1, answer="n\n").stdout
    with ttt.Store(url) as store:
        assert store.get("ada").version == 3
        run("users", "forget", "--store", url, "ada", answer="y\n")
        with pytest.raises(ttt.store.UnknownUser):
            store.get("ada")
    run("users", "forget", "--store", url, "[red]bob[/red]", "--yes")
    assert "UnknownUser" in run("users", "forget", "--store", url, "ada", "--yes", code=1).stderr
    assert json.loads(run("users", "ls", "--store", url, "--json").stdout) == []


@pytest.mark.parametrize("answer", [None, "y\n"])
def test_forget_completes_an_interrupted_one_and_erases_every_byte(url, tmp_path, monkeypatch, answer):
    """Also of a user that had a lease only, and without ``--yes``."""
    user = "ada.lovelace@example.org"
    with ttt.Store(url) as store:
        if answer is None:
            put(store, user, 1)
            with monkeypatch.context() as patch:
                patch.setattr(store.index, "scrub", lambda: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    store.forget(user)
        else:
            store.lease(user).release()
        assert files_with(tmp_path, [user.encode()]) != []
        done = run("users", "forget", "--store", url, user, code=answer is None, answer=answer)
        assert ("Remove" in done.stdout) == (answer is not None)
        assert files_with(tmp_path, [user.encode()]) == []
        assert [row.name for row in store.index.user_rows()] == ["ada", "[red]bob[/red]"]


def test_forget_of_an_unknown_user_asks_nothing(url):
    done = run("users", "forget", "--store", url, "nobody", code=1)
    assert "UnknownUser" in done.stderr
    assert done.stdout == ""


def test_tables_of_many_rows_are_printed_quickly(capsys):
    """20,000 rows in at most 2 seconds of the processor: rich's tables take 8 and more."""
    rows = [(f"user-{n}", str(n)) for n in range(20_000)]
    began = time.process_time()
    print_table(("user", "bytes"), rows, right=("bytes",))
    assert time.process_time() - began < 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "│ user       │ bytes │"
    assert lines[2] == "│ user-0     │     0 │"
    assert lines[-1] == "│ user-19999 │ 19999 │"
    assert len(lines) == 20_002


def test_wide_characters_are_aligned_and_plain_terminals_get_ascii(capsys, monkeypatch):
    print_table(("user", "n"), [("日本", "1"), ("ab", "2")])
    assert capsys.readouterr().out.splitlines()[2:] == ["│ 日本 │ 1 │", "│ ab   │ 2 │"]
    with monkeypatch.context() as patch:
        plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        patch.setattr(sys, "stdout", plain)
        print_table(("user",), [("ab",)])
        plain.flush()
    assert plain.buffer.getvalue().decode().splitlines() == ["| user |", "|------|", "| ab   |"]


def test_an_exported_file_can_be_imported(url, tmp_path):
    file = tmp_path / "ada.safetensors"
    run("users", "export", "--store", url, "ada", file)
    assert_same_state(safetensors.torch.load_file(file), small_state(3))
    run("users", "import", "--store", url, "eve", file)
    run("users", "export", "--store", url, "ada", file, "--version", 2)
    run("users", "import", "--store", url, "eve", file)
    with ttt.Store(url) as store:
        for version, seed in ((1, 3), (2, 2)):
            state = store.get("eve", version)
            assert_same_state(state.tensors, small_state(seed))
            assert state.meta == {"seed": seed}
        with store.lease("eve"):
            run("users", "import", "--store", url, "eve", file, code=1)
    safetensors.torch.save_file({"w": torch.ones(2)}, file, {"origin": "elsewhere"})
    run("users", "import", "--store", url, "eve", file)
    with ttt.Store(url) as store:
        assert store.get("eve").meta == {"origin": "elsewhere"}
    file.write_bytes(b"no safetensors")
    assert "not a whole" in run("users", "import", "--store", url, "eve", file, code=2).output
    run("users", "import", "--store", url, "eve", tmp_path / "missing", code=2)
    run("users", "export", "--store", url, "eve", tmp_path / "no folder" / "x", code=1)


def test_verify_reports_damage_and_gc_removes_it(url):
    sound = run("verify", "--store", url).stdout
    assert "4 versions in 4 blobs; 0 damaged; 0 files" in sound
    assert "journal of the index: wal" in sound
    with ttt.Store(url) as store:
        newest = blob_paths(store, "ada")[0]
    newest.write_bytes(newest.read_bytes()[:-1])
    assert "ada" in run("verify", "--store", url, code=1).stdout
    found = json.loads(run("verify", "--store", url, "--json", code=1).stdout)
    assert (found["sound"], found["unreadable"], found["unlisted"], found["journal"]) == (False, [], [], "wal")
    assert [(b["user"], b["version"]) for b in found["damaged"]] == [("ada", 3)]
    shown = run("users", "show", "--store", url, "ada")
    assert "warning: version 3 of 'ada' is damaged" in shown.stderr
    assert '"seed": 2' in shown.stdout
    run("users", "rollback", "--store", url, "ada", 2)
    removed = json.loads(run("gc", "--store", url, "--keep-last", 1, "--keep-days", 0, "--grace", 0, "--json").stdout)
    assert removed["versions"] == 3
    assert removed["blobs"] == 2
    run("verify", "--store", url)


def test_wrong_urls_end_with_an_error(url):
    assert "url must be" in run("users", "ls", "--store", "mysql://x", code=2).output
    assert "StorageFailure" in run("verify", "--store", "/dev/null/store", code=1).stderr
