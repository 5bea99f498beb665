"""The HTTP server through OpenAI's own client, and what wrong or hostile clients get."""

import copy
import dataclasses
import io
import json
import logging
import re
import socket
import threading
import time
import zipfile

import httpx
import openai
import peft
import pytest
import torch
from tiny_chat_model import Answer, byte_tokenizer, learner_of, service_of
from tiny_models import assert_same
from web import NAME, client_of, served

import ttt
from ttt.conversation import Telling
from ttt.serve.http.limits import RateLimits
from ttt.serve.http.metrics import Metrics
from ttt.serve.keys import Keys, add_key, remove_keys
from ttt.serve.teaching import Teaching

CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "My dog is called Biscuit."}]
JSON = {"content-type": "application/json"}
FIXED = {"model": NAME, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def url(model, tmp_path):
    with served(service_of(model, tmp_path / "store")) as found:
        yield found


def greedy(model, ids, count):
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:] if count else []


def test_a_chat_as_openai_answers_it(url, model, tokenizer):
    client = client_of(url, learn="off")
    assert [each.id for each in client.models.list().data] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "ttt"
    answer = client.chat.completions.create(
        messages=CHAT, max_completion_tokens=12, logprobs=True, top_logprobs=3, **FIXED
    )
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=True, return_dict=False)
    wanted = greedy(model, prompt, 12)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == tokenizer.decode(wanted, skip_special_tokens=True)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 12)
    assert answer.usage.total_tokens == len(prompt) + 12
    content = answer.choices[0].logprobs.content
    assert [bytes(each.bytes).decode() for each in content] == [tokenizer.decode([token]) for token in wanted]
    assert all(len(each.top_logprobs) == 3 for each in content)
    assert all(each.top_logprobs[0].logprob == each.logprob for each in content)
    chunks = list(client.chat.completions.create(
        messages=CHAT, max_tokens=12, stream=True, stream_options={"include_usage": True}, **FIXED
    ))  # fmt: skip
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answer.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage == answer.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_several_answers_seeds_and_stops(url):
    client = client_of(url, learn="off")
    several = client.chat.completions.create(model=NAME, messages=CHAT, n=3, seed=3, max_tokens=10, temperature=1.5)
    again = client.chat.completions.create(model=NAME, messages=CHAT, n=3, seed=3, max_tokens=10, temperature=1.5)
    texts = [choice.message.content for choice in several.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    plain = client.completions.create(prompt="ABC", max_tokens=30, **FIXED).choices[0]
    cut = plain.text[10:13]
    stopped = client.completions.create(prompt="ABC", max_tokens=30, stop=[cut, "never"], **FIXED).choices[0]
    assert stopped.text == plain.text[: plain.text.index(cut)]
    assert stopped.finish_reason == "stop"
    streamed = client.completions.create(prompt="ABC", max_tokens=30, stop=cut, stream=True, **FIXED)
    assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == stopped.text


def test_texts_are_scored_as_the_model_scores_them(url, model, tokenizer):
    client = client_of(url)
    texts = ["Hello there, hello.", "Ω and é"]
    found = client.completions.create(prompt=texts, max_tokens=0, echo=True, logprobs=0, **FIXED)
    for text, choice in zip(texts, found.choices, strict=True):
        ids = tokenizer(text).input_ids
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        wanted = scores.gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()
        assert choice.text == text
        assert choice.logprobs.token_logprobs[0] is None
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(wanted, abs=1e-4)
    by_tokens = client.completions.create(prompt=ids, max_tokens=4, **FIXED)
    by_text = client.completions.create(prompt=texts[1], max_tokens=4, **FIXED)
    assert by_tokens.choices[0].text == by_text.choices[0].text


def test_what_is_learnt_is_what_the_header_says(url, tmp_path, model):
    ask = {"messages": CHAT, "max_tokens": 3, **FIXED}
    off = client_of(url, user="ada", learn="off").chat.completions.create(**ask)
    assert (off.ttt["updates"], off.ttt["learning"]) == (0, "off")
    on = client_of(url, user="ada").chat.completions.create(**ask)
    assert on.ttt["learning"] == "queued"
    wait = client_of(url, user="ada", learn="wait").chat.completions.create(**ask)
    assert (wait.ttt["learning"], wait.ttt["version"], wait.ttt["updates"]) == ("stored", 2, 2)
    text = client_of(url, user="ada").completions.create(prompt="some text", max_tokens=1, **FIXED)
    assert text.ttt == {"updates": 2, "version": 2, "learning": "off"}
    lesson = Teaching().lesson(byte_tokenizer(), CHAT, 512)
    reference = learner_of(model)
    for _ in range(2):
        ids, mask = lesson.tensors()
        reference.observe(ids, learn_mask=mask, users=["ada"], **Telling().of(lesson.tokens).options)
    assert_same(reference.pool.export("ada"), ttt.Store(tmp_path / "store").get("ada").tensors)
    with pytest.raises(openai.BadRequestError, match="x-ttt-learn"):
        client_of(url, user="ada", learn="maybe").chat.completions.create(**ask)


def test_the_user_field_of_a_request_names_nobody(url):
    client_of(url, user="ada", learn="wait").chat.completions.create(messages=CHAT, max_tokens=2, user="bob", **FIXED)
    assert httpx.get(f"{url}/v1/users/bob").status_code == 404
    assert httpx.get(f"{url}/v1/users/ada").json()["updates"] == 1


def relative_change(model, state):
    """The norm of what the user's ``state`` adds to the weights that learn, relative to that of these."""
    change = size = 0.0
    for name, module in model.named_modules():
        if f"{name}.a" in state:
            a, b = (state[f"{name}.{part}"].double() for part in "ab")
            change += float((b.T @ a).square().sum())
            size += float(module.weight.detach().double().square().sum())
    return (change / size) ** 0.5


def test_a_user_is_shown_goes_back_and_is_forgotten(url, model, tmp_path):
    client = client_of(url, user="ada", learn="wait")
    for _ in range(2):
        client.chat.completions.create(messages=CHAT, max_tokens=2, **FIXED)
    found = httpx.get(f"{url}/v1/users/ada").json()
    assert [each["number"] for each in found["versions"]] == [2, 1]
    assert (found["updates"], found["online"], found["read_only"]) == (2, True, "")
    assert found["tokens"] == 2 * len("My dog is called Biscuit.?")
    state = ttt.Store(tmp_path / "store").get("ada").tensors
    assert found["drift"] > 0
    assert found["drift"] == pytest.approx(relative_change(model, state), rel=1e-3)
    back = httpx.post(f"{url}/v1/users/ada/rollback", json={"version": 1})
    assert back.json() == {"id": "ada", "version": 3, "updates": 3}
    assert httpx.get(f"{url}/v1/users/ada").json()["versions"][0]["restores"] == 1
    taught = httpx.get(f"{url}/v1/users/ada/taught").json()["data"]
    assert [each["text"] for each in taught] == ["My dog is called Biscuit."]
    assert taught[0]["now"] < taught[0]["before"]
    studied = httpx.post(f"{url}/v1/users/ada/study", json={"passes": 3}, timeout=60).json()
    assert (studied["episodes"], studied["version"], len(studied["losses"])) == (1, 4, 3)
    assert httpx.post(f"{url}/v1/users/ada/study", json={}).json()["version"] is None
    assert httpx.get(f"{url}/v1/users/ada/taught").json()["data"][0]["studied"]
    assert httpx.delete(f"{url}/v1/users/ada").json() == {"id": "ada", "deleted": True}
    assert httpx.get(f"{url}/v1/users/ada").status_code == 404
    assert httpx.get(f"{url}/v1/users/ada/taught").status_code == 404
    assert httpx.get(f"{url}/v1/status").json()["users"] == []


def test_texts_and_chats_are_learnt_by_request(url, tmp_path, model, tokenizer):
    text = "Ada lives in York. Bob does not."
    first = httpx.post(f"{url}/v1/users/ada/learn", json={"text": text}).json()
    ids = tokenizer(text).input_ids
    assert (first["tokens"], first["version"]) == (len(ids) - 1, 1)
    spans = httpx.post(f"{url}/v1/users/ada/learn", json={"text": text, "spans": [[4, 18]]}).json()
    assert spans["tokens"] == 14
    chat = [*CHAT, {"role": "assistant", "content": "Nice."}, {"role": "user", "content": "Yes."}]
    roles = httpx.post(f"{url}/v1/users/ada/learn", json={"messages": chat, "roles": ["user", "assistant"]}).json()
    reference = learner_of(model)
    lessons = [
        (ids, [True] * len(ids)), (ids, [4 <= at < 18 for at in range(len(ids))]),
    ]  # fmt: skip
    lesson = Teaching(("user", "assistant"), all_turns=True).lesson(tokenizer, chat, 512)
    assert roles["tokens"] == lesson.tokens
    for tokens, mask in [*lessons[:1], (ids[:18], lessons[1][1][:18]), (lesson.ids, lesson.learn)]:
        mask = [False, *mask[1:]]
        reference.observe(
            torch.tensor([tokens]), learn_mask=torch.tensor([mask]), users=["ada"], **Telling().of(sum(mask)).options
        )
    assert_same(reference.pool.export("ada"), ttt.Store(tmp_path / "store").get("ada").tensors)


def test_a_lesson_may_say_how_it_is_read(url, tmp_path, model, tokenizer):
    text = "Ada lives in York. " * 5
    for user, given in (("ada", {"passes": 1, "emphasis": 1}), ("bob", {"emphasis": 3.5}), ("cid", {})):
        assert httpx.post(f"{url}/v1/users/{user}/learn", json={"text": text, **given}).status_code == 200
        ids = torch.tensor([tokenizer(text).input_ids])
        reference, telling = learner_of(model), dataclasses.replace(Telling().of(ids.shape[1] - 1), **given)
        after_the_first = torch.arange(ids.shape[1])[None] > 0
        reference.observe(ids, learn_mask=after_the_first, users=[user], **telling.options)
        assert_same(reference.pool.export(user), ttt.Store(tmp_path / "store").get(user).tensors)
    before = ttt.Store(tmp_path / "store").get("ada").tensors
    for given in (
        {"passes": 0},
        {"passes": 5},
        {"passes": 1.5},
        {"emphasis": 0},
        {"emphasis": 101},
        {"emphasis": "much"},
    ):
        answer = httpx.post(f"{url}/v1/users/ada/learn", json={"text": text, **given})
        assert answer.status_code == 400
        assert next(iter(given)) in answer.json()["error"]["message"]
    assert_same(before, ttt.Store(tmp_path / "store").get("ada").tensors)


def test_an_export_is_what_the_user_gets(url, model, tokenizer, tmp_path):
    httpx.post(f"{url}/v1/users/ada/learn", json={"text": "Ada lives in York. " * 5})
    data = httpx.get(f"{url}/v1/users/ada/export")
    assert data.headers["content-type"] == "application/zip"
    zipfile.ZipFile(io.BytesIO(data.content)).extractall(tmp_path / "adapter")
    with torch.random.fork_rng():
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter").eval()
    scored = client_of(url, user="ada").completions.create(
        prompt="Where does Ada live?", max_tokens=0, echo=True, logprobs=0, **FIXED
    )  # fmt: skip
    ids = torch.tensor([tokenizer("Where does Ada live?").input_ids])
    with torch.no_grad():
        wanted = adapted(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    assert scored.choices[0].logprobs.token_logprobs[1:] == pytest.approx(wanted.tolist(), abs=1e-3)


# -- who may do what -------------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="API keys"):
        Keys(tmp_path / "keys")


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

WRONG = [
    ({"model": "other"}, 404, "model"),
    ({"temperature": 3}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"n": 0}, 400, "n"),
    ({"n": 17}, 400, "n"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 10**9}, 400, "messages"),
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
        "messages[0]",
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
        deep = b'{"model": ' + b"[" * 100_000
        assert httpx.post(f"{url}/v1/chat/completions", content=deep, headers=JSON).status_code == 400
        assert httpx.get(f"{url}/nothing").json()["error"]["code"] == "not_found"
        assert httpx.put(f"{url}/v1/models").status_code == 405
        assert_same(before, service.export("ada").result(60))
        assert service.sessions.users == ("ada",)


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
    tokens = len("My dog is called Biscuit.?")
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


def test_many_clients_at_once_get_what_they_would_get_alone(model, tmp_path, tokenizer):
    service = service_of(model, tmp_path, slots=3, rows=4)
    with served(service) as url:
        prompts = ["a" * size for size in (3, 50, 17, 90, 33, 8)]
        found = {}

        def ask(prompt):
            stream = client_of(url).completions.create(prompt=prompt, max_tokens=20, stream=True, **FIXED)
            found[prompt] = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)

        threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        for prompt in prompts:
            wanted = greedy(model, tokenizer(prompt).input_ids, 20)
            assert found[prompt] == tokenizer.decode(wanted, skip_special_tokens=True)
