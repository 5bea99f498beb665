"""Models whose weights are sharded over processes (FSDP2, tensor parallelism) are refused by name, on each of two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("sharded")
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "adapt" / "sharded.py"), str(rank), str(folder)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        for process in processes:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads((folder / f"found{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("users", ["one", "users"])
@pytest.mark.parametrize(
    ("shard", "adapting", "learning"),
    [
        ("tensor_parallel", "down_proj.weight is a DTensor", "down_proj, a layer that learns, is a DTensor"),
        ("fsdp2", "model is a FSDPModule", "model is a FSDPModule"),
    ],
)
def test_a_sharded_model_is_refused_before_and_after_adapting(found, shard, adapting, learning, users):
    for each in found:
        (error, unchanged), (errors, idle) = each[f"{shard} {users}"]
        assert error.startswith("ValueError: ")
        assert adapting in error
        assert "in one process" in error
        assert unchanged
        assert len(errors) == (4 if users == "one" else 1)
        for error in errors:
            assert error.startswith("ValueError: ")
            assert learning in error
            assert "in one process" in error
        assert idle


def test_whole_layers_beside_sharded_ones_learn_the_same_on_every_process(found):
    assert [each["beside"] for each in found] == [True, True]
