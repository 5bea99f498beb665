"""What fails in one of two processes that share a model fails in both, at once and by name, and changes nothing."""

import pytest
from two_processes import run_in_two

# What each process raises: the one that does not fail by itself, and the one that does.
ANOTHER = "RuntimeError: {} was refused in another process that shares the model, whose error says why"
OWN = {
    "observe: a token outside of the vocabulary": "ValueError: input_ids must be in [0, 61)",
    "observe: no tensor": "TypeError: input_ids must be a dense tensor",
    "observe: passes": "ValueError: passes must be a whole number of at least 1, got 0",
    "observe: torn": "RuntimeError: Learner.observe needs layers that belong together",
    "observe: training": "RuntimeError: Learner.observe needs the model in eval mode",
    "generate: no tokens": "ValueError: max_new_tokens must be a whole number of at least 1, got 0",
    "generate: too many tokens": "ValueError: the prompt's 12 tokens and max_new_tokens = 1000000 must fit",
    "generate: a mask": "ValueError: attention_mask must mark padding on the left only",
    "calibrate: a batch": "ValueError: each of batches must be in [0, 61)",
    "calibrate: no more data": "OSError: no more data",
    "calibrate: no more data, with a loss": "OSError: no more data",
    "calibrate: training": "RuntimeError: Learner.calibrate needs the model in eval mode",
    "calibrate: a loss": "TypeError: loss must be a function of (model, batch) or None, got int",
    "calibrate: batches": "TypeError: batches must be an iterable of batches, got int",
    "rollback: no snapshot": "TypeError: snapshot must be what Learner.snapshot returns, got int",
    "rollback: another model's": "ValueError: snapshot does not fit this model's learning layers",
    "reset: training": "RuntimeError: Learner.reset needs the model in eval mode",
    "snapshot: torn": "RuntimeError: Learner.snapshot needs layers that belong together",
    "learning: torn": "RuntimeError: ttt.learning needs layers that belong together",
    "load_state_dict: other content": "ValueError: state_dict must hold bytes named 'safetensors'",
    "load_state_dict: no temporary folder": "FileNotFoundError: ",
    "consolidate: torn": "RuntimeError: Learner.consolidate needs layers that belong together",
    "flush: torn": "RuntimeError: Learner.flush needs layers that belong together",
    "restore_: torn": "RuntimeError: ttt.restore_ needs layers that belong together",
    "learning: not finite": "FloatingPointError: the gradient at model.layers.0.mlp.up_proj is not finite",
    "save: no path": "TypeError: path must be a path",
    "save: torn": "RuntimeError: ttt.save needs layers that belong together",
    "save: not finite": "ValueError: model cannot be saved: layer model.layers.0.mlp.down_proj: moments must hold",
    "check: torn": "RuntimeError: Guard.check needs layers that belong together",
    "Learner: context": "ValueError: context must be a whole number of at least 2, got 1",
    "Learner: guard": "TypeError: guard must be a ttt.Guard or None, got int",
    "Learner: episodes": "TypeError: episodes must be a ttt.EpisodeLog or None, got int",
    "Learner: rules": "with which ttt.Learner(rules=...) does not work",
    "Learner: held-back text": "ValueError: each of batches must be in [0, 61)",
    "Learner: a guard of another": "ValueError: guard watches another learner already",
    "Learner: not adapted": "has no learning layer; call ttt.adapt_(model, config) first",
    "load: no file": "FileNotFoundError: ",
    "load: damaged": "own1 is damaged: its checksum does not fit its content",
    "load: not adapted": "FileNotFoundError: ",
    "load: not adapted, damaged": "own1 is damaged: its checksum does not fit its content",
}
BOTH = {
    "calibrate: fewer batches": "ValueError: the number of batches must be the same in all processes",
    "calibrate: some without a loss": "ValueError: whether batches and loss are given must be the same in all",
    "calibrate: some without batches": "ValueError: whether batches and loss are given must be the same in all",
    "Learner: another context": "ValueError: context, guard and data_parallel must be the same in all processes",
    "Learner: some without a guard": "ValueError: context, guard and data_parallel must be the same in all processes",
    "Learner: another guard": "ValueError: context, guard and data_parallel must be the same in all processes",
    "load: another file": "must be the same in all processes of a sharded model",
}
PREFIXES = {
    **dict.fromkeys(("learning", "restore_", "save", "load", "Learner"), "ttt."),
    "check": "Guard.",
    "load_state_dict": "LearntState.",
}
KINDS = ["tensor parallel", "fsdp"]


@pytest.fixture(scope="module")
def found(forks, tmp_path_factory):
    """What each of two processes found."""
    return run_in_two(forks, "one_fails.py", tmp_path_factory.mktemp("one_fails"))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_else_was_tried(found, kind):
    for each in found:
        assert sorted(each[kind]["errors"]) == sorted([*OWN, *BOTH])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*OWN, *BOTH])
def test_an_error_of_one_process_is_one_of_both(found, kind, name):
    method = name.partition(":")[0]
    prefix = PREFIXES.get(method, "Learner.")
    first, second = (each[kind]["errors"][name] for each in found)
    if (kind, name) == ("fsdp", "learning: not finite"):  # the rows are compared first
        assert first == second
        assert "must learn from the same tokens, to the bit" in first
    elif name in BOTH:
        assert BOTH[name] in first
        assert BOTH[name] in second
    else:
        assert first.startswith(ANOTHER.format(prefix + method))
        assert OWN[name] in second


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_in_either(found, kind):
    assert [each[kind]["changed"] for each in found] == [[], []]
