"""Two ``ttt serve`` processes over one store, killed by turns: every turn that was acknowledged as learnt is kept."""

import contextlib

import pytest

from bench import postgres
from bench.serving.replicas import run
from bench.serving.servers import tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model") / "tiny-chat")


@pytest.mark.parametrize("index", ["sqlite", "postgresql"])
def test_killed_servers_lose_nothing_that_was_acknowledged(folder, tmp_path, index):
    with contextlib.ExitStack() as stack:
        store = str(tmp_path / "store")
        if index == "postgresql":
            try:
                store = f"{stack.enter_context(postgres.running())()}&blobs=file://{tmp_path}/blobs"
            except FileNotFoundError as error:
                pytest.skip(str(error))
        # Fewer slots than users: they are evicted and opened again all the time.
        found = run(
            store, tmp_path, folder, users=8, kills=2, lease_seconds=2.0, pause=1.0, settle=2.0, slots=6
        )  # fmt: skip
    assert found["faults"] == {}
    assert not found["stuck_users"]
    assert not found["store_damaged"]
    assert found["exit_statuses"] == [0, 0]
    assert found["acknowledged"] >= 8
    assert found["replayed"] == 8
    assert found["moves"] >= 1
