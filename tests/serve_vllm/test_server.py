"""The plugin's guarantees, against a real server."""

from __future__ import annotations

import asyncio
import json
import re
import time

import openai
import pytest
from server import MODEL, RESERVED, Server

from ttt.conversation import Telling

LONG = " ".join(
    f"On day {day} the keeper of the lighthouse wrote down the wind, the tide and the ships." for day in range(22)
)
"""More tokens than two blocks of the prefix cache."""


def mean(values):
    return sum(values) / len(values)


def told(server: Server, user: str) -> float:
    return mean(server.logprobs(user, RESERVED[user]))


def status(server: Server, user: str) -> dict:
    """What is known of a user; counts of 0 where nothing is."""
    code, text = server.http("GET", f"/v1/users/{user}", user)
    found = json.loads(text)
    if code == 404:
        assert found["error"]["param"] == "user", text
        return {"updates": 0, "tokens": 0}
    assert code == 200, text
    assert found["updates"], text
    return found


def forget(server: Server, *users: str) -> None:
    for user in users:
        code, text = server.http("DELETE", f"/v1/users/{user}", user)
        assert code == 200, text


@pytest.fixture(autouse=True)
def nobody_has_learnt(server):
    forget(server, "ada", "bob", "cid")


def test_a_user_learns_from_a_turn_and_nobody_else_changes(server):
    before = {who: server.logprobs(who, RESERVED["ada"]) for who in ("ada", "bob", None)}
    assert before["ada"] == before[None] == before["bob"]
    server.say("ada", RESERVED["ada"])
    after = {who: server.logprobs(who, RESERVED["ada"]) for who in ("ada", "bob", None)}
    assert mean(after["ada"]) > mean(before["ada"]) + 0.3
    assert after["bob"] == before["bob"]
    assert after[None] == before[None]


def test_the_base_model_and_another_user_are_the_same_bits_while_one_learns_in_the_same_steps(server):
    server.say("bob", RESERVED["bob"])
    alone = {who: server.logprobs(who, LONG) for who in ("bob", None)}

    async def beside():
        ada = server.asynchronous("ada", x_ttt_learn="on")
        over = False

        async def teach():
            for turn in range(6):
                await ada.chat.completions.create(
                    model=MODEL, messages=[{"role": "user", "content": f"{RESERVED['ada']} {turn}"}], max_tokens=16
                )

        async def measure(who):
            found = []
            while not over:
                found.append(await asyncio.to_thread(server.logprobs, who, LONG))
            return found

        measuring = [asyncio.create_task(measure(who)) for who in ("bob", None)]
        await teach()
        over = True
        return await asyncio.gather(*measuring)

    for who, found in zip(("bob", None), asyncio.run(beside()), strict=True):
        assert len(found) >= 3
        assert all(each == alone[who] for each in found), who
    assert status(server, "ada")["updates"] == 6


def test_the_prefix_cache_serves_nothing_that_was_computed_before_an_update(server):
    server.say("ada", RESERVED["ada"])
    fresh, cached = server.first("ada", LONG)
    again, hits = server.first("ada", LONG)
    assert (cached, again) == (0, fresh)
    assert hits > 0
    server.say("ada", "The keeper's favourite wind is the north wind, which smells of tar.")
    after, stale = server.first("ada", LONG)
    salted, none = server.first("ada", LONG, salt="a salt that nobody has used")
    assert (stale, none) == (0, 0)
    assert after == salted
    assert after != fresh
    assert server.first("ada", LONG)[1] == hits


def test_nobody_gets_what_another_user_has_cached(server):
    server.say("ada", RESERVED["ada"])
    server.first("ada", LONG)
    assert server.first("ada", LONG)[1] > 0
    assert server.first("bob", LONG)[1] == 0


def test_an_aborted_stream_teaches_nothing(server):
    before = told(server, "ada")
    stream = server.client("ada", x_ttt_learn="on").chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": RESERVED["ada"]}], max_tokens=400, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    next(iter(stream))
    stream.close()
    time.sleep(1)
    assert told(server, "ada") == before
    known = status(server, "ada")
    assert (known["updates"], known["tokens"]) == (0, 0)
    whole = server.client("ada", x_ttt_learn="wait").chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": RESERVED["ada"]}], max_tokens=4, stream=True
    )
    assert list(whole)
    assert status(server, "ada")["updates"] == 1


def test_forgetting_gives_the_base_model_bit_for_bit(server):
    base = server.logprobs(None, RESERVED["ada"])
    server.say("ada", RESERVED["ada"])
    assert server.logprobs("ada", RESERVED["ada"]) != base
    forget(server, "ada")
    assert server.logprobs("ada", RESERVED["ada"]) == base
    assert status(server, "ada")["tokens"] == 0


def test_a_request_that_runs_while_its_user_is_forgotten_teaches_nothing(server):
    base = server.logprobs(None, RESERVED["ada"])
    stream = server.client("ada", x_ttt_learn="on").chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": RESERVED["ada"]}], max_tokens=60, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    chunks = iter(stream)
    next(chunks)
    forget(server, "ada")
    assert sum(1 for _ in chunks) > 10
    time.sleep(1)
    assert server.logprobs("ada", RESERVED["ada"]) == base
    assert status(server, "ada")["updates"] == 0


