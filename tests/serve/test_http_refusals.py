"""What wrong, too large, too slow or too many requests get over HTTP, and that they change nothing."""

import json
import socket
import time

import httpx
import openai
import pytest
from tiny_chat_model import Answer, service_of
from tiny_models import assert_same
from web import CHAT, FIXED, NAME, client_of, served

from ttt.serve.http.limits import RateLimits

JSON = {"content-type": "application/json"}

WRONG = [
    ({"model": "other"}, 404, "model"),
    ({"temperature": 3}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"n": 0}, 400, "n"),
    ({"n": 17}, 400, "n"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 10**9}, 400, "max_tokens"),
    ({"max_tokens": None, "max_completion_tokens": 10**9}, 400, "max_completion_tokens"),
    ({"max_tokens": True}, 400, "max_tokens"),
    ({"seed": 2**70}, 400, "seed"),
    ({"stop": ["a"] * 5}, 400, "stop"),
    ({"stop": ""}, 400, "stop"),
    ({"top_logprobs": 3}, 400, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"tools": [{"type": "function"}]}, 400, "tools"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
    ({"frobnicate": 1}, 400, "frobnicate"),
    ({"messages": []}, 400, "messages"),
    ({"messages": "hi"}, 400, "messages"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content"),
    ({"messages": [{"role": "boss", "content": "x"}]}, 400, "messages[0].role"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "messages[0].content[0].type",
    ),
    ({"messages": [{"role": "user", "content": "x" * 3000}]}, 400, "messages"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]}, 400, "messages[0].tool_calls"),
]


def test_what_is_wrong_is_named_and_changes_no_bit(model, tmp_path):
    service = service_of(model, tmp_path)
    with served(service) as url:
        client_of(url, user="ada", learn="wait").chat.completions.create(messages=CHAT, max_tokens=2, **FIXED)
        before = service.export("ada").result(60)
        for change, status, param in WRONG:
            body = {"model": NAME, "messages": CHAT, "max_tokens": 2} | change
            found = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"x-ttt-user": "ada"})
            assert found.status_code == status, change
            error = found.json()["error"]
            assert error["param"].startswith(param), (change, error)
            assert set(error) == {"message", "type", "param", "code"}
        for change in (
            {"prompt": []}, {"prompt": ""}, {"prompt": [10**6]}, {"prompt": [-1]}, {"max_tokens": 0}, {"logprobs": 99},
            {"echo": True, "n": 2}, {"echo": True, "stream": True}, {"prompt": [["a"]]},
        ):  # fmt: skip
            found = httpx.post(f"{url}/v1/completions", json={"model": NAME, "prompt": "x"} | change)
            assert found.status_code == 400, change
        for route, body in (
            ("rollback", {}), ("rollback", {"version": "x"}), ("rollback", {"version": 0}), ("learn", {}),
            ("learn", {"text": "a"}), ("learn", {"text": ""}), ("learn", {"text": "x" * 600}),
            ("learn", {"text": "abc", "spans": [[2, 9]]}), ("learn", {"text": "abc", "spans": [[2]]}),
            ("learn", {"text": "abc", "messages": CHAT}), ("learn", {"messages": CHAT, "roles": ["tool"]}),
            ("study", {"passes": 0}), ("study", {"lr": -1}), ("study", {"other": 1}),
        ):  # fmt: skip
            found = httpx.post(f"{url}/v1/users/ada/{route}", json=body)
            assert (found.status_code, found.json()["error"]["type"]) == (400, "invalid_request_error"), (route, body)
        empty = httpx.post(f"{url}/v1/users/ada/learn", json={"text": ""}).json()["error"]
        assert (empty["message"], empty["param"]) == ("text must have at least one character, got ''", "text")
        assert httpx.post(f"{url}/v1/users/ada/rollback", json={"version": 99}).status_code == 404
        for bad in ("a b", "-x", "%00", "a%2Fb", "x" * 129, "%F0%9F%90%95"):
            assert httpx.get(f"{url}/v1/users/{bad}").status_code in (400, 404)
            assert httpx.post(f"{url}/v1/users/{bad}/learn", json={"text": "hello there"}).status_code in (400, 404)
        for content, why in ((b"{", "JSON"), (b"[1]", "object"), (b"\xff\xfe", "JSON"), (b"", "")):
            found = httpx.post(
                f"{url}/v1/chat/completions", content=content, headers={"content-type": "application/json"}
            )
            assert found.status_code == 400
            assert why in found.json()["error"]["message"]
        numbers = json.dumps({"model": NAME, "messages": CHAT}).encode()
        for value in (b"NaN", b"Infinity", b"-1e999"):
            content = numbers[:-1] + b', "temperature": ' + value + b"}"
            found = httpx.post(f"{url}/v1/chat/completions", content=content, headers=JSON)
            assert (found.status_code, found.json()["error"]["param"]) == (400, "temperature")
        half = rb'"\ud83d"'  # of a character
        for route, content in (
            ("chat/completions", b'{"model": "tiny", "messages": [{"role": "user", "content": %s}]}' % half),
            ("completions", b'{"model": "tiny", "prompt": %s}' % half),
            ("completions", b'{"model": "tiny", "prompt": "x", "stop": [%s]}' % half),
            ("completions", b'{"model": %s, "prompt": "x"}' % half),
            ("users/ada/learn", b'{"text": %s}' % half),
        ):
            found = httpx.post(f"{url}/v1/{route}", content=content, headers=JSON)
            assert found.status_code in (400, 404), (route, content, found.text)
        error = found.json()["error"]
        assert error["message"] == r"text: must be text that UTF-8 can hold (surrogates not allowed), got '\ud83d'"
        assert error["param"] == "text"
        deep = b'{"model": ' + b"[" * 100_000
        assert httpx.post(f"{url}/v1/chat/completions", content=deep, headers=JSON).status_code == 400
        assert httpx.get(f"{url}/nothing").json()["error"]["code"] == "not_found"
        assert httpx.put(f"{url}/v1/models").json()["error"]["code"] == "method_not_allowed"
        assert httpx.put(f"{url}/v1/models").status_code == 405
        assert_same(before, service.export("ada").result(60))
        assert service.sessions.users == ("ada",)


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
            "messages[0].content[1].type",
            "messages[0].content[1].type: this server takes parts of type 'text' only, got 'image_url'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "messages[0].content[0].text",
            "messages[0].content[0].text: Input should be a valid string, got 5",
        ),
        ({"stop": ["a"] * 5}, "stop", "stop: List should have at most 4 items after validation, not 5"),
        ({"stop": ["a", 5]}, "stop[1]", "stop[1]: Input should be a valid string, got 5"),
        ({"stop": 5}, "stop", "stop: Input should be a valid string, got 5"),
        ({"n": 9}, "n", "n must be at most 8, the number of texts that are generated at a time, got 9"),
        ({"n": 99}, "n", "n must be at most 8, the number of texts that are generated at a time, got 99"),
    ],
)
def test_a_refusal_says_what_is_wrong_of_a_parameter_with_several_types(url, change, param, message):
    body = {"model": NAME, "messages": CHAT, "max_tokens": 2} | change
    error = httpx.post(f"{url}/v1/chat/completions", json=body).json()["error"]
    assert (error["param"], error["message"]) == (param, message)


