"""The suite "streams" on a tiny random model: its measures against brute force, its texts, and resumed runs."""

import json
import math

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, tiny
from typer.testing import CliRunner

from bench.learning import tuning
from bench.learning.__main__ import app
from bench.learning.language import hard, measures, readers, tables, texts
from bench.learning.language.base import Base
from bench.learning.language.best import best
from bench.learning.language.methods import DEFAULT, METHODS
from bench.learning.language.run import run
from bench.learning.language.suite import StreamsSuite, _check
from bench.learning.suites import SUITES
from ttt.demo import knowledge

FACTS = [("ab", "c"), ("xyz", "uvw")]


def encode(text):
    return torch.tensor([byte % (VOCAB - 1) + 1 for byte in text.encode()])


def tiny_base():
    torch.manual_seed(0)
    return Base(tiny("llama"), encode, lambda: torch.randint(1, VOCAB, (2, 64)), FACTS)


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture
def fresh_texts():
    for cached in (texts.read, _check):
        cached.cache_clear()
    yield
    for cached in (texts.read, _check):
        cached.cache_clear()


def ids_of(length):
    return torch.randint(1, VOCAB, (1, length))


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits[0].double().numpy()


def log_softmax(z):
    return z - z.max(1, keepdims=True) - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True))


# -- measures -------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_each_next_token(base):
    ids = ids_of(9)
    found = knowledge.loss(base.model, ids)
    scores = log_softmax(logits(base.model, ids[:, :-1]))
    assert found.tolist() == pytest.approx([-scores[t, int(ids[0, t + 1])] for t in range(8)], abs=1e-5)


def test_the_divergence_is_from_the_frozen_model_to_the_learnt_one(base):
    other, rows = base.copy(), ids_of(33).view(3, 11)
    with torch.no_grad():
        for name in base.names:
            other.get_parameter(name).mul_(1.5)
    hidden = [measures.final_hidden(base.model, row) for row in rows.split(1)]
    found = measures.divergence(other, rows, base.model.get_output_embeddings(), hidden)
    assert found.shape == (3, 11)
    for row, mine in zip(rows.split(1), found, strict=True):
        p, q = (log_softmax(logits(model, row)) for model in (base.model, other))
        assert mine.tolist() == pytest.approx((np.exp(p) * (p - q)).sum(1).tolist(), rel=1e-3, abs=1e-5)
    none = measures.divergence(base.model, rows, base.model.get_output_embeddings(), hidden)
    assert float(none.abs().max()) < 1e-5


def test_the_loss_on_facts_is_of_what_follows_the_sentence(base):
    total = 0.0
    for sentence, end in FACTS:
        ids = encode(sentence + end)
        scores = log_softmax(logits(base.model, ids[None]))
        for t in range(len(sentence), len(sentence) + len(end)):
            total -= scores[t - 1, int(ids[t])]
    assert knowledge.facts_loss(base.model, base.facts) == pytest.approx(total / 2, abs=1e-4)


def test_blocks_are_means_of_consecutive_parts():
    values = torch.randn(16, 5)
    assert measures.blocks(values) == pytest.approx(values.double().mean(1).tolist(), abs=1e-6)
    with pytest.raises(ValueError, match="multiple of 16 in number, got 30"):
        measures.blocks(torch.randn(30))


def test_the_interval_of_the_gain_is_that_of_the_differences():
    frozen, mine, kl = (torch.rand(16).tolist() for _ in range(3))
    others = {"frozen": {"blocks": frozen, "facts": 1.0}}
    found = StreamsSuite().measure({"nll": 1.0, "blocks": mine, "kl": kl, "facts": 1.25, "time_ratio": 2.0}, others)
    difference = np.array(frozen) - np.array(mine)
    assert found["gain"] == pytest.approx(difference.mean())
    assert found["gain_width"] == pytest.approx(2.131 * difference.std(ddof=1) / math.sqrt(16))
    assert found["kl"] == pytest.approx(np.mean(kl))
    assert found["kl_width"] == pytest.approx(2.131 * np.std(kl, ddof=1) / math.sqrt(16))
    assert found["facts"] == 0.25


