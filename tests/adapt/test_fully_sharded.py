"""FSDP2 with layers that learn left out of sharding: they learn in each process what they would in one."""

import pytest
from two_processes import run_in_two

RIGHT = ["reading", "own_text", "guarded", "any_loss", "saving"]
DOES_NOT_WORK = "model is sharded by FSDP2, with which"

REFUSED = {
    "adapt sharded": "model.layers.0.mlp.up_proj.weight is a DTensor",
    "load sharded": "Leave it out of sharding, by fully_shard(module, ignored_params=",
    "adapt sharded, users": "model.layers.0.mlp.up_proj.weight is a DTensor",
    "fork": "model is a FSDPModule, which is not supported",
    "peft": "model is a FSDPModule, which is not supported",
    "capturable": "model is a FSDPModule, which is not supported",
    "rules": f"{DOES_NOT_WORK} ttt.Learner(rules=...) does not work",
    "episodes": f"{DOES_NOT_WORK} ttt.Learner(episodes=...) does not work",
    "growing": f"{DOES_NOT_WORK} ttt.GrowingLearner does not work",
    "tasks": f"{DOES_NOT_WORK} a Trainer of tasks does not work",
    "other text": "got others in one of them (input_ids)",
    "other prompt": "input_ids, attention_mask and options must be the same in all processes",
}
TOO_LATE = ["FSDP2 too late", "FSDP2 too late, reset", "tensor parallel too late", "FSDP2 too late, users"]


@pytest.fixture(scope="module")
def found(forks, tmp_path_factory):
    """What each of two processes found."""
    return run_in_two(forks, "fully_sharded.py", tmp_path_factory.mktemp("fully_sharded"))


@pytest.mark.parametrize("name", RIGHT)
def test_layers_that_are_left_out_of_sharding_learn_what_they_do_in_one_process(found, name):
    assert [each[name] for each in found] == [[], []]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name_in_every_process(found, name):
    for each in found:
        error = each["unsupported"]["errors"][name]
        assert error.startswith("ValueError: ")
        assert REFUSED[name] in error


@pytest.mark.parametrize("name", TOO_LATE)
def test_a_learner_of_a_model_that_was_sharded_later_is_refused(found, name):
    for each in found:
        error = each["unsupported"]["errors"][name]
        assert error.startswith("RuntimeError: Learner.")
        assert "it was sharded over processes since then; shard it first, then make a new one with ttt.Learner" in error


def test_refusals_change_nothing(found):
    assert [each["unsupported"]["changed"] for each in found] == [[], []]