@pytest.mark.parametrize("name", ["a%2Fb", "%C3%A9va", "a%20b"])
@pytest.mark.parametrize("rest", ["", "/taught"])
def test_a_name_that_no_user_can_have_is_called_that(url, name, rest):
    found = httpx.get(f"{url}/v1/users/{name}{rest}")
    error = found.json()["error"]
    assert (found.status_code, error["param"]) == (400, "user")
    assert "must have 1 to 128 ASCII letters" in error["message"]
    assert httpx.get(f"{url}/v1/users/ada/nothing").json()["error"]["code"] == "not_found"


def test_bodies_that_are_too_large_are_not_read(model, tmp_path):
    with served(service_of(model, tmp_path), largest_body=2000) as url:
        big = {"model": NAME, "messages": [{"role": "user", "content": "x" * 3000}]}
        assert httpx.post(f"{url}/v1/chat/completions", json=big).status_code == 413

        def parts():  # without a length in the header
            for _ in range(50):
                yield b" " * 100

        found = httpx.post(f"{url}/v1/chat/completions", content=parts(), headers=JSON)
        assert (found.status_code, found.json()["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_ends_its_request_and_teaches_nothing(model, tmp_path, stream):
    service = service_of(model, tmp_path, rows=1)
    with served(service) as url:
        wanted = {"model": NAME, "messages": CHAT, "max_tokens": 400, "stream": stream, "ignore_eos": True}
        body = json.dumps(wanted).encode()
        host, port = url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)))
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-ttt-user: ada\r\ncontent-type: application/json\r\n"
            b"content-length: " + str(len(body)).encode() + b"\r\n\r\n" + body
        )
        began = time.monotonic()
        while service.batch.idle:
            assert time.monotonic() - began < 30
            time.sleep(0.005)
        connection.close()
        while not service.batch.idle:
            assert time.monotonic() - began < 30
            time.sleep(0.005)
        after = client_of(url, user="ada", learn="off").chat.completions.create(messages=CHAT, max_tokens=1, **FIXED)
        assert after.ttt["updates"] == 0


def test_a_request_that_takes_too_long_is_ended(model, tmp_path):
    service = service_of(model, tmp_path)
    with served(service, seconds=0.3) as url:
        with pytest.raises(openai.InternalServerError) as found:
            client_of(url, user="ada").chat.completions.create(messages=CHAT, max_tokens=450, **FIXED)
        assert (found.value.status_code, found.value.code) == (504, "timeout")
        stream = client_of(url).chat.completions.create(messages=CHAT, max_tokens=450, stream=True, **FIXED)
        with pytest.raises(openai.APIError, match="longer than"):
            list(stream)


