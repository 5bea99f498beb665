"""The option --device: it reaches the model and all tokens, is refused by name, and keeps results of devices apart."""

import copy
import json
import re
import types

import pytest
import torch
from tiny_models import VOCAB, tiny
from typer.testing import CliRunner

from bench import machine
from bench.learning import command, page, runs
from bench.learning.__main__ import app
from bench.learning.clock import Clock, seconds
from bench.learning.facts import contenders, tables
from bench.learning.facts.suite import FactsSuite
from bench.learning.language import base as language_base
from bench.learning.language import tables as language_tables
from bench.learning.language import texts
from bench.learning.language.base import Base
from bench.learning.language.suite import StreamsSuite
from bench.learning.suite import protocol_of, stem_of
from bench.learning.suites import SUITES
from ttt.demo.lora import fine_tune
from ttt.demo.questions import log_probabilities, padded

META = torch.device("meta")


def encode(text):
    return torch.tensor([byte % (VOCAB - 1) + 1 for byte in text.encode()])


class Model(torch.nn.Module):
    """A model on a device without data, which keeps the devices of the tokens that it gets."""

    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(vocab_size=VOCAB)
        self.weight = torch.nn.Parameter(torch.ones(VOCAB, VOCAB, device=META))
        self.seen = []

    def forward(self, input_ids, **kwargs):
        self.seen.append(input_ids.device)
        return types.SimpleNamespace(logits=self.weight[input_ids])


@pytest.fixture
def on_meta(monkeypatch):
    monkeypatch.setattr(language_base, "adapted_weights", lambda model, config: ["weight"])
    return Base(Model(), encode, lambda: torch.ones(2, 8, dtype=torch.int64, device=META), [("ab", "c")])


# -- tokens and models -----------------------------------------------------------------------------------------------


def test_all_tokens_are_on_the_device_of_the_model(on_meta):
    assert on_meta.device == META
    assert on_meta.encode("ab").device == META
    assert on_meta.general.device == META
    assert {ids.device for ids, _ in on_meta.facts} == {META}
    for name in ("known", "random tokens", "one token", "base64", "50 tokens repeated"):
        ids = on_meta.tokens(name, 64, 0)
        assert (ids.device, ids.shape) == (META, (1, 65))


def test_the_model_is_loaded_to_the_device(monkeypatch):
    class Tokenizer:
        def __call__(self, text, **kwargs):
            return types.SimpleNamespace(input_ids=encode(text)[None])

    language_base.smollm.cache_clear()
    monkeypatch.setattr(language_base, "adapted_weights", lambda model, config: [])
    monkeypatch.setattr(language_base, "load_language_model", lambda: (copy.deepcopy(tiny("llama")), Tokenizer()))
    try:
        found = language_base.smollm("meta")
        assert {p.device for p in found.model.parameters()} == {META}
        assert found.general.device == META
        assert language_base.smollm("meta") is found
        assert language_base.smollm("cpu").device == torch.device("cpu")
    finally:
        language_base.smollm.cache_clear()


@pytest.mark.parametrize("make", [FactsSuite, StreamsSuite])
def test_a_suite_asks_for_a_base_on_its_device(make):
    class Asked(Exception):
        pass

    def base(device):
        raise Asked(device)

    suite = make(base=base, device="cuda")
    with pytest.raises(Asked, match="cuda"):
        suite.run(suite.scenarios[0], "frozen", 0, {}, tuning=False)


def test_questions_and_lessons_are_on_the_device_of_the_model(on_meta, monkeypatch):
    assert padded([[1, 2], [3]], META).device == META
    assert padded([[True], [True, False]]).tolist() == [[1, 0], [1, 0]]
    monkeypatch.setattr("ttt.demo.questions.cached", lambda model, cache: {})
    with pytest.raises(Exception):  # noqa: B017, PT011  whatever follows needs numbers
        log_probabilities(on_meta.model, [1, 2], [[3], [4, 5]])
    fine_tune(on_meta.model.requires_grad_(True), [([1, 2, 3], [False, True, True]), ([4], [True])], 1e-3, 2)
    assert on_meta.model.seen == [META] * 3

    given = []
    learner = types.SimpleNamespace(observe=lambda ids, learn_mask, **kwargs: given.extend((ids, learn_mask)))
    online = contenders.Online.__new__(contenders.Online)
    online.base, online.options, online.user, online.learner = on_meta, {}, None, learner
    online.template = types.SimpleNamespace(turn=lambda sentence: ([1, 2], [False, True]))
    online.tell(["a", "b"])
    assert [t.device for t in given] == [META] * 4
    assert [t.dtype for t in given] == [torch.int64, torch.bool] * 2


