"""Who may use the HTTP server: keys, pages of other sites, and what numbers and logs do not say."""

import json
import logging
import re

import httpx
import openai
import pytest
from tiny_chat_model import service_of
from web import CHAT, FIXED, NAME, client_of, served

from ttt.serve.http.metrics import Metrics
from ttt.serve.keys import Keys, add_key, remove_keys


def test_keys_say_who_asks(model, tmp_path):
    path = tmp_path / "keys.json"
    ada, bob, operator = add_key(path, "ada"), add_key(path, "bob"), add_key(path, None)
    text = path.read_text()
    assert not any(key in text for key in (ada, bob, operator))
    assert path.stat().st_mode & 0o077 == 0
    with served(service_of(model, tmp_path / "store"), Keys(path)) as url:

        def get(route, key, method="GET", **headers):
            headers |= {} if key is None else {"authorization": f"Bearer {key}"}
            return httpx.request(method, f"{url}{route}", headers=headers)

        for key in (None, "ttt-wrong", ada[:-1]):
            for route in ("/v1/models", "/v1/users/ada", "/v1/status"):
                found = get(route, key)
                assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
        client_of(url, ada, learn="wait").chat.completions.create(messages=CHAT, max_tokens=2, **FIXED)
        assert get("/v1/users/ada", ada).json()["updates"] == 1
        for route, method in (
            ("", "GET"), ("", "DELETE"), ("/taught", "GET"), ("/export", "GET"), ("/rollback", "POST"),
            ("/learn", "POST"), ("/study", "POST"),
        ):  # fmt: skip
            body = {"rollback": {"version": 1}, "learn": {"text": "something"}, "study": {}}.get(route[1:])
            bobs = {"authorization": f"Bearer {bob}"}
            found = httpx.request(method, f"{url}/v1/users/ada{route}", headers=bobs, json=body)
            assert (found.status_code, found.json()["error"]["type"]) == (403, "permission_error")
        with pytest.raises(openai.PermissionDeniedError):
            client_of(url, bob, user="ada").chat.completions.create(messages=CHAT, max_tokens=2, **FIXED)
        acting = client_of(url, operator, user="bob", learn="wait").chat.completions.create(
            messages=CHAT, max_tokens=2, **FIXED
        )
        assert acting.ttt["updates"] == 1
        base = client_of(url, operator).chat.completions.create(messages=CHAT, max_tokens=2, **FIXED)
        assert base.ttt == {"updates": None, "version": None, "learning": "off"}
        assert "users" not in get("/v1/status", ada).json()
        assert get("/v1/status", operator).json()["users"] == ["ada", "bob"]
        assert get("/v1/users/ada", operator).json()["updates"] == 1
        assert remove_keys(path, "ada") == 1
        assert get("/v1/users/ada", ada).status_code == 401
        assert get("/v1/users/bob", bob).status_code == 200


HASH = "0" * 64


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"keys": [{"sha256": "x", "user": "a"}]}',
        json.dumps({"keys": [{"sha256": HASH, "user": "a/b"}]}),
        json.dumps({"keys": [{"sha256": HASH}]}),
        json.dumps({"keys": [{"sha256": HASH, "user": "a", "operator": True}]}),
    ],
)
def test_a_file_that_holds_no_keys_is_refused(tmp_path, text):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ValueError, match="API keys") as error:
        Keys(tmp_path / "keys")
    assert "Error(" not in str(error.value)


def test_no_page_elsewhere_can_use_a_server_without_keys(model, tmp_path):
    with served(service_of(model, tmp_path), hosts=["127.0.0.1", "localhost"]) as url:
        assert httpx.get(f"{url}/v1/models").status_code == 200
        found = httpx.get(f"{url}/v1/models", headers={"host": "evil.example"})
        assert found.status_code == 403
        for origin, status in (
            ("https://evil.example", 403), ("https://evil.example:8000", 403), ("null", 403), (url, 200),
            ("http://localhost:1234", 403), ("http://localhost", 403), ("http://127.0.0.1.evil.example", 403),
        ):  # fmt: skip
            found = httpx.post(f"{url}/v1/users/me/learn", json={"text": "something"}, headers={"origin": origin})
            assert found.status_code == status, origin
        # What browsers say of a request without an origin, as for a picture. A link to the page may be followed.
        for path, mode, status in (("/v1/users/me/taught", "no-cors", 403), ("/", "navigate", 200)):
            headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": mode}
            assert httpx.get(url + path, headers=headers).status_code == status
        assert httpx.get(url, headers={"sec-fetch-site": "same-origin"}).status_code == 200
        preflight = httpx.options(f"{url}/v1/chat/completions", headers={
            "origin": "https://evil.example", "access-control-request-method": "POST"})  # fmt: skip
        assert "access-control-allow-origin" not in preflight.headers


# -- what is wrong ---------------------------------------------------------------------------------------------------


def test_numbers_health_and_logs_name_no_user_and_no_words(model, tmp_path, caplog):
    metrics = Metrics()
    service = service_of(model, tmp_path, slots=1, observer=metrics)
    caplog.set_level(logging.INFO, "ttt.serve")
    with served(service, metrics=metrics) as url:
        for user in ("ada-lovelace", "bob"):
            client = client_of(url, key="secret-key", user=user, learn="wait")
            client.chat.completions.create(messages=CHAT, max_tokens=4, **FIXED)
            httpx.get(f"{url}/v1/users/{user}/taught")
        httpx.post(f"{url}/v1/chat/completions", content=b"Biscuit {")
        text = httpx.get(f"{url}/metrics").text
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        service.drain()
        assert httpx.get(f"{url}/health").status_code == 503
        refused = httpx.post(f"{url}/v1/completions", json={"model": NAME, "prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
    numbers = dict(re.findall(r"^(\w+) ([\d.e+-]+)$", text, re.MULTILINE))
    tokens = len("y dog is called Biscuit.?")  # the first one does not teach
    assert float(numbers["ttt_learnt_tokens_total"]) == 2 * tokens
    assert float(numbers["ttt_completion_tokens_total"]) == 8
    assert float(numbers["ttt_evictions_total"]) == 1
    assert float(numbers["ttt_learning_seconds_total"]) > 0
    assert float(numbers["ttt_store_write_seconds_count"]) == 2
    assert float(numbers["ttt_first_token_seconds_count"]) == 2
    logs = caplog.text
    assert "/v1/users/{user}/taught" in logs
    for secret in ("ada-lovelace", "Biscuit", "secret-key"):
        assert secret not in text
        assert secret not in logs