def test_an_update_while_the_same_user_is_answered(server):
    async def both():
        ada = server.asynchronous("ada", x_ttt_learn="off")
        stream = await ada.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Tell me of the sea."}], max_tokens=150, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        count = 0
        async for _ in stream:
            count += 1
            if count == 10:
                await asyncio.to_thread(server.say, "ada", RESERVED["ada"])
        return count

    before = told(server, "ada")
    assert asyncio.run(both()) > 100  # a chunk may hold several of the 150 tokens
    assert told(server, "ada") > before + 0.3


def test_users_who_are_evicted_come_back_with_what_they_learnt(server):
    for user in ("ada", "bob"):
        server.say(user, RESERVED[user])
    learnt = {user: server.logprobs(user, RESERVED[user]) for user in ("ada", "bob")}
    server.say("cid", "There are two slots, and I am the third.")
    server.logprobs("cid", LONG)
    for user in ("ada", "bob", "ada"):
        assert server.logprobs(user, RESERVED[user]) == learnt[user]


def test_a_user_whose_request_runs_is_not_evicted(server):
    async def all_at_once():
        async def turn(user):
            return await server.asynchronous(user, x_ttt_learn="on").chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": RESERVED.get(user, "I wait for a slot.")}],
                max_tokens=40, extra_body={"ignore_eos": True},
            )  # fmt: skip

        return await asyncio.gather(*(turn(user) for user in ("ada", "bob", "cid") * 2))

    answers = asyncio.run(all_at_once())
    assert [each.usage.completion_tokens for each in answers] == [40] * 6
    for user in ("ada", "bob", "cid"):
        assert status(server, user)["updates"] == 2


def test_words_of_others_in_a_chat_do_not_teach(server):
    client = server.client("ada", x_ttt_learn="wait")
    messages = [
        {
            "role": "system",
            "content": "You are a helpful guide of the harbour, who knows " + "all of its ships and " * 9,
        },
        {"role": "user", "content": "Good morning, who are you?"},
        {"role": "assistant", "content": "I am the guide of the harbour."},
        {"role": "user", "content": "My dog is called Ottokar."},
    ]
    client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2)
    known = status(server, "ada")
    assert 4 <= known["tokens"] <= 12
    # Each pass adds a row for every token that teaches, at the token before it.
    assert known["rows"] == Telling().passes * known["tokens"]
    with pytest.raises(openai.BadRequestError, match="nothing of this request can teach"):
        client.chat.completions.create(model=MODEL, messages=messages[:-1], max_tokens=2)


def test_parts_of_text_teach_as_the_text_that_the_template_makes_of_them(server):
    parts = ["My rowing boat is called Quillfeather", "and it is painted in ochre and teal."]
    joined = server.say("ada", "\n".join(parts))
    wanted = status(server, "ada"), server.logprobs("ada", RESERVED["ada"])
    forget(server, "ada")
    answer = server.say("ada", [{"type": "text", "text": part} for part in parts])
    assert answer.usage.prompt_tokens == joined.usage.prompt_tokens
    found = status(server, "ada"), server.logprobs("ada", RESERVED["ada"])
    for each in (found, wanted):
        del each[0]["lesson"], each[0]["version"]
    assert found == wanted
    assert found[0]["updates"] == 1


def test_which_routes_teach(server):
    turn = {"model": MODEL, "messages": [{"role": "user", "content": RESERVED["ada"]}], "max_tokens": 2}
    code, text = server.http(
        "POST", "/v1/messages", None, json.dumps(turn).encode(), x_api_key=server.keys["ada"], x_ttt_learn="wait"
    )
    assert code == 200, text
    assert status(server, "ada")["updates"] == 1
    completed = {"model": MODEL, "prompt": RESERVED["ada"], "max_tokens": 2}
    assert server.http("POST", "/v1/completions", "ada", json.dumps(completed).encode(), x_ttt_learn="wait")[0] == 200
    assert status(server, "ada")["updates"] == 2
    response = json.dumps({"model": MODEL, "input": RESERVED["ada"], "max_output_tokens": 2}).encode()
    assert server.http("POST", "/v1/responses", "ada", response)[0] == 200
    code, text = server.http("POST", "/v1/responses", "ada", response, x_ttt_learn="wait")
    assert code == 400
    assert "nothing is learnt on /v1/responses" in json.loads(text)["error"]["message"]
    assert status(server, "ada")["updates"] == 2


def test_a_header_switches_learning_off(server):
    server.say("ada", RESERVED["ada"], learn="off")
    assert status(server, "ada")["updates"] == 0
    server.client("ada").chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": RESERVED["ada"]}], max_tokens=2
    )
    assert status(server, "ada")["updates"] == 1


def test_the_field_user_of_a_request_is_not_believed(server):
    server.say("ada", RESERVED["ada"])
    answer = server.client("bob").completions.create(
        model=MODEL, prompt=RESERVED["ada"], max_tokens=1, user="ada", extra_body={"prompt_logprobs": 0}
    )
    found = [next(iter(each.values()))["logprob"] for each in answer.choices[0].model_dump()["prompt_logprobs"][1:]]
    assert found == server.logprobs(None, RESERVED["ada"])


