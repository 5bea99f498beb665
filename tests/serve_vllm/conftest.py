"""One server for the tests of a file. They need vLLM, so ``make test-vllm`` runs them, in an environment of its own."""

import os

import pytest

collect_ignore_glob = [] if os.environ.get("TTT_TEST_MODEL") else ["*"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    from server import Server

    running = Server(tmp_path_factory.mktemp("vllm")).start()
    yield running
    running.stop()
