"""Learnt state and weights in torch.distributed.checkpoint, between one process and two."""

import pytest
from two_processes import run_in_two

REFUSED = {
    "users": "was adapted for users, each with weights of their own, and cannot be put into a checkpoint",
    "not adapted": "has no learning layer; call ttt.adapt_(model, config) first",
    "no module": "model must be",
    "other content": "state_dict must hold bytes named 'safetensors', as a ttt.LearntState gives, got ['weight']",
    "damaged": "LearntState.safetensors is truncated, damaged or no safetensors file",
    "other base": "belongs to another base model",
}


@pytest.fixture(scope="module")
def found(forks, tmp_path_factory):
    """What each of two processes found."""
    return run_in_two(forks, "distributed_checkpoint.py", tmp_path_factory.mktemp("distributed_checkpoint"))


@pytest.mark.parametrize("name", ["state", "weights", "nothing_to_save"])
def test_what_is_loaded_is_what_was_saved(found, name):
    assert [each[name] for each in found] == [[], []]


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name_in_every_process(found, name):
    for each in found:
        assert REFUSED[name] in each["refused"]["errors"][name]


def test_refusals_change_nothing(found):
    assert [each["refused"]["unlike"] for each in found] == [[], []]
