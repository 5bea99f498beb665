"""What users learnt, after the server was stopped and after it was killed."""

from __future__ import annotations

import json
import time

from server import RESERVED, Server


def test_what_was_acknowledged_survives_a_stop_and_a_kill(tmp_path):
    server = Server(tmp_path).start()
    try:
        base = server.logprobs(None, RESERVED["ada"])
        for turn, end in enumerate((server.stop, server.kill), 1):
            server.say("ada", RESERVED["ada"])
            learnt = server.logprobs("ada", RESERVED["ada"])
            end()
            time.sleep(2)  # the lease
            server.start()
            assert server.logprobs("ada", RESERVED["ada"]) == learnt
            assert server.logprobs(None, RESERVED["ada"]) == base != learnt
            code, text = server.http("GET", "/v1/users/ada", "ada")
            assert (code, json.loads(text)["updates"]) == (200, turn)
    finally:
        server.kill()