def test_a_gpu_is_waited_for_before_the_clock_is_read(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    seconds("cpu")
    with Clock(1).turn():
        pass
    assert waited == []
    assert seconds("cuda") <= seconds("cuda")
    with Clock(1, "cuda").turn():
        pass
    assert len(waited) == 4


# -- what is refused -------------------------------------------------------------------------------------------------


def test_devices_that_are_not_there_are_refused_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for args, message in (
        (["facts", "--device", "cuda"], "device must be 'cpu' where torch.cuda.is_available() is False, got 'cuda'"),
        (["streams", "--device", "tpu"], "device must be one of ['cpu', 'cuda'], got 'tpu'"),
        (["digits", "--device", "cuda"], "device must be 'cpu' for the suite 'digits', got 'cuda'"),
    ):
        done = CliRunner().invoke(app, ["--suite", *args, "--results", str(tmp_path)], env={"COLUMNS": "400"})
        assert done.exit_code == 2
        assert message in " ".join(done.output.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


# -- results ---------------------------------------------------------------------------------------------------------


GPU = {"gpu": "a GPU", "cuda": "13", "triton": "3", "processor": "its host", "torch": "2"}


class Toy(FactsSuite):
    """The suite "facts" whose runs cost nothing, and tell on which device they were made."""

    scenarios = ("ten facts",)
    methods = ("frozen", "its fact in context")

    def run(self, scenario, method, seed, options, *, tuning):
        rank = 2 if self.device == "cpu" else 1
        return {"ranks": [rank, 1], "nll": 1.0, "general": 1.0, "kl": 0.0, "texts": [1.0], "neighbour": 0.0,
                "told_seconds": 7.0, "asked_seconds": 9.0}  # fmt: skip

    def plot(self, records, rows, title, prefix):
        return []


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.setitem(SUITES, "facts", Toy)
    monkeypatch.setattr(command, "check_device", lambda device: None)
    plain = machine.machine
    for module in (runs, command):
        monkeypatch.setattr(module, "machine", lambda device="cpu": plain() if device == "cpu" else dict(GPU))

    def call(*args, results=tmp_path):
        done = CliRunner().invoke(app, ["--suite", "facts", "--results", str(results), *args], env={"COLUMNS": "400"})
        assert done.exit_code == 0, done.output
        return done.output

    return call


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_results_of_two_devices_do_not_overwrite_each_other(call, tmp_path):
    call("--seeds", "2")
    before = {p.name: p.read_text() for p in tmp_path.iterdir()}
    call("--seeds", "3", "--device", "cuda")
    assert {p.name: p.read_text() for p in tmp_path.iterdir() if "cuda" not in p.name} == before
    records = read(tmp_path / "benchmark_facts_cuda.jsonl")
    assert len(records) == 6
    assert all(r["protocol"]["device"] == "cuda" and r["machine"] == GPU and r["jobs"] == 1 for r in records)
    assert not any("device" in r["protocol"] for r in read(tmp_path / "benchmark_facts.jsonl"))
    cpu, gpu = (json.loads((tmp_path / f"benchmark_facts{end}.json").read_text()) for end in ("", "_cuda"))
    assert "gpu" not in cpu["machine"]
    assert gpu["machine"] == GPU | {"processes": 1}
    assert [row["right"][0] for row in cpu["rows"]] == [0.5, 0.5]
    assert [row["right"][0] for row in gpu["rows"]] == [1.0, 1.0]
    # Runs of the one device are not taken for those of the other, even in the same file.
    keys = [{runs.key_of(r) for r in read(tmp_path / f"benchmark_facts{end}.jsonl")} for end in ("", "_cuda")]
    assert not keys[0] & keys[1]
    assert protocol_of(Toy(), tuning=False) != protocol_of(Toy(device="cuda"), tuning=False)
    assert stem_of(Toy(device="cuda")) == "benchmark_facts_cuda"
    # The page has a part of each.
    page.write(tmp_path, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert "<h2>facts</h2>" in html
    assert "<h2>facts on cuda</h2>" in html


def test_pictures_stand_with_the_results_of_their_device(tmp_path):
    for name in ("benchmark_facts_right.png", "benchmark_facts_cuda_right.png"):
        (tmp_path / name).write_bytes(b"")
    assert [p.name for p in page._pictures(Toy(), tmp_path)] == ["benchmark_facts_right.png"]
    assert [p.name for p in page._pictures(Toy(device="cuda"), tmp_path)] == ["benchmark_facts_cuda_right.png"]


def test_runs_that_were_made_elsewhere_are_added_without_the_device(call, tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    call("--seeds", "1", "--device", "cuda", results=here)
    call("--seeds", "2", "--device", "cuda", results=there)
    (there / "benchmark_facts_cuda.json").unlink()  # as after a run that was stopped
    monkeypatch.setattr(command, "check_device", machine.check_device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Toy, "run", lambda *args, **kwargs: pytest.fail("something was run"))
    out = call("--device", "cuda", "--merge", str(there), results=here)
    assert "2 of 4 runs are new" in out
    found = json.loads((here / "benchmark_facts_cuda.json").read_text())
    assert [row["seeds"] for row in found["rows"]] == [2, 2]
    assert found["machine"] == GPU | {"processes": 1}
    assert "0 of 4 runs are new" in call("--device", "cuda", "--merge", str(there), results=here)
    done = CliRunner().invoke(app, ["--suite", "facts", "--merge", str(there)], env={"COLUMNS": "400"})
    assert done.exit_code == 2
    assert "benchmark_facts.jsonl holds no finished runs" in done.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["protocol"].update(known=7), "has runs of another protocol than facts has now: .*'known': 7"),
        (lambda r: r["machine"].update(gpu="A100"), "has runs of A100.*, but the runs in .* are of"),
    ],
)
def test_runs_of_another_protocol_or_gpu_are_not_added(call, tmp_path, change, message):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, seeds in ((here, "1"), (there, "2")):
        call("--seeds", seeds, "--device", "cuda", results=folder)
    journal = there / "benchmark_facts_cuda.jsonl"
    records = read(journal)
    change(records[-1])
    journal.write_text("".join(json.dumps(record) + "\n" for record in records))
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    options = ["--suite", "facts", "--device", "cuda", "--results", str(here), "--merge", str(there)]
    done = CliRunner().invoke(app, options, env={"COLUMNS": "2000"})
    assert done.exit_code == 2
    assert re.search(message, done.output)
    assert {path.name: path.read_bytes() for path in here.iterdir()} == before


def test_times_of_runs_that_shared_a_gpu_are_in_no_table():
    record = {"ranks": [1], "nll": 1.0, "general": 1.0, "kl": 0.0, "texts": [1.0], "neighbour": 0.0,
              "told_seconds": 7.0, "asked_seconds": 9.0, "jobs": 8}  # fmt: skip
    suite = FactsSuite(device="cuda")
    shared, alone, cpu = (
        suite.measure({**record, "jobs": jobs, "protocol": protocol}, {})
        for jobs, protocol in ((8, {"device": "cuda"}), (1, {"device": "cuda"}), (8, {}))
    )
    assert (shared["told"], shared["asked"]) == (None, None)
    assert (alone["told"], alone["asked"]) == (cpu["told"], cpu["asked"]) == (7.0, 9.0)
    row = {"scenario": "ten facts", "method": "frozen", "seeds": 2, "told": None, "asked": None}
    row |= {name: [0.5, None] for name in ("right", "rank", "kl", "general", "texts", "neighbour")}
    few = {**row, "method": "study", "seeds": 1}
    found = {"machine": GPU | {"processes": 8}, "date": "2026-12-01", "rows": [row, few]}
    assert tables.costs(found)[0][-1] == "ascribed to a neighbour"
    assert tables.about(found)[1][1:4] == ("a GPU", "its host", "8")
    assert "--device cuda" in tables.about(found)[1][0]
    assert tables.by_scenario(found)[1:] == [("frozen", "0.50"), ("study", "0.50 (1)")]
    stream = {"scenario": "known", "method": "frozen", "gain": [0.0, None], "kl": [0.0, None], "facts": [0.0, None]}
    assert language_tables.by_method({"rows": [{**stream, "time": None}]}) == [
        ("method", "gain", "KL", "facts"), ("frozen", "0.000", "0.0000", "0.000"),
    ]  # fmt: skip


# -- texts -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_texts():
    for cached in (texts.read, texts.english):
        cached.cache_clear()
    yield
    for cached in (texts.read, texts.english):
        cached.cache_clear()


def test_texts_that_were_saved_are_read_instead_of_packages(tmp_path, monkeypatch, fresh_texts):
    monkeypatch.delenv(texts.SAVED, raising=False)
    made = {name: texts.Source(name, lambda name=name: f"{name} é\r\n" * 9) for name in texts.SOURCES}
    monkeypatch.setattr(texts, "SOURCES", {**made, "known": texts.SOURCES["known"]})
    texts.save(tmp_path)
    english = texts.english()
    missing = {name: texts.Source(name, lambda: pytest.fail("a package was read")) for name in made}
    monkeypatch.setattr(texts, "SOURCES", {**missing, "known": texts.SOURCES["known"]})
    monkeypatch.setattr(texts, "_english", lambda: pytest.fail("a package was read"))
    monkeypatch.setenv(texts.SAVED, str(tmp_path))
    for cached in (texts.read, texts.english):
        cached.cache_clear()
    assert texts.read("german") == "german é\r\n" * 9
    assert texts.english() == english
    assert texts.read("known") == english[texts.KNOWN : texts.SHUFFLED]
    (tmp_path / "prose.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"'prose'.*prose\.txt is missing, and TTT_BENCH_TEXTS is"):
        texts.read("prose")
