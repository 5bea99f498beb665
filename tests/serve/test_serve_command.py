"""``ttt serve`` and ``ttt keys`` as commands, on a model in a folder."""

import asyncio
import gzip
import http.server
import json
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest
import torch
import typer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tiny_chat_model import byte_tokenizer, learner_of, tiny_chat_model
from typer.testing import CliRunner
from web import client_of

import ttt
from ttt.cli import app
from ttt.conversation import CONVERSATION
from ttt.per_user.calibration_file import SHARED, calibrate_once, default_file, weights_name
from ttt.serve.http.telemetry import Traced
from ttt.serve.keys import Keys
from ttt.serve.main import ServeOptions, adapted, is_loopback, own_hosts, run

CHAT = [{"role": "user", "content": "My dog is called Biscuit."}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny-chat"
    tiny_chat_model().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def start(folder, tmp_path, forks):
    """Starts servers; those that are still running at the end are killed. ``new``: in a new interpreter."""
    started = []

    def begin(*options, program=("-m", "ttt"), new=False):
        port = 18000 + os.getpid() % 10000 + len(started)
        command = [*program, "serve", str(folder), "--port", str(port), "--study-after", "0",
                   "--store", str(tmp_path / "store"), "--calibration", str(tmp_path / "calibration"),
                   *options]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if new:
            command = [sys.executable, *command]
            process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        else:
            process = forks.start(command, stderr=subprocess.PIPE, env=environment)
        started.append(process)
        url, began = f"http://127.0.0.1:{port}", time.monotonic()
        while True:
            try:
                assert httpx.get(f"{url}/health").json() == {"status": "ok"}
                return process, url
            except httpx.TransportError:
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() - began < 90
                time.sleep(0.1)

    yield begin
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()


def test_what_was_learnt_is_there_after_a_restart(start, tmp_path):
    process, url = start(new=True)
    client = client_of(url, user="ada")
    ask = {"model": "tiny-chat", "messages": CHAT, "max_tokens": 3, "temperature": 0}
    for _ in range(3):
        assert client.chat.completions.create(**ask).ttt["learning"] == "queued"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert ttt.Store(tmp_path / "store").history("ada")
    with ttt.Store(tmp_path / "store").lease("ada"):  # it was released
        pass
    process, url = start()
    found = client_of(url, user="ada", learn="off").chat.completions.create(**ask)
    assert found.ttt["updates"] == 3
    logs = process.stderr
    process.send_signal(signal.SIGINT)
    assert process.wait(60) in (0, -signal.SIGINT)
    text = logs.read()
    assert '"route": "/v1/chat/completions", "status": 200' in text
    assert "Biscuit" not in text
    assert "ada" not in text


def test_a_request_that_is_under_way_is_finished_when_the_server_is_stopped(start):
    process, url = start()
    stream = client_of(url, user="ada").chat.completions.create(
        model="tiny-chat", messages=CHAT, max_tokens=300, stream=True, temperature=0, extra_body={"ignore_eos": True}
    )  # fmt: skip
    next(iter(stream))
    process.send_signal(signal.SIGTERM)
    *_, last = list(stream)
    assert last.ttt["learning"] == "queued"
    assert process.wait(60) == 0


SLOW_STORE = """
import time
from ttt import Store
from ttt.cli import app
put = Store.put
def slow(*args, **options):
    time.sleep(3)
    return put(*args, **options)
Store.put = slow
app()
"""


def test_open_requests_use_up_their_own_time_and_not_that_of_the_store(start, tmp_path):
    process, url = start("--drain-seconds", "2", program=("-c", SLOW_STORE))
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port), timeout=60) as open_request:
        # The server waits for a body that does not come.
        open_request.sendall(
            b"POST /v1/users/bob/learn HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: 9\r\n\r\n{"
        )
        answer = client_of(url, user="ada").chat.completions.create(model="tiny-chat", messages=CHAT, max_tokens=1)
        assert answer.ttt["learning"] == "queued"
        process.send_signal(signal.SIGTERM)
        with open_request.makefile("rb") as answered:
            lines = answered.read().decode().lower().splitlines()
    log = process.stderr.read()
    assert process.wait(60) == 0, log
    assert [each.number for each in ttt.Store(tmp_path / "store").history("ada")] == [1]
    assert lines[0].startswith("http/1.1 503 ")
    assert "retry-after: 10" in lines
    assert lines[-1] == (
        '{"error": {"message": "the server is stopping", "type": "server_error", "param": null, "code": "unavailable"}}'
    )
    assert "Traceback" not in log
    assert '"route": "/v1/users/{user}/learn", "status": 503' in log