def test_without_a_valid_key_nothing_is_served(server):
    for path in ("/v1/models", "/v1/users/ada", "/tokenize", "/v1/chat/completions", "//v1/chat/completions"):
        code, text = server.http("GET" if "users" in path or "models" in path else "POST", path, None, b"{}")
        assert code == 401, (path, code, text)
        assert json.loads(text)["error"]["code"] == "invalid_api_key"
    assert server.http("GET", "/health", None)[0] == 200


def test_a_key_serves_one_user_and_an_operators_key_any(server):
    server.say("ada", RESERVED["ada"])
    assert server.http("GET", "/v1/users/ada", "bob")[0] == 403
    assert server.http("DELETE", "/v1/users/ada", "bob")[0] == 403
    assert server.http("POST", "/v1/users/ada/rollback", "bob", b'{"version": 1}')[0] == 403
    with pytest.raises(openai.PermissionDeniedError):
        server.client("bob", x_ttt_user="ada").models.list()
    code, text = server.http("GET", "/v1/users/ada", "operator")
    assert code == 200
    assert json.loads(text)["updates"] == 1


def test_going_back_to_an_earlier_version(server):
    server.say("ada", RESERVED["ada"])
    first, version = server.logprobs("ada", RESERVED["ada"]), status(server, "ada")["version"]
    server.say("ada", "My boat is called Marmalade now, and it is pink.")
    assert server.logprobs("ada", RESERVED["ada"]) != first
    code, text = server.http("POST", "/v1/users/ada/rollback", "ada", json.dumps({"version": version}).encode())
    assert code == 200, text
    assert server.logprobs("ada", RESERVED["ada"]) == first
    code, text = server.http("POST", "/v1/users/ada/rollback", "ada", b'{"version": 12345}')
    assert code == 404, text
    assert json.loads(text)["error"]["param"] == "version"
    for body in (b"{}", b"no", b'{"version": 0}', b'{"version": "1"}'):
        assert server.http("POST", "/v1/users/ada/rollback", "ada", body)[0] == 400


def test_of_a_user_of_whom_nothing_is_known_there_is_nothing_to_show(server):
    code, text = server.http("GET", "/v1/users/ada", "ada")
    assert (code, json.loads(text)["error"]["message"]) == (404, "there is no user 'ada'")
    server.say("ada", RESERVED["ada"], learn="off")
    assert server.http("GET", "/v1/users/ada", "ada")[0] == 404
    server.say("ada", RESERVED["ada"])
    assert server.http("GET", "/v1/users/ada", "ada")[0] == 200
    forget(server, "ada")
    assert server.http("GET", "/v1/users/ada", "ada")[0] == 404


def test_prompt_logprobs_beside_a_user_do_not_end_the_engine(server):
    async def both():
        return await asyncio.gather(
            *(asyncio.to_thread(server.logprobs, who, LONG) for who in ("ada", None, "bob", None)),
        )

    server.say("ada", RESERVED["ada"])
    found = asyncio.run(both())
    assert found[1] == found[3] == found[2]
    assert found[0] != found[1]


def test_several_answers_teach_nothing_and_are_served_with_learning_off(server):
    with pytest.raises(openai.BadRequestError, match="n must be 1"):
        server.say("ada", RESERVED["ada"], learn="on", n=2, temperature=1)
    assert len(server.say("ada", RESERVED["ada"], learn="off", n=2, temperature=1).choices) == 2
    assert status(server, "ada")["updates"] == 0


def test_a_long_prompt_is_captured_in_parts_while_others_are_answered(server):
    async def both():
        others = [asyncio.to_thread(server.say, "bob", "Count to a hundred.", learn="off", tokens=60) for _ in range(2)]
        said = asyncio.to_thread(server.say, "ada", f"{LONG} {RESERVED['ada']}")
        return await asyncio.gather(said, *others)

    before = told(server, "ada")
    asyncio.run(both())
    assert status(server, "ada")["tokens"] > 300  # a step of this server has 256 at most
    assert told(server, "ada") > before + 0.1


def test_names_of_users_reach_neither_logs_nor_metrics(server):
    server.say("ada", RESERVED["ada"])
    assert server.http("GET", "/v1/users/ada?name=ada", "ada")[0] == 200
    assert server.http("POST", "/v1/users/ada/rollback", "bob", b"{}")[0] == 403
    metrics = server.http("GET", "/metrics", None)[1]
    assert not re.search(r"(?<![0-9a-z])ada(?![0-9a-z])", metrics)  # hexadecimal digits may spell it
    log = server.log.read_text(errors="replace")
    assert "Quillfeather" not in log
    assert '"GET /v1/users/{user} HTTP/1.1" 200' in log
    assert '"POST /v1/users/{user}/rollback HTTP/1.1" 403' in log
    assert not [line for line in log.splitlines() if "ttt://ada" in line or "'ada'" in line or "/ada" in line]
