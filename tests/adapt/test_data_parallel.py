"""Processes that read texts of their own learn what one process would learn from all texts in one batch."""

import pytest
from two_processes import run_in_two

CHECKS = ["own_texts", "own_texts_guarded", "own_texts_on_two_dimensions", "own_losses", "own_texts_refused"]


@pytest.fixture(scope="module")
def found(forks, tmp_path_factory):
    """What each of two processes found."""
    return run_in_two(forks, "data_parallel.py", tmp_path_factory.mktemp("data_parallel"))


@pytest.mark.parametrize("name", CHECKS)
def test_all_processes_learn_from_all_texts_or_none_does(found, name):
    assert [each[name] for each in found] == [[], []]
