"""Sharded models that cannot learn (FSDP2 of layers, sharded too late) are refused by name, in two processes."""

import pytest
from two_processes import run_in_two


@pytest.fixture(scope="module")
def found(forks, tmp_path_factory):
    """What each of two processes found."""
    return run_in_two(forks, "sharded.py", tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("users", ["one", "users"])
@pytest.mark.parametrize("shard", ["tensor_parallel", "fsdp2"])
def test_a_sharded_model_is_refused_before_and_after_adapting(found, shard, users):
    adapting, learning = "down_proj.weight is a DTensor", "down_proj, a layer that learns, is a DTensor since it was"
    for each in found:
        (error, unchanged), (errors, idle) = each[f"{shard} {users}"]
        if (shard, users) != ("tensor_parallel", "one"):  # these learn: test_tensor_parallel.py
            assert error.startswith("ValueError: ")
            assert adapting in error
            assert "in one process" in error
            assert unchanged
        assert len(errors) == (4 if users == "one" else 1)
        for error in errors:
            assert error.startswith("ValueError: ")
            assert learning in error or (shard == "fsdp2" and "model is a FSDPModule" in error)  # in `fork`
            assert "in one process" in error
        assert idle


def test_whole_layers_beside_sharded_ones_learn_the_same_on_every_process(found):
    assert [each["beside"] for each in found] == [True, True]