# -- methods --------------------------------------------------------------------------------------------------------


def test_a_copy_shares_all_weights_but_those_that_learn(base):
    copied = dict(base.copy().named_parameters())
    apart = {name for name, p in base.model.named_parameters() if copied[name] is not p}
    assert apart == set(base.names) == {"model.layers.3.mlp.down_proj.weight"}


def test_a_step_of_adam_is_on_the_mean_loss_of_a_chunk_after_it_was_scored(base):
    ids = ids_of(hard.CHUNK + 1)
    reader, (name,) = readers.adam(base, 0.01), base.names
    assert torch.allclose(reader.read(ids), knowledge.loss(base.model, ids), atol=1e-4)
    other = base.copy()
    weight = other.get_parameter(name).requires_grad_(True)
    scores = other(input_ids=ids[:, :-1]).logits[0].log_softmax(-1)
    (-scores[torch.arange(hard.CHUNK), ids[0, 1:]].mean()).backward()
    # The first step of Adam has the size of the rate, and the sign of the gradient.
    expected = weight.detach() - 0.01 * weight.grad / (weight.grad.abs() + 1e-8)
    assert torch.allclose(reader.model.get_parameter(name), expected, atol=1e-4)


def test_reading_in_chunks_scores_as_one_forward_pass(base):
    ids = ids_of(150)
    for reader in (readers.adam(base, 0.0), readers.lora(base, 4, 8, 0.0, 0)):
        assert torch.allclose(reader.read(ids), knowledge.loss(base.model, ids), atol=1e-4)


@pytest.mark.parametrize("name", ["frozen", DEFAULT, "SGD 0.00625", "hard projection 0.035", "Adam 0.0001", "LoRA"])
def test_a_run_leaves_the_model_alone_and_can_be_repeated(base, name):
    before = {k: v.clone() for k, v in base.model.state_dict().items()}
    ids = ids_of(257)
    first, again = (run(base, METHODS[name], ids, 0, METHODS[name].options) for _ in range(2))
    for record in (first, again):
        assert record.pop("time_ratio") > 0
        del record["seconds"]
    assert first == again
    assert all(torch.equal(v, before[k]) for k, v in base.model.state_dict().items())
    assert first["nll"] == pytest.approx(np.mean(first["blocks"]), abs=1e-5)
    assert first["blocks"][:4] == pytest.approx(measures.blocks(knowledge.loss(base.model, ids))[:4], abs=1e-4)
    frozen = run(base, METHODS["frozen"], ids, 0, {})
    assert max(frozen["kl"]) < 1e-5
    assert (first["blocks"] == frozen["blocks"]) == (name == "frozen")
    assert json.loads(json.dumps(first)) == first


def test_every_method_names_all_that_it_depends_on():
    assert json.loads(json.dumps(METHODS[DEFAULT].options)) == METHODS[DEFAULT].options
    assert METHODS[DEFAULT].options["config"]["layers"] == "last:0.25"
    suite = StreamsSuite()
    assert tuning.options_of(suite, tuning.Path("none")) == {
        texts.TUNING: {name: dict(method.options) for name, method in METHODS.items()}
    }


# -- texts ----------------------------------------------------------------------------------------------------------