SLOW_ANSWERS = """
import time
from ttt.cli import app
from ttt.serve.batch import Batch
decode_step = Batch.decode_step
def slow(self):
    if self.decoding:
        time.sleep(0.1)
    decode_step(self)
Batch.decode_step = slow
app()
"""


@pytest.mark.parametrize("learn", ["on", "wait"])
def test_a_stream_that_outlasts_the_end_of_the_server_ends_with_an_error(start, learn):
    program = SLOW_ANSWERS if learn == "on" else SLOW_STORE.replace("sleep(3)", "sleep(30)")
    process, url = start("--drain-seconds", "1", program=("-c", program))
    body = {"model": "tiny-chat", "messages": CHAT, "max_tokens": 300 if learn == "on" else 2, "stream": True}
    body |= {"temperature": 0, "ignore_eos": True}
    headers = {"x-ttt-user": "ada", "x-ttt-learn": learn}
    stream = client_of(url, user="ada", learn=learn).chat.completions.create(
        extra_body={"ignore_eos": True}, **{name: body[name] for name in body if name != "ignore_eos"}
    )  # fmt: skip
    next(iter(stream))
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60) as raw:
        lines = raw.iter_lines()
        first = next(lines)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="the server is stopping") as raised:
            list(stream)
        rest = [line for line in lines if line]  # which raises if the answer is cut short
    assert raised.value.code == "unavailable"
    assert first.startswith("data: {")
    assert json.loads(rest[-1].removeprefix("data: ")) == {
        "error": {"message": "the server is stopping", "type": "server_error", "param": None, "code": "unavailable"}
    }
    assert not [line for line in rest[:-1] if '"error"' in line or "[DONE]" in line]
    log = process.stderr.read()
    assert process.wait(60) == (learn == "wait")
    assert "Traceback" not in log


def test_what_a_store_did_not_take_in_time_is_said(start, tmp_path):
    process, url = start("--drain-seconds", "1", program=("-c", SLOW_STORE.replace("sleep(3)", "sleep(30)")))
    answer = client_of(url, user="ada").chat.completions.create(model="tiny-chat", messages=CHAT, max_tokens=1)
    assert answer.ttt["learning"] == "queued"
    process.send_signal(signal.SIGTERM)
    log = process.stderr.read()
    assert process.wait(60) == 1
    assert log.splitlines()[-1] == "what 1 user(s) said last was not stored in 1 s"


def test_a_server_with_guards_undoes_what_goes_too_far_and_one_without_goes_on(start, tmp_path):
    process, url = start("--guard", "1e-9", "--emphasis", "100", "--passes", "4")
    client = client_of(url, user="ada", learn="wait")
    answer = client.chat.completions.create(model="tiny-chat", messages=CHAT, max_tokens=2)
    again = client.chat.completions.create(model="tiny-chat", messages=CHAT, max_tokens=2)
    found = [each.model_extra["ttt"] for each in (answer, again)]
    shown = httpx.get(f"{url}/v1/users/ada").json()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    refused = [each for each in found if each["learning"] != "stored"]
    assert refused  # steps of this size raise the loss on other text
    for each in refused:
        assert each["learning"].startswith(
            "refused: nothing was learnt: with it the loss on the guard's held-back text"
        )
    assert shown["guard"]["trips"] == len(refused)
    assert shown["guard"]["bound"] == 1e-9
    assert len(shown["versions"]) == shown["updates"] == 2 - len(refused)
    assert (tmp_path / "calibration-guard").exists()
    process, url = start()
    answer = client_of(url, user="ada", learn="wait").chat.completions.create(
        model="tiny-chat", messages=CHAT, max_tokens=2
    )
    assert answer.model_extra["ttt"]["learning"] == "stored"
    assert httpx.get(f"{url}/v1/users/ada").json()["guard"] is None


