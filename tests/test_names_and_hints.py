"""What can be a user's name, the same for weights and for the store, and how what is optional is installed."""

import pytest

import ttt
from ttt import installing
from ttt.user_name import LONGEST, check_user_name

GOOD = ["a", "Ada Lovelace", "\u00fc" * (LONGEST // 2), "a/../b", " "]


def test_every_name_that_is_taken_can_be_stored(tmp_path):
    with ttt.Store(tmp_path / "store") as store:
        for user in GOOD:
            assert check_user_name(user) == user
            store.lease(user).release()
    for user, error, message in (
        ("", ValueError, r"got '' \(0 bytes\)"), ("\u00fc" * 257, ValueError, r"1 to 512 bytes .*\(514 bytes\)"),
        ("a\0b", ValueError, "without NUL"), ("\udc00", ValueError, "UTF-8 can hold"),
        (None, ValueError, "got None, which stands for the base model"), (1, TypeError, "a string, got int 1"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            check_user_name(user)


def test_in_a_clone_the_hint_installs_from_there(monkeypatch, tmp_path):
    monkeypatch.setattr(installing, "ROOT", tmp_path)
    assert installing.how_to_install("serve") == "pip install '.[serve]' in a clone of ttt's repository"
    (tmp_path / "pyproject.toml").touch()
    assert installing.how_to_install("serve") == f"pip install -e '.[serve]' in {tmp_path}"
