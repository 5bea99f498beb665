"""The routes of users over HTTP: what is shown, learnt by request, exported, rolled back and forgotten."""

import copy
import dataclasses
import io
import zipfile

import httpx
import peft
import pytest
import torch
from tiny_chat_model import learner_of, service_of
from tiny_models import assert_same
from web import CHAT, FIXED, client_of, served

import ttt
from ttt.conversation import Telling
from ttt.serve.teaching import Lesson, Teaching


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
    assert found["tokens"] == 2 * len("y dog is called Biscuit.?")
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
    assert httpx.post(f"{url}/v1/users/ada/study").json()["version"] is None  # a body is optional
    assert httpx.get(f"{url}/v1/users/ada/taught").json()["data"][0]["studied"]
    assert httpx.delete(f"{url}/v1/users/ada").json() == {"id": "ada", "deleted": True}
    assert httpx.get(f"{url}/v1/users/ada").status_code == 404
    assert httpx.get(f"{url}/v1/users/ada/taught").status_code == 404
    assert httpx.get(f"{url}/v1/status").json()["users"] == []


def test_what_is_shown_as_stored_is_among_the_versions(model, tmp_path, monkeypatch):
    """The drift is measured once the user's last lesson is learnt: meanwhile it may be stored, too."""
    service = service_of(model, tmp_path / "store")
    measure = service.drift

    def learn_first(user):
        lesson = Lesson.of(list(range(40)), [True] * 40, 512)
        service.learn(user, lesson).result(60).stored.result(60)
        return measure(user)

    monkeypatch.setattr(service, "drift", learn_first)
    with served(service) as url:
        client_of(url, user="ada", learn="off").chat.completions.create(messages=CHAT, max_tokens=2, **FIXED)
        found = httpx.get(f"{url}/v1/users/ada", timeout=60).json()
    assert (found["updates"], found["unsaved"]) == (1, 0)
    assert [each["number"] for each in found["versions"]] == [1]


@pytest.mark.parametrize("forgotten", [False, True])
def test_of_a_user_whose_lease_was_lost_what_the_store_has_is_shown(model, tmp_path, forgotten):
    service = service_of(model, tmp_path / "store")
    store = ttt.Store(tmp_path / "store")
    with served(service) as url:
        client_of(url, user="ada", learn="wait").chat.completions.create(messages=CHAT, max_tokens=2, **FIXED)
        if forgotten:
            store.forget("ada")
        else:
            stolen = store.lease("ada", steal=True)
        service.sessions.get("ada").lose()  # as the next renewal finds
        answer = client_of(url, user="ada").chat.completions.create(messages=CHAT, max_tokens=2, **FIXED)
        assert answer.ttt["learning"].startswith("refused: another server")
        assert (answer.ttt["updates"], answer.ttt["version"]) == (None, None)
        found = httpx.get(f"{url}/v1/users/ada")
        if forgotten:
            assert found.status_code == 404
            assert not store.index.knows("ada")
        else:
            assert found.json()["updates"] in (None, 1)  # once it was opened anew
            assert [each["number"] for each in found.json()["versions"]] == [1]
            stolen.release()


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


def taught(url):
    return [each["text"] for each in httpx.get(f"{url}/v1/users/ada/taught", timeout=60).json()["data"]]


def test_of_what_was_taught_the_first_word_of_a_text_or_turn_is_shown_and_no_other_context(url):
    def learn(**body):
        assert httpx.post(f"{url}/v1/users/ada/learn", json=body, timeout=60).status_code == 200

    text = "She says: My dog is Biscuit."
    learn(text=text)
    learn(text=text, spans=[[10, 28]])
    learn(text=text, spans=[[4, 8], [13, 16]])
    assert taught(url) == [text, "My dog is Biscuit.", "says", "dog"]
    httpx.delete(f"{url}/v1/users/ada")
    chat = [*CHAT, {"role": "assistant", "content": "Nice."}, {"role": "user", "content": "Yes."}]
    learn(messages=chat, roles=["system", "user", "assistant"])
    learn(messages=[{"role": "user", "content": "No."}])
    assert taught(url) == [*(each["content"] for each in chat), "No."]
    httpx.delete(f"{url}/v1/users/ada")
    long = "".join(f"{at}, " for at in range(100))
    learn(messages=[{"role": "user", "content": long}])
    assert len(taught(url)) > 1  # a long run is kept in parts
    assert "".join(taught(url)) == long


def test_a_lesson_may_say_how_it_is_read(url, tmp_path, model, tokenizer):
    text = "Ada lives in York. " * 5
    asked = [("ada", {"passes": 1, "emphasis": 1}), ("bob", {"emphasis": 3.5}), ("cid", {}), ("dan", {"passes": 16})]
    for user, given in asked:
        body = {"text": text, **given}
        assert httpx.post(f"{url}/v1/users/{user}/learn", json=body, timeout=60).status_code == 200
        ids = torch.tensor([tokenizer(text).input_ids])
        reference, telling = learner_of(model), dataclasses.replace(Telling().of(ids.shape[1] - 1), **given)
        after_the_first = torch.arange(ids.shape[1])[None] > 0
        reference.observe(ids, learn_mask=after_the_first, users=[user], **telling.options)
        assert_same(reference.pool.export(user), ttt.Store(tmp_path / "store").get(user).tensors)
    before = ttt.Store(tmp_path / "store").get("ada").tensors
    for given in (
        {"passes": 0},
        {"passes": 17},
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
