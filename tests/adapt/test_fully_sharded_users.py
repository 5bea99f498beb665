"""Users of a model that FSDP2 shards learn in all processes what they would in one."""

import pytest
from two_processes import run_in_two


@pytest.fixture(scope="module")
def found(forks, tmp_path_factory):
    """What each of two processes found."""
    return run_in_two(forks, "fully_sharded_users.py", tmp_path_factory.mktemp("fully_sharded_users"))


@pytest.mark.parametrize("name", ["users", "users_guarded", "users_refused"])
def test_users_learn_the_same_in_all_processes_or_are_refused(found, name):
    assert [each[name] for each in found] == [[], []]
