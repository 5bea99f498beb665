"""What users learnt, after the server was stopped or killed."""

from __future__ import annotations

import json
import time

import pytest
from server import RESERVED, Server


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_what_was_acknowledged_survives(how, tmp_path):
    server = Server(tmp_path).start()
    try:
        server.say("ada", RESERVED["ada"])
        learnt = server.logprobs("ada", RESERVED["ada"])
        base = server.logprobs(None, RESERVED["ada"])
        getattr(server, how)()
        time.sleep(2)  # the lease
        server.start()
        assert server.logprobs("ada", RESERVED["ada"]) == learnt
        assert server.logprobs(None, RESERVED["ada"]) == base != learnt
        server.say("ada", RESERVED["ada"])
        code, text = server.http("GET", "/v1/users/ada", "ada")
        assert (code, json.loads(text)["updates"]) == (200, 2)
    finally:
        server.kill()
