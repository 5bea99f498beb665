"""Layers that are sharded over two processes learn what they would in one, or are refused by name."""

import pytest
from two_processes import run_in_two

BARE = ["default", "plain", "energy", "rms", "power", "ewc", "si", "mas", "replay", "distillation", "generated",
        "orthogonal", "float32"]  # fmt: skip
MODELS = ["language_model", "guarded", "auto", "saving", "layouts", "converted", "infinite"]

REFUSED = {
    "users": "up_proj.weight is a DTensor",
    "8bit": "state_dtype must be 'float32' or 'bfloat16' for model.layers.0.mlp.up_proj",
    "replicated": "0.weight is a DTensor with placements (Replicate(),)",
    "empty part": "0.weight of shape (1, 8) is sharded unevenly over 2 processes",
    "fork": "with which this call does not work",
    "peft": "with which this call does not work",
    "capturable": "with which this call does not work",
    "rules": "with which ttt.Learner(rules=...) does not work",
    "episodes": "with which ttt.Learner(episodes=...) does not work",
    "experts": "with which ttt.GrowingLearner does not work",
    "other text": "got others in one of them (input_ids)",
    "other mask": "got others in one of them (learn_mask)",
    "other prompt": "input_ids, attention_mask and options must be the same in all processes",
}


@pytest.fixture(scope="module")
def found(forks, tmp_path_factory):
    """What each of two processes found."""
    return run_in_two(forks, "tensor_parallel.py", tmp_path_factory.mktemp("tensor_parallel"), timeout=900)


def test_nothing_else_was_looked_for(found):
    for each in found:
        assert sorted(each) == sorted([*BARE, *MODELS, "unsupported"])


@pytest.mark.parametrize("name", BARE)
def test_sharded_layers_learn_what_whole_ones_do(found, name):
    assert [each[name] for each in found] == [[], []]


@pytest.mark.parametrize("name", MODELS)
def test_sharded_models_learn_what_whole_ones_do(found, name):
    assert [each[name] for each in found] == [[], []]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name_in_every_process(found, name):
    for each in found:
        error = each["unsupported"]["errors"][name]
        assert error.startswith("ValueError: ")
        assert REFUSED[name] in error


def test_a_file_that_the_first_process_cannot_write_is_an_error_in_all(found):
    first, second = (each["unsupported"]["errors"]["no folder"] for each in found)
    assert first.startswith("FileNotFoundError: ")
    assert second.startswith("OSError: ")
    assert "the first process of the group could not write the file" in second


def test_refusals_change_nothing(found):
    assert [each["unsupported"]["unchanged"] for each in found] == [True, True]
