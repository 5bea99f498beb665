"""``python -m ttt users``, ``verify`` and ``gc``."""

import json

import pytest
import safetensors.torch
import torch
from states import assert_same_state, blob_paths, put, small_state
from typer.testing import CliRunner

import ttt
from ttt.cli import app


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


def test_ls(url, tmp_path):
    lines = run("users", "ls", url).stdout.splitlines()
    (ada,) = (line for line in lines if "ada" in line)
    with ttt.Store(url) as store:
        (user,) = (u for u in store.users() if u.name == "ada")
    assert [cell.strip() for cell in ada.split("│")[1:5]] == ["ada", "3", "3", str(user.bytes)]
    assert any("[red]bob[/red]" in line for line in lines)  # not markup
    found = json.loads(run("users", "ls", url, "--json").stdout)
    assert [(u["name"], u["head"], u["versions"]) for u in found] == [("[red]bob[/red]", 1, 1), ("ada", 3, 3)]
    assert json.loads(run("users", "ls", tmp_path / "new", "--json").stdout) == []


def test_show(url):
    run("users", "rollback", url, "ada", 1)
    text = run("users", "show", url, "ada").stdout
    for word in ("layers.0.a", "float64", "3 x 7", '"seed": 1'):
        assert word in text
    found = json.loads(run("users", "show", url, "ada", "--json").stdout)
    assert [v["number"] for v in found["versions"]] == [4, 3, 2, 1]
    assert found["versions"][0]["source"] == 1
    assert (found["served"], found["damaged"], found["meta"]) == (4, [], {"seed": 1})
    assert found["tensors"]["layers.0.b"] == ["float64", "3 x 5"]


def test_ids_cannot_control_the_terminal(url):
    with ttt.Store(url) as store:
        put(store, "\x1b[2Jeve", 1)
    for command in (
        ("users", "ls", url),
        ("users", "show", url, "\x1b[2Jeve"),
        ("users", "forget", url, "\x1b[2Jeve", "--yes"),
    ):
        assert "\x1b[2J" not in run(*command).output


def test_rollback(url):
    assert run("users", "rollback", url, "ada", 1).stdout == "version 4 repeats version 1\n"
    with ttt.Store(url) as store:
        assert_same_state(store.get("ada").tensors, small_state(1))
        with store.lease("ada"):
            assert "LeaseHeld" in run("users", "rollback", url, "ada", 2, code=1).stderr
            run("users", "rollback", url, "ada", 2, "--steal")
        assert store.get("ada").version == 5
    assert "it has 1-5" in run("users", "rollback", url, "ada", 9, code=1).stderr
    assert "UnknownUser" in run("users", "rollback", url, "eve", 1, code=1).stderr
    run("users", "rollback", url, "ada", 0, code=2)
    assert [u["name"] for u in json.loads(run("users", "ls", url, "--json").stdout)] == ["[red]bob[/red]", "ada"]


def test_forget_asks(url):
    assert "Remove ada and 3 versions" in run("users", "forget", url, "ada", code=1, answer="n\n").stdout
    with ttt.Store(url) as store:
        assert store.get("ada").version == 3
        run("users", "forget", url, "ada", answer="y\n")
        with pytest.raises(ttt.store.UnknownUser):
            store.get("ada")
    run("users", "forget", url, "[red]bob[/red]", "--yes")
    assert "UnknownUser" in run("users", "forget", url, "ada", "--yes", code=1).stderr
    assert json.loads(run("users", "ls", url, "--json").stdout) == []


def test_export_and_import(url, tmp_path):
    file = tmp_path / "ada.safetensors"
    run("users", "export", url, "ada", file)
    assert_same_state(safetensors.torch.load_file(file), small_state(3))
    run("users", "import", url, "eve", file)
    run("users", "export", url, "ada", file, "--version", 2)
    run("users", "import", url, "eve", file)
    with ttt.Store(url) as store:
        for version, seed in ((1, 3), (2, 2)):
            state = store.get("eve", version)
            assert_same_state(state.tensors, small_state(seed))
            assert state.meta == {"seed": seed}
        with store.lease("eve"):
            run("users", "import", url, "eve", file, code=1)
    safetensors.torch.save_file({"w": torch.ones(2)}, file, {"origin": "elsewhere"})
    run("users", "import", url, "eve", file)
    with ttt.Store(url) as store:
        assert store.get("eve").meta == {"origin": "elsewhere"}
    file.write_bytes(b"no safetensors")
    assert "not a whole" in run("users", "import", url, "eve", file, code=2).output
    run("users", "import", url, "eve", tmp_path / "missing", code=2)
    run("users", "export", url, "eve", tmp_path / "no folder" / "x", code=1)


def test_verify_and_gc(url):
    assert "4 versions in 4 blobs; 0 damaged; 0 files" in run("verify", url).stdout
    with ttt.Store(url) as store:
        newest = blob_paths(store, "ada")[0]
    newest.write_bytes(newest.read_bytes()[:-1])
    assert "ada" in run("verify", url, code=1).stdout
    found = json.loads(run("verify", url, "--json", code=1).stdout)
    assert not found["sound"]
    assert [(b["user"], b["version"]) for b in found["damaged"]] == [("ada", 3)]
    shown = run("users", "show", url, "ada")
    assert "warning: version 3 of 'ada' is damaged" in shown.stderr
    assert '"seed": 2' in shown.stdout
    run("users", "rollback", url, "ada", 2)
    removed = json.loads(run("gc", url, "--keep-last", 1, "--keep-days", 0, "--grace", 0, "--json").stdout)
    assert removed["versions"] == 3
    assert removed["blobs"] == 2
    run("verify", url)


def test_wrong_urls(url):
    assert "url must be" in run("users", "ls", "mysql://x", code=2).output
    assert "StorageFailure" in run("verify", "/dev/null/store", code=1).stderr