def test_too_much_is_refused_with_the_time_to_come_back(model, tmp_path):
    service = service_of(model, tmp_path, rows=1, waiting=1)
    with served(service, limits=RateLimits(requests=3)) as url:
        codes = [httpx.get(f"{url}/v1/models") for _ in range(4)]
        assert [each.status_code for each in codes] == [200, 200, 200, 429]
        assert 0 < int(codes[-1].headers["retry-after"]) <= 20
        assert codes[-1].json()["error"]["code"] == "rate_limit_exceeded"
    service = service_of(model, tmp_path, rows=1, waiting=1)
    with served(service, limits=RateLimits(tokens=200)) as url:
        client_of(url).completions.create(prompt="abc", max_tokens=90, **FIXED)
        client_of(url).completions.create(prompt="abc", max_tokens=90, **FIXED)
        with pytest.raises(openai.RateLimitError, match="tokens"):
            client_of(url).completions.create(prompt="abc", max_tokens=90, **FIXED)
    for passes, then in ((1, 200), (2, 200), (4, 429)):  # 60 tokens each
        with served(service_of(model, tmp_path / str(passes)), limits=RateLimits(tokens=200)) as url:
            lesson = {"text": "y" * 60, "passes": passes}
            assert httpx.post(f"{url}/v1/users/ada/learn", json=lesson).status_code == 200
            assert httpx.post(f"{url}/v1/users/ada/learn", json=lesson | {"passes": 1}).status_code == then
    service = service_of(model, tmp_path, rows=1, waiting=1)
    with served(service) as url:
        busy = [Answer(service, None, [5, 6], max_tokens=400)]
        while service.batch.idle:
            time.sleep(0.005)
        busy.append(Answer(service, None, [5, 6], max_tokens=400))
        with pytest.raises(openai.RateLimitError) as found:
            client_of(url).completions.create(prompt="abc", max_tokens=1, **FIXED)
        assert int(found.value.response.headers["retry-after"]) > 0


def test_a_body_without_its_content_type_is_named(model, tmp_path):
    with served(service_of(model, tmp_path / "store")) as url:
        for route in ("/v1/chat/completions", "/v1/users/ada/learn"):
            found = httpx.post(f"{url}{route}", content=b'{"text": "a"}')
            assert found.status_code == 400
            assert "content-type: application/json" in found.json()["error"]["message"]


@pytest.mark.parametrize(
    ("roles", "contents", "param", "message"),
    [
        (["tool"], "ab", "roles", "roles must have one of the messages' roles, system, user, got tool"),
        (["tool", "assistant"], "ab", "roles", "roles must have one of the messages' roles, system, user, got tool, "),
        (["system"], ["", "b"], "messages", "no token teaches"),
    ],
)
def test_roles_of_no_message_are_called_that(url, roles, contents, param, message):
    chat = [{"role": role, "content": text} for role, text in zip(("system", "user"), contents, strict=True)]
    found = httpx.post(f"{url}/v1/users/ada/learn", json={"messages": chat, "roles": roles})
    error = found.json()["error"]
    assert (found.status_code, error["param"]) == (400, param)
    assert error["message"].startswith("there is nothing to learn: ")
    assert message in error["message"]
    assert httpx.get(f"{url}/v1/users/ada").status_code == 404


@pytest.mark.parametrize(
    ("route", "body", "param", "message"),
    [
        ("chat/completions", r'{"\ud83d": 1}', r"\ud83d", r"a parameter's name must be text that UTF-8 can hold, got "),
        ("completions", r'{"a \udc00": 1}', r"a \udc00", r"a parameter's name must be text that UTF-8 can hold, got "),
        ("users/ada/learn", r'{"\ud83d": 1}', r"\ud83d", r"a parameter's name must be text that UTF-8 can hold, got "),
        ("users/ada/learn", r'{"messages": [{"role": "user", "\ud83d": 1}]}', "messages[0]", "messages[0]: Input"),
        ("users/ada/learn", r'{"text": "abc", "a b": 1}', "a b", "a b: Extra inputs are not permitted, got 1"),
        ("users/ada/learn", r'{"text": "abc", "é": 1}', "é", "é: Extra inputs are not permitted, got 1"),
    ],
)  # fmt: skip
def test_parameters_of_any_name_are_named(url, route, body, param, message):
    found = httpx.post(f"{url}/v1/{route}", content=body.encode(), headers=JSON)
    error = found.json()["error"]
    assert (found.status_code, error["param"]) == (400, param)
    assert error["message"].startswith(message)
    assert r"\u" not in body or r"\u" in error["message"]


def test_the_page_can_be_asked_for_by_its_head_and_a_slash_too_much_is_an_error_as_any_other(url):
    for path in ("/", "/page/page.js", "/health"):
        head, whole = httpx.head(f"{url}{path}"), httpx.get(f"{url}{path}")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == whole.headers["content-length"]
    for method, path in (("POST", "/v1/chat/completions/"), ("GET", "/v1/users/ada/"), ("GET", "/health/")):
        found = httpx.request(method, f"{url}{path}", json={})
        assert found.status_code == 404
        error = found.json()["error"]
        assert error["message"] == f"{method} {path} is not served here; leave out the slash at the end"
        assert error["code"] == "not_found"
