"""The HTTP server at its edges: forms of streams, bodies that are no JSON, long texts, and who waits for what."""

import json
import multiprocessing
import threading
import time

import httpx
import pytest
from tiny_chat_model import service_of
from web import CHAT, NAME, client_of, served

from ttt.serve.http.limits import RateLimits
from ttt.serve.keys import Keys, add_key

JSON = {"content-type": "application/json"}


def chunks_of(url, route, body, **headers):
    """The events of a stream, as they are sent."""
    body = {"model": NAME, "stream": True, "ignore_eos": True, "temperature": 0, **body}
    found = httpx.post(f"{url}/v1/{route}", json=body, headers={"x-ttt-user": "ada", **headers}, timeout=60)
    lines = [line.removeprefix("data: ") for line in found.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_has_a_choice_in_each_part_but_that_of_the_usage(url, route, usage, n):
    body = {"messages": CHAT} if route.startswith("chat") else {"prompt": "Hello"}
    options = {"stream_options": {"include_usage": True}} if usage else {}
    parts = chunks_of(url, route, {**body, **options, "n": n, "max_tokens": 5}, **{"x-ttt-learn": "wait"})
    if usage:
        last = parts.pop()
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 5 * n
    assert [len(part["choices"]) for part in parts] == [1] * len(parts)
    choices = [part["choices"][0] for part in parts]
    assert sorted(c["index"] for c in choices if c["finish_reason"]) == list(range(n))
    for at in range(n):  # nothing of a sequence comes after its end
        mine = [choice["finish_reason"] for choice in choices if choice["index"] == at]
        assert mine == [None] * (len(mine) - 1) + ["length"]
    assert ["ttt" in part for part in parts] == [False] * (len(parts) - 1) + [True]
    assert (parts[-1]["ttt"]["learning"], parts[-1]["ttt"]["version"]) == ("stored", 1)


def test_streamed_scores_stand_where_those_of_a_whole_answer_stand(url):
    body = {"prompt": "Hello", "max_tokens": 12, "logprobs": 1, "n": 2, "seed": 3, "temperature": 1.0}
    whole = httpx.post(f"{url}/v1/completions", json={"model": NAME, "ignore_eos": True, **body}).json()["choices"]
    found = {0: [], 1: []}
    for part in chunks_of(url, "completions", body):
        choice = part["choices"][0]
        found[choice["index"]] += choice["logprobs"]["text_offset"]
    assert [found[0], found[1]] == [choice["logprobs"]["text_offset"] for choice in whole]
    assert max(found[0]) > 5


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"model": "\xff"}', b'{"seed": ' + b"9" * 5000 + b"}", b'{"model": ' + b'{"a":' * 5000],
)
def test_a_body_that_cannot_be_read_is_called_no_json(url, content):
    for route in ("chat/completions", "users/ada/learn"):
        found = httpx.post(f"{url}/v1/{route}", content=content, headers=JSON)
        assert found.status_code == 400
        error = found.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert "not served" not in error["message"]
    assert httpx.get(f"{url}/v1/users/ada").status_code == 404


def test_numbers_of_versions_have_a_bound(url):
    httpx.post(f"{url}/v1/users/ada/learn", json={"text": "something"})
    for version, status in ((10**30, 400), (2**63, 400), (2**63 - 1, 404)):
        found = httpx.post(f"{url}/v1/users/ada/rollback", json={"version": version})
        assert (found.status_code, found.json()["error"]["param"]) == (status, "version")


def test_who_is_not_known_gets_no_slot(model, tmp_path):
    service = service_of(model, tmp_path)
    with served(service) as url:
        for route, body in (("rollback", {"version": 1}), ("study", {})):
            assert httpx.post(f"{url}/v1/users/nobody/{route}", json=body).status_code == 404
        assert service.sessions.users == ()
        too_many = httpx.post(f"{url}/v1/chat/completions", json={"model": NAME, "messages": CHAT, "n": 9})
        assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "n")


def test_the_description_of_the_api_needs_a_key_as_the_api_does(model, tmp_path):
    key = add_key(tmp_path / "keys", "ada")
    with served(service_of(model, tmp_path / "store"), keys=Keys(tmp_path / "keys")) as url:
        assert httpx.get(f"{url}/openapi.json").status_code == 401
        found = httpx.get(f"{url}/openapi.json", headers={"authorization": f"Bearer {key}"}).json()
        assert "/v1/chat/completions" in found["paths"]


class Patient:
    """A ``tokenizer`` that begins no text before a question that was asked meanwhile is answered."""

    def __init__(self, tokenizer):
        self._tokenizer, self._changed, self.answers = tokenizer, threading.Condition(), 0

    def answered(self):
        with self._changed:
            self.answers += 1
            self._changed.notify_all()

    def _wait(self):
        with self._changed:
            wanted = self.answers + 2  # the first of them may have been under way
            assert self._changed.wait_for(lambda: self.answers >= wanted, 30), "others wait for the tokenizer"

    def __call__(self, *args, **options):
        self._wait()
        return self._tokenizer(*args, **options)

    def apply_chat_template(self, *args, **options):
        self._wait()
        return self._tokenizer.apply_chat_template(*args, **options)

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


def test_nobody_waits_for_a_text_that_is_tokenized(model, tmp_path, monkeypatch):
    """Tokenizing is done apart from the loop that answers."""
    service = service_of(model, tmp_path)
    monkeypatch.setattr(service, "tokenizer", tokenizer := Patient(service.tokenizer))
    with served(service, largest_body=4 << 20) as url:
        text = "x" * 100_000
        bodies = {
            "users/ada/learn": [
                {"text": text, "spans": [[at, at + 1] for at in range(0, 8000, 2)]},
                {"messages": [{"role": "user", "content": "y" * 50}] * 2000},
            ],
            "chat/completions": [{"model": NAME, "messages": [{"role": "user", "content": text}] * 8}],
            "completions": [{"model": NAME, "prompt": [text] * 8}],
        }
        done = threading.Event()

        def look():
            while not done.is_set():
                assert httpx.get(f"{url}/health", timeout=60).status_code == 200
                tokenizer.answered()

        looking = threading.Thread(target=look)
        looking.start()
        try:
            for route, each in bodies.items():
                for body in each:
                    found = httpx.post(f"{url}/v1/{route}", json=body, timeout=60)
                    assert found.status_code in (200, 400), found.text
        finally:
            done.set()
            looking.join()
        assert tokenizer.answers > 0
        tokens = httpx.get(f"{url}/v1/users/ada").json()["tokens"]
        assert 0 < tokens < 512  # of the chat's end


def test_a_request_on_a_user_is_ended_after_its_time(model, tmp_path, monkeypatch):
    service = service_of(model, tmp_path)
    go_on = threading.Event()
    put = service.store.put

    def hanging(*args):
        go_on.wait(30)
        return put(*args)

    monkeypatch.setattr(service.store, "put", hanging)
    with served(service, seconds=0.5) as url:
        found = httpx.post(f"{url}/v1/users/ada/learn", json={"text": "something"})
        assert (found.status_code, found.json()["error"]["code"]) == (504, "timeout")
        go_on.set()
        while not (versions := httpx.get(f"{url}/v1/users/ada").json()["versions"]):  # it is stored all the same
            time.sleep(0.05)
        assert versions[0]["number"] == 1


def test_tokens_that_were_not_generated_are_given_back(model, tmp_path):
    with served(service_of(model, tmp_path), limits=RateLimits(tokens=300)) as url:
        client = client_of(url, learn="off")
        wanted = {"model": NAME, "prompt": "abc", "temperature": 0, "extra_body": {"ignore_eos": True}}
        first = client.completions.create(max_tokens=4, **wanted).choices[0].text[0]
        for _ in range(5):  # each may generate 200 tokens, and ends at once
            found = client.completions.create(max_tokens=200, stop=first, **wanted)
            assert found.usage.completion_tokens <= 4
        long = httpx.post(f"{url}/v1/users/ada/learn", json={"text": "x" * 290})
        assert long.status_code == 429
        refused = httpx.post(f"{url}/v1/completions", json={"model": NAME, "prompt": "abc", "max_tokens": 290})
        assert refused.status_code == 429


def test_rate_limits_never_hold_less_than_nothing_and_never_more_than_a_minutes_worth():
    limits = RateLimits(tokens=600)  # 10 in a second
    limits.take("a", tokens=10_000)  # takes a minute's worth
    with pytest.raises(Exception, match="try again in 1 s"):
        limits.take("a", tokens=5)
    limits.give_back("a", 9_990)
    limits.take("a", tokens=600)
    with pytest.raises(Exception, match="try again in 60 s"):
        limits.take("a", tokens=600)
    limits.give_back("b", 100)  # has asked for nothing
    limits.take("b", tokens=600)


def _add(path, user):
    for _ in range(5):
        add_key(path, user)


def test_keys_that_are_added_at_once_are_all_kept(tmp_path):
    path = tmp_path / "keys"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_add, args=(path, f"user{at}")) for at in range(4)]
    [process.start() for process in processes]
    [process.join() for process in processes]
    entries = Keys(path).entries()
    assert len(entries) == 20
    assert path.stat().st_mode & 0o077 == 0
