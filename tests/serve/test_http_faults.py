"""Faults of the server's own: what its client hears, and that the log repeats nothing that a client sent."""

import asyncio
import json
import logging

import httpx
import pytest
from test_service import lesson_of
from tiny_chat_model import service_of
from web import CHAT, NAME, served

from ttt.serve.errors import NotFound
from ttt.serve.http.metrics import Metrics
from ttt.serve.http.middleware import Guarded
from ttt.serve.http.state import Server
from ttt.serve.keys import Keys, add_key

EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]
FAILED = {"message": "the server failed: RuntimeError", "type": "server_error", "param": None, "code": "internal_error"}


def guarded(app, body=b""):
    """What a client gets that asks ``app`` behind the middleware, which takes 100 bytes, with ``body``."""
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    scope = {"type": "http", "method": "POST", "headers": [(b"host", b"localhost")]}
    wrapped = Guarded(app, largest=100, hosts=None, metrics=Metrics())
    try:
        asyncio.run(wrapped(scope, receive, send))
    finally:
        guarded.sent = sent
    return sent


def failing(*messages):
    async def app(scope, receive, send):
        for message in messages:
            await send(message)
        raise RuntimeError("cannot handle 'My dog is Biscuit'")

    return app


def start(headers):
    return {"type": "http.response.start", "status": 200, "headers": headers}


def test_a_fault_before_the_answer_is_an_error_in_openais_form():
    begun, end = guarded(failing())
    assert begun["status"] == 500
    assert json.loads(end["body"]) == {"error": FAILED}


def test_a_fault_in_a_stream_is_its_last_event():
    part = {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True}
    *_, last = guarded(failing(start(EVENTS), part))
    assert json.loads(last["body"].decode().removeprefix("data: ")) == {"error": FAILED}
    assert not last.get("more_body", False)


@pytest.mark.parametrize("messages", [
    [start([(b"content-type", b"application/json")])],
    [start(EVENTS), {"type": "http.response.body", "body": b"data: [DONE]\n\n"}],
])  # fmt: skip
def test_a_fault_in_any_other_answer_closes_the_connection(messages):
    with pytest.raises(RuntimeError, match=r"^a request failed after its answer had begun$") as raised:
        guarded(failing(*messages))
    assert raised.value.__suppress_context__
    assert guarded.sent == messages


async def _reads(scope, receive, send):
    await receive()


async def _stops(scope, receive, send):
    try:
        await receive()
    except Exception:
        raise asyncio.CancelledError from None


async def _fails(scope, receive, send):
    try:
        await receive()
    except Exception:
        raise RuntimeError("no body") from None


async def _answers(scope, receive, send):
    try:
        await receive()
    except Exception:
        await send({"type": "http.response.start", "status": 400, "headers": []})
        await send({"type": "http.response.body", "body": b"no body"})


@pytest.mark.parametrize(("app", "status", "faults"), [
    (_reads, 413, 0), (_fails, 413, 1), (_answers, 413, 0), (_stops, 503, 0),
])  # fmt: skip
def test_a_body_that_is_too_large_is_answered_whatever_the_application_makes_of_it(app, status, faults, caplog):
    begun, end = guarded(app, b"x" * 101)
    assert begun["status"] == status
    assert json.loads(end["body"])["error"]["code"] == ("request_too_large" if status == 413 else "unavailable")
    assert caplog.text.count("a request failed") == faults


def test_a_body_that_is_too_large_ends_a_stream_that_has_begun():
    async def app(scope, receive, send):
        await send(start(EVENTS))
        await receive()

    begun, last = guarded(app, b"x" * 101)
    assert begun == start(EVENTS)
    assert json.loads(last["body"].decode().removeprefix("data: "))["error"]["code"] == "request_too_large"


def test_a_fault_is_counted_and_logged_without_what_was_said(model, tmp_path, monkeypatch, caplog, capfd):
    def broken(self, messages):
        raise RuntimeError(f"cannot handle {messages}")

    monkeypatch.setattr(Server, "chat_tokens", broken)
    metrics = Metrics()
    with (
        caplog.at_level(logging.INFO, "ttt.serve"),
        served(service_of(model, tmp_path), metrics=metrics) as url,
    ):
        found = httpx.post(f"{url}/v1/chat/completions", json={"model": NAME, "messages": CHAT})
    assert (found.status_code, found.json()) == (500, {"error": FAILED})
    labels = {"route": "/v1/chat/completions", "status": "500"}
    assert metrics.registry.get_sample_value("ttt_requests_total", labels) == 1
    said = [record.getMessage() for record in caplog.records]
    assert "a request failed" in said
    assert any('"status": 500' in text for text in said)
    assert not [text for text in said if "Biscuit" in text]
    assert "Biscuit" not in capfd.readouterr().err  # of the HTTP server


@pytest.mark.parametrize("content", [b"no JSON", b'{"keys": [{"sha256": "x"}]}', None])
def test_a_file_of_keys_that_cannot_be_read_is_said_and_its_repair_noticed(model, tmp_path, caplog, content):
    path = tmp_path / "keys"
    key = {"authorization": f"Bearer {add_key(path, 'ada')}"}
    good = path.read_bytes()
    with served(service_of(model, tmp_path / "store"), keys=Keys(path)) as url:
        assert httpx.get(f"{url}/v1/models", headers=key).status_code == 200
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        found = httpx.get(f"{url}/v1/models", headers=key)
        assert (found.status_code, found.headers["retry-after"]) == (503, "5")
        assert found.json()["error"]["message"] == "API keys cannot be checked at present; try again later"
        assert f"API keys cannot be checked: {'[Errno 2]' if content is None else path}" in caplog.text
        assert httpx.get(f"{url}/v1/models").status_code == 401
        path.write_bytes(good)
        assert httpx.get(f"{url}/v1/models", headers=key).status_code == 200


@pytest.mark.parametrize("content", [b"", b"null", b"1", b'"text"', b"[]", b"[{}]"])
def test_a_body_that_is_no_object_is_called_so(url, content):
    for route in ("chat/completions", "completions", "users/ada/learn"):
        found = httpx.post(f"{url}/v1/{route}", content=content, headers={"content-type": "application/json"})
        error = found.json()["error"]
        assert (found.status_code, error["param"]) == (400, None)
        assert error["message"] == "the body must be a JSON object of the parameters"


def test_health_can_be_asked_for_without_a_body(url):
    for method in ("GET", "HEAD"):
        found = httpx.request(method, f"{url}/health")
        assert (found.status_code, found.text) == (200, '{"status":"ok"}' if method == "GET" else "")


def test_what_a_client_asks_wrongly_is_no_failure_of_the_server(model, tmp_path):
    service = service_of(model, tmp_path, observer=(metrics := Metrics()))
    service.learn("ada", lesson_of()).result(60)
    with pytest.raises(NotFound):
        service.rollback("ada", 99).result(60)
    assert service.drain() == []
    assert metrics.registry.get_sample_value("ttt_failures_total", {"kind": "rollback"}) is None
