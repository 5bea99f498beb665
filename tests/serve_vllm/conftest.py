"""One server for the tests of this folder. They need vLLM, so they run by ``make test-vllm``, in an environment of its own."""

import os

import pytest

collect_ignore_glob = [] if os.environ.get("TTT_TEST_MODEL") else ["*"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    from server import Server

    running = Server(tmp_path_factory.mktemp("vllm")).start()
    yield running
    running.stop()
