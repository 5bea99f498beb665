"""kill -9 at random moments, by `crash.py`, which can be run by hand for longer."""

import json
import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("url", "options"), [("folder", []), ("folder", ["--network"]), ("postgres", [])], indirect=["url"]
)
def test_killed_writers_lose_nothing_acknowledged(forks, url, options):
    """In a process of its own: it forks, and pytest's process may have threads."""
    seed = str(torch.initial_seed())  # from TTT_TEST_SEED, see tests/conftest.py
    command = [HERE / "crash.py", "--kills", "12", "--seed", seed, "--url", url, *options]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent)}
    done = forks.run(command, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["acknowledged"] >= 6  # one by each second writer
    assert found["versions"] == found["acknowledged"] + found["committed, not acknowledged"]
