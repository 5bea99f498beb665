"""Processes that each hold a whole model learn from what all of them read, and stay the same to the bit."""

import pytest
from tiny_models import tiny
from two_processes import run_in_two

import ttt

CHECKS = ["own_texts", "own_texts_of_experts", "beside_an_optimizer", "refused"]


@pytest.fixture(scope="module")
def found(forks, tmp_path_factory):
    """What each of two processes found."""
    return run_in_two(forks, "replicas.py", tmp_path_factory.mktemp("replicas"))


@pytest.mark.parametrize("name", CHECKS)
def test_replicas_learn_from_all_texts_or_not_at_all(found, name):
    assert [each[name] for each in found] == [[], []]


def test_a_process_without_a_group_is_refused():
    model = ttt.adapt_(tiny(), ttt.TTTConfig(target_modules=["down_proj"], protect=[]))
    for call in (lambda: ttt.Learner(model, data_parallel=True), lambda: learn(model)):
        with pytest.raises(ValueError, match=r"belongs to no group.*init_process_group"):
            call()


def learn(model):
    with ttt.learning(model, data_parallel=True):
        pass