def test_texts_of_missing_packages_are_refused_by_name(tmp_path, monkeypatch, fresh_texts):
    monkeypatch.delenv(texts.SAVED, raising=False)
    monkeypatch.setattr(texts, "_LISTS", tmp_path)
    for name, source in texts.SOURCES.items():
        if source.package:
            with pytest.raises(FileNotFoundError, match=f"'{name}' .*apt install {source.package}$"):
                texts.read(name)
    monkeypatch.setitem(SUITES, "streams", lambda: StreamsSuite(256, lambda device: pytest.fail("something was run")))
    for scenario in ("known,german", "two languages in turns"):
        args = ["--suite", "streams", "--seeds", "1", "--results", str(tmp_path), "--scenarios", scenario]
        done = CliRunner().invoke(app, args, env={"COLUMNS": "400"})
        assert done.exit_code == 2
        assert "apt install manpages-de" in done.output
    with pytest.raises(ValueError, match=r"text must be one of .*, got 'latin'"):
        texts.read("latin")


def test_manual_pages_are_those_of_the_package_without_markup(tmp_path, monkeypatch):
    import gzip

    pages = {"a": "x" * texts.SHORTEST, "b": "short", "c": '.\\" hidden\n.B \\fBbold\\fR \\-x\n' + "y" * texts.SHORTEST}
    folder = tmp_path / "man1"
    folder.mkdir()
    for name, page in pages.items():
        (folder / f"{name}.1.gz").write_bytes(gzip.compress(page.encode()))
    (folder / "other.1.gz").write_bytes(gzip.compress(b"z" * texts.SHORTEST))  # of another package
    (tmp_path / "pages.list").write_text("\n".join(str(folder / f"{name}.1.gz") for name in "cba"))
    monkeypatch.setattr(texts, "_LISTS", tmp_path)
    assert texts._manual("pages") == "x" * texts.SHORTEST + "\n\nbold -x\n" + "y" * texts.SHORTEST
    (folder / "b.1.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"b.1.gz of pages is missing: apt install --reinstall pages"):
        texts._manual("pages")


def test_the_general_text_is_in_no_stream(base):
    general = texts.english()[: base.general.numel()]
    assert torch.equal(encode(general)[: base.general.numel()], base.general.flatten())
    assert base.general.numel() < texts.KNOWN
    assert texts.english()[texts.KNOWN :].startswith(texts.read("known"))
    first, second = base.tokens("known", 256, 0), base.tokens("known", 256, 1)
    assert torch.equal(first[:, -1], second[:, 0])
    with pytest.raises(ValueError, match="'known' is too short for part 400 of 256 tokens"):
        base.tokens("known", 256, 400)


@pytest.mark.parametrize("name", hard.HARD)
def test_hard_texts_have_the_length_asked_and_the_same_tokens_again(base, name, monkeypatch):
    monkeypatch.setattr(texts, "read", lambda name: {"german": "a", "headers": "b"}[name] * 10_000)
    ids = base.tokens(name, 320, 0)
    assert ids.shape == (1, 321)
    assert torch.equal(ids, base.tokens(name, 320, 0))
    if name == "two languages in turns":
        a, b = (int(encode(x)) for x in "ab")
        assert ids[0, :320].view(5, 64).unique(dim=1).flatten().tolist() == [a, b, a, b, a]
    if name == "50 tokens repeated":
        assert torch.equal(ids[:, :-50], ids[:, 50:])
        assert len(ids.unique()) > 5
    if name in ("random tokens", "shuffled words"):
        assert not torch.equal(ids, base.tokens(name, 320, 1))


# -- the command and the tables -------------------------------------------------------------------------------------


def test_finished_runs_are_not_run_again(base, tmp_path, monkeypatch):
    monkeypatch.setitem(SUITES, "streams", lambda: StreamsSuite(512, lambda device: base))
    ran = []
    monkeypatch.setattr(
        StreamsSuite, "run", lambda self, s, m, *args, plain=StreamsSuite.run, **kw: ran.append((s, m))
        or plain(self, s, m, *args, **kw)
    )  # fmt: skip

    def call(*args):
        ran.clear()
        given = ["--suite", "streams", "--seeds", "1", "--tokens", "256", "--results", str(tmp_path), *args]
        done = CliRunner().invoke(app, given)
        assert done.exit_code == 0, done.output

    two = ("--scenarios", "known,one token", "--methods", "frozen,default,Adam 0.0002")
    call(*two)
    assert sorted(ran) == sorted(
        [("known", "frozen"), ("known", "default"), ("known", "Adam 0.0002"), ("one token", "frozen"),
         ("one token", "default")]
    )  # fmt: skip
    call(*two)
    assert ran == []
    journal = tmp_path / "benchmark_streams.jsonl"
    assert {json.loads(line)["protocol"]["tokens"] for line in journal.read_text().splitlines()} == {256}
    journal.write_text(journal.read_text()[:-20])
    call(*two)
    assert len(ran) == 1
    found = json.loads((tmp_path / "benchmark_streams.json").read_text())
    assert len(found["rows"]) == 5
    assert (tmp_path / "benchmark_streams_tradeoff.png").exists()
    call("--tokens", "512", "--scenarios", "known", "--methods", "frozen")
    assert ran == [("known", "frozen")]


def test_tokens_are_for_this_suite_and_a_multiple_of_the_chunks():
    for args, message in ((["streams", "--tokens", "300"], "multiple of 256, got 300"), (["digits", "--tokens", "256"],
                          "must not be given for the suite 'digits'")):  # fmt: skip
        done = CliRunner().invoke(app, ["--suite", *args], env={"COLUMNS": "400"})
        assert done.exit_code == 2
        assert message in done.output


def row(scenario, method, gain, kl):
    figures = {"nll": 3.0, "gain": gain, "gain_width": 0.01, "kl": kl, "kl_width": 0.001, "facts": 0.1, "time": 2.0}
    return {"scenario": scenario, "method": method} | {name: [value, None] for name, value in figures.items()}


def test_tables_show_the_best_rate_for_each_text_and_ratios_of_means():
    rows = [row(t, m, g, k) for t, figures in {
        "german": {"frozen": (0.0, 0.0), "default": (0.3, 0.01), "Adam 5e-05": (0.1, 0.02), "Adam 0.0001": (0.2, 0.04)},
        "python": {"frozen": (0.0, 0.0), "default": (0.1, 0.02), "Adam 5e-05": (0.3, 0.06), "Adam 0.0001": (0.2, 0.09)},
    }.items() for m, (g, k) in figures.items()]  # fmt: skip
    assert best(rows)["python", "Adam"]["method"] == "Adam 5e-05"
    lines = {line[0]: line[1:] for line in tables.by_text({"rows": rows})}
    assert lines["german"][1:4] == ("0.300 ± 0.010", "0.200 ± 0.010", "Adam 0.0001")
    assert lines["mean"] == ("", "0.200", "0.250", "", "0.0150", "0.0500")
    assert [line[1:] for line in tables.by_text({"rows": rows}) if line[0] == "default / Adam"] == [
        ("", "0.80", "", "", "0.30", "")
    ]
    known = [{**each, "scenario": "known"} if each["scenario"] == "python" else each for each in rows]
    last = tables.by_text({"rows": known})[-4:]
    assert [line[0] for line in last] == ["mean", "default / Adam", "mean without known", "default / Adam"]
    assert last[0][1:] == lines["mean"]
    german = lines["german"]
    assert last[2][2:4] == (german[1].split()[0], german[2].split()[0])
    assert last[2][5:] == (german[4].split()[0], german[5].split()[0])
    methods = {line[0]: line[1:] for line in tables.by_method({"rows": [*rows, row("german", "LoRA", 0.1, 0.1)]})}
    assert methods["Adam"] == ("0.250", "0.0500", "0.100", "2.00 x")
    assert set(methods) == {"method", "frozen", "**default**", "Adam"}  # LoRA has not read both texts
    every = [row("base64", name, 0.0, 0.1) for name in ("frozen", *tables.HARD_SHOWN)]
    assert [line[0] for line in tables.hard({"rows": every})] == ["text", "base64"]