def test_a_span_of_every_request_is_sent_and_holds_nothing_that_was_said(start, monkeypatch):
    received = queue.Queue()

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            received.put((self.path, self.rfile.read(int(self.headers["Content-Length"])), self.headers))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{receiver.server_port}")
        monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
        process, url = start("--telemetry")
        client_of(url, user="ada").chat.completions.create(model="tiny-chat", messages=CHAT, max_tokens=2)
        named = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01", "user-agent": "planted-agent"}
        httpx.get(f"{url}/v1/users/ada?key=planted", headers=named)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        receiver.shutdown()
    spans = []
    while not received.empty():
        path, body, headers = received.get()
        assert path == "/v1/traces"
        raw = gzip.decompress(body) if headers.get("Content-Encoding") == "gzip" else body
        assert not [word for word in (b"Biscuit", b"planted", b"/ada", b"127.0.0.1") if word in raw]
        for resource in ExportTraceServiceRequest.FromString(raw).resource_spans:
            assert {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"] == "ttt-serve"
            spans += [span for scope in resource.scope_spans for span in scope.spans]
    by_name = {span.name: span for span in spans}
    assert {"POST /v1/chat/completions", "GET /health"} <= set(by_name)
    assert by_name["GET /v1/users/{user}"].trace_id.hex() == "ab" * 16
    for span in spans:
        keys = {a.key for a in span.attributes}
        assert keys == {"http.request.method", "http.response.status_code", "http.route"}


def test_a_span_of_a_request_that_fails_names_the_class_of_the_error_only():
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))

    async def failing(scope, receive, send):
        raise RuntimeError("cannot handle 'My dog is Biscuit'")

    traced = Traced(failing, tracer=provider.get_tracer("test"))
    with pytest.raises(RuntimeError):
        asyncio.run(traced({"type": "http", "method": "GET", "headers": []}, None, None))
    (span,) = spans.get_finished_spans()
    assert span.attributes["error.type"] == "RuntimeError"
    assert not span.events
    assert span.status.description is None


def test_names_of_this_machine_are_each_given_once():
    own = ["127.0.0.1", "localhost", "[::1]"]
    assert own_hosts("127.0.0.1") == own_hosts("::1") == own_hosts("localhost") == own
    assert own_hosts("127.0.0.2") == [*own, "127.0.0.2"]


def test_servers_that_others_reach_need_keys(folder, capsys):
    with pytest.raises(typer.Exit) as ended:
        run(ServeOptions(model=folder, host="0.0.0.0"))
    assert ended.value.exit_code == 1
    assert "--keys" in capsys.readouterr().err
    assert [
        is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "me")
    ] == ([True] * 4 + [False] * 3)


@pytest.mark.parametrize(
    ("options", "why"),
    [({"dtype": "int8"}, "dtype"), ({"user": "a b"}, "user"), ({"keys": "missing"}, "missing"),
     ({"store": "x://"}, "url")],
)  # fmt: skip
def test_wrong_options_end_the_server_with_a_line(folder, tmp_path, capsys, options, why):
    usual = {"model": folder, "store": str(tmp_path / "store"), "calibration": tmp_path / "c"}
    with pytest.raises(typer.Exit) as ended:
        run(ServeOptions(**usual | options))
    assert ended.value.exit_code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert why in lines[-1]
    log = logging.getLogger("ttt.serve")
    assert (log.handlers, log.propagate, log.level) == ([], True, logging.NOTSET)  # as before, not a closed stream


