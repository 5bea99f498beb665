"""What users learnt, after the server was stopped and after it was killed."""

from __future__ import annotations

import json
import signal
import threading
import time

import openai
import psutil
from server import MODEL, RESERVED, USERS, Server


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


def test_what_waits_when_the_server_is_stopped_is_learnt_and_stored_and_its_users_are_given_back(tmp_path):
    said = {user: " ".join(f"{RESERVED['ada']} {user} said so {day} times." for day in range(8)) for user in USERS}
    server = Server(tmp_path, slots=3, lease=3600, drain=300).start()
    try:
        for user, text in said.items():
            server.say(user, text, learn="on", tokens=1)  # answered at once; it takes longer to learn
        server.stop(280)
        server.start()
        for user in said:
            code, text = server.http("GET", f"/v1/users/{user}", user)
            found = json.loads(text)
            assert (code, found["updates"], found["version"], found["read_only"]) == (200, 1, 1, "")
            assert found["tokens"] > 200
    finally:
        server.kill()


def test_streams_that_are_open_when_the_server_is_stopped_end_with_an_error(tmp_path):
    server, ends = Server(tmp_path).start(), {}
    try:

        def listen(who):
            stream = server.client(who).chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": RESERVED["ada"]}], max_tokens=900, stream=True,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            try:
                for _ in stream:
                    begun.release()
            except openai.APIError as error:
                ends[who] = error

        begun = threading.Semaphore(0)
        listeners = [threading.Thread(target=listen, args=(who,)) for who in ("ada", None)]
        for listener in listeners:
            listener.start()
        for _ in range(10):
            assert begun.acquire(timeout=60)
        assert not ends
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0  # without waiting for who listens
        for listener in listeners:
            listener.join(10)
        told = {who: (error.message, error.code) for who, error in ends.items()}
        assert told == dict.fromkeys(("ada", None), ("the server is stopping", "503"))
    finally:
        server.kill()


def running(processes):
    """Those of ``processes`` that have not ended."""
    alive = []
    for each in processes:
        try:
            if each.status() != psutil.STATUS_ZOMBIE:
                alive.append(each)
        except psutil.NoSuchProcess:
            pass
    return alive


def test_the_engine_ends_with_an_api_server_that_is_killed_and_gives_its_users_back(tmp_path):
    server = Server(tmp_path, lease=3600).start()
    engine = []
    try:
        server.say("ada", RESERVED["ada"])
        learnt = server.logprobs("ada", RESERVED["ada"])
        engine = server.kill_api_server()
        assert len(running(engine)) >= 2  # the engine and its worker
        end = time.monotonic() + 60
        while running(engine) and time.monotonic() < end:
            time.sleep(0.2)
        assert not running(engine)
        server.start()
        assert server.logprobs("ada", RESERVED["ada"]) == learnt
        server.say("ada", RESERVED["ada"])  # refused while the lease is held, which would last for an hour
        code, text = server.http("GET", "/v1/users/ada", "ada")
        assert (code, json.loads(text)["updates"], json.loads(text)["read_only"]) == (200, 2, "")
    finally:
        for each in running(engine):
            each.kill()
        server.kill()
