"""The demo, on a tiny random model: its methods, its summary, its report, and weights loaded in a new process."""

import copy
import json
import math

import pytest
import torch

import ttt
from ttt.demo import model as demo_model
from ttt.demo import recall, run
from ttt.demo.model import COLUMNS, CONFIG, bits_per_byte, methods, new_learner, score, score_in_context


@pytest.fixture(scope="module")
def tiny():
    """A byte-level model of two blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def batches():
    return list(torch.randint(256, (6, 64)).split(3))


def test_each_method_has_one_protection_and_one_has_all_of_the_commit():
    found = methods(CONFIG)
    names = ("ewc_lambda", "replay_rows", "orthogonal", "kronecker")
    used = {name: {n for n in names if getattr(config, n)} for name, config in found.items() if config is not None}
    assert used.pop("SGD") == set()
    assert used.pop("combined") == {"ewc_lambda", "replay_rows", "orthogonal"}
    assert used.pop("default") == {"kronecker"}
    assert found["default"] is CONFIG
    assert used.pop("columns") == {n for n in names if getattr(COLUMNS, n)}
    assert used == {"EWC": {"ewc_lambda"}, "replay": {"replay_rows"}, "orthogonal": {"orthogonal"}}
    assert found["frozen"] is found["in-context only"] is None


def test_a_new_learner_is_calibrated_and_leaves_the_base_model_alone(tiny, batches):
    before = copy.deepcopy(tiny.state_dict())
    learner = new_learner(tiny, CONFIG, batches)
    assert all(bool(layer.basis.any()) and bool(layer.output_basis.any()) for layer in learner.layers)
    learner.observe(torch.randint(256, (1, 200)))
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
    plain = new_learner(tiny, methods(CONFIG)["SGD"], batches)
    assert len(plain.layers) == len(learner.layers)


def test_scores_are_cross_entropies(tiny):
    ids = torch.randint(256, (1, 701))
    with torch.no_grad():
        logits = tiny(input_ids=ids[:, :200]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:201], reduction="none")
    torch.testing.assert_close(score(tiny, ids[:, :201])[0], expected, rtol=1e-4, atol=1e-4)
    assert bits_per_byte(tiny, ids[:, :201]) == pytest.approx(float(expected.double().mean()) / math.log(2), rel=1e-5)
    long = score_in_context(tiny, ids, 512, 700)
    assert long.shape == (1, 188)
    with torch.no_grad():  # byte 700 is scored with the 511 bytes before the last window's end
        logits = tiny(input_ids=ids[:, 188:700]).logits[0, -188:]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 513:], reduction="none")
    torch.testing.assert_close(long[0], expected, rtol=1e-4, atol=1e-4)


def test_gain_and_forgetting_are_shares_of_unprotected_sgd():
    def result(name, new, old, seconds):
        return run.Result(name, new, old, seconds, tokens=100)

    given = [result("frozen", 3.0, 1.0, 1.0), result("SGD", 2.0, 1.5, 2.0), result("EWC", 2.2, 1.1, 3.0)]
    rows = {row["method"]: row for row in run.summary({r.method: r for r in given})}
    assert rows["EWC"]["gain_share"] == pytest.approx(0.8)
    assert rows["EWC"]["forgetting_share"] == pytest.approx(0.2)
    assert rows["EWC"]["time_ratio"] == pytest.approx(3.0)
    assert rows["SGD"]["gain_share"] == rows["SGD"]["forgetting_share"] == 1.0
    assert rows["frozen"]["gain_share"] is rows["frozen"]["forgetting_share"] is None


def test_recall_scores_with_and_without_the_saved_weights(tiny, batches, tmp_path, monkeypatch, capsys):
    learner = new_learner(tiny, CONFIG, batches)
    learner.observe(torch.randint(40, (1, 600)))
    learner.flush()
    ids = torch.randint(40, (3, 100))
    ttt.save(learner.model, tmp_path / "weights.safetensors")
    (tmp_path / "rows.json").write_text(json.dumps(ids.tolist()))
    monkeypatch.setattr(recall, "load_model", lambda: (copy.deepcopy(tiny), CONFIG))
    recall.main(str(tmp_path / "weights.safetensors"), str(tmp_path / "rows.json"))
    found = json.loads(capsys.readouterr().out)
    assert found["frozen"] == pytest.approx(bits_per_byte(tiny, ids), rel=1e-5)
    assert found["loaded"] == pytest.approx(bits_per_byte(learner.model, ids), rel=1e-5)
    assert found["loaded"] < found["frozen"]
    assert found["bytes"] == 300


def test_the_demo_writes_its_report(tiny, batches, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "load_model", lambda: (tiny, CONFIG))
    monkeypatch.setattr(run, "calibration_batches", lambda: batches)
    monkeypatch.setattr(run.texts, "held_out_python", lambda: bytes(torch.randint(256, (4000,)).tolist()))
    later = {"frozen": 2.0, "loaded": 1.0, "bytes": 512, "file_bytes": 10}
    monkeypatch.setattr(run, "recall", lambda reader, unread, folder: later)
    text = tmp_path / "text & more.txt"
    text.write_bytes(b"one line again and again\n" * 200)
    run.main(text, tmp_path / "report", 2048)
    page = (tmp_path / "report" / "index.html").read_text()
    assert "<h2>text &amp; more.txt</h2>" in page
    assert (tmp_path / "report" / "domain0.png").read_bytes()[:4] == b"\x89PNG"
    found = json.loads((tmp_path / "report" / "results.json").read_text())["domains"]["text & more.txt"]
    assert [row["method"] for row in found["rows"]] == list(methods(CONFIG))
    assert found["bytes"] == 2048
    learning = [row for row in found["rows"] if row["method"] not in ("frozen", "in-context only")]
    assert all(row["gain_share"] > 0.5 for row in learning)  # one line that repeats is easy to learn
    assert "512 unread bytes" in " ".join(capsys.readouterr().out.split())
    text.write_bytes(b"short")
    with pytest.raises(SystemExit, match="must hold at least 2048 bytes, got 5"):
        run.main(text, tmp_path / "report", 2048)


def test_without_a_clone_the_demo_model_is_missing_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model, "WEIGHTS", tmp_path / "byte_model")
    with pytest.raises(FileNotFoundError, match=r"the byte-level model is missing: .*byte_model"):
        demo_model.load_model()