@pytest.mark.parametrize(
    ("options", "why"),
    [(["--guard", value], "guard must be a number in (0.0, inf), got") for value in ("0", "-1", "nan", "inf")]
    + [(["--learning-share", "0"], "learning_share must be")],
)
def test_wrong_numbers_are_refused_before_the_model_is_loaded(monkeypatch, options, why):
    monkeypatch.setattr("ttt.serve.main.load", lambda folder: pytest.fail("the model was loaded"))
    done = CliRunner().invoke(app, ["serve", *options])
    assert done.exit_code == 1
    assert why in done.stderr.strip().splitlines()[-1]


def test_a_port_that_is_taken_is_refused_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr("ttt.serve.main.load", lambda folder: pytest.fail("the model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(app, ["serve", "--port", str(port)])
    assert done.exit_code == 1
    assert f"cannot listen at 127.0.0.1:{port}: " in done.stderr
    assert "another --port" in done.stderr


def test_keys_are_made_listed_and_revoked(tmp_path):
    path, runner = str(tmp_path / "keys.json"), CliRunner()
    key = runner.invoke(app, ["keys", "add", path, "--user", "ada"]).stdout.strip()
    operator = runner.invoke(app, ["keys", "add", path, "--operator"]).stdout.strip()
    keys = Keys(path)
    assert keys.identify(f"Bearer {key}").user == "ada"
    assert keys.identify(f"bearer {operator}", "bob").user == "bob"
    listed = runner.invoke(app, ["keys", "ls", path]).stdout
    assert "ada" in listed
    assert "(operator)" in listed
    assert key not in listed
    for wrong in (["add", path], ["add", path, "--user", "a", "--operator"], ["add", path, "--user", "a b"],
                  ["ls", path + "x"], ["revoke", path]):  # fmt: skip
        assert runner.invoke(app, ["keys", *wrong]).exit_code == 1
    assert "1 key" in runner.invoke(app, ["keys", "revoke", path, "--operator"]).stdout
    before = (tmp_path / "keys.json").read_bytes()
    for whose in (["--operator"], ["--user", "bob"]):
        done = runner.invoke(app, ["keys", "revoke", path, *whose])
        assert (done.exit_code, done.stdout) == (1, "")
        assert f"{path} has no key of" in done.stderr
    assert (tmp_path / "keys.json").read_bytes() == before
    assert [entry.get("user") for entry in Keys(path).entries().values()] == ["ada"]


def test_a_store_that_cannot_be_opened_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    def load(*args):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("ttt.serve.main.load", load)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(typer.Exit):
        run(ServeOptions(model=tmp_path / "nothing", store=str(tmp_path / "file"), port=0))
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_calibration_is_measured_once(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    learner, other = learner_of(model), learner_of(model)
    file = default_file(learner.pool)
    assert file == default_file(other.pool)
    wanted = {
        name: {buffer: t.clone() for buffer in SHARED if (t := getattr(layer, buffer, None)) is not None}
        for name, layer in learner.pool.layers.items()
    }
    assert calibrate_once(learner.pool, file, lambda: None)
    for layer in other.pool.layers.values():
        for buffer in SHARED:
            if (t := getattr(layer, buffer, None)) is not None:
                t.zero_()
    assert not calibrate_once(other.pool, file, lambda: pytest.fail("it is there already"))
    for name, layer in other.pool.layers.items():
        assert {"basis", "output_basis"} <= set(wanted[name])
        assert all(torch.equal(t, getattr(layer, buffer)) for buffer, t in wanted[name].items())
    changed = learner_of(tiny_chat_model(seed=3))
    assert weights_name(changed.pool) != weights_name(other.pool)
    assert default_file(changed.pool) != file
    with pytest.raises(ValueError, match="another"):
        calibrate_once(changed.pool, file, lambda: None)
    file.write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot be read"):
        calibrate_once(other.pool, file, lambda: None)


def test_rank_is_that_of_users_weights():
    for rank, found in ((5, 5), (None, CONVERSATION.per_user.rank)):
        pool = adapted(tiny_chat_model(), slots=2, rank=rank).pool
        assert {(layer.low_rank.slots, layer.low_rank.rank) for layer in pool.layers.values()} == {(2, found)}
