"""The HTTP server through OpenAI's own client: chats, texts, and what they teach."""

import threading

import httpx
import openai
import pytest
import torch
from tiny_chat_model import byte_tokenizer, learner_of, service_of
from tiny_models import assert_same
from web import CHAT, FIXED, NAME, client_of, served

import ttt
from ttt.conversation import Telling
from ttt.serve.teaching import Teaching


def greedy(model, ids, count):
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:] if count else []


def byte_of_each_token(tokenizer):
    """The byte that each token of a ``tokenizer`` of bytes stands for, of those that UTF-8 has."""
    characters = map(chr, [*range(0x800), *range(0x800, 0xD800, 0x40), *range(0x10000, 0x110000, 0x1000)])
    each = [(tokenizer(character).input_ids, character.encode()) for character in characters]
    return {token: byte for ids, raw in each for token, byte in zip(ids, raw, strict=True)}


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
    of_bytes = byte_of_each_token(tokenizer)
    assert [bytes(each.bytes) for each in content] == [bytes([of_bytes[token]]) for token in wanted]
    assert b"".join(bytes(each.bytes) for each in content).decode(errors="replace") == tokenizer.decode(wanted)
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
