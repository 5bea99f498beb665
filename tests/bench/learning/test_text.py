"""The suite "text": every method on a tiny random model; figures and curves on runs made by hand."""

import copy
import json

import numpy as np
import pytest
import torch
from helpers import plain_config

import ttt
from bench.learning import tuning
from bench.learning.text import plots, run
from bench.learning.text.base_model import BaseModel, old_windows
from bench.learning.text.methods import METHODS, TextMethod, method
from bench.learning.text.readers import Learning, NearestNeighbours
from bench.learning.text.streams import Segment, Stream
from bench.learning.text.suite import TextSuite
from ttt.demo.model import COLUMNS, COMBINED
from ttt.demo.text import held_out_python


@pytest.fixture(scope="module")
def base_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    learns = plain_config(
        target_modules=["up_proj", "down_proj"], layers="last:1", replay_capacity=64, generated_rank=3
    )
    known = bytes(torch.randint(256, (3000,)).tolist())
    batches = list(torch.randint(256, (4, 70)).split(2))
    return BaseModel(LlamaForCausalLM(config).eval(), learns, known, batches, torch.randint(256, (3, 50)))


def options_of(name):
    options = {option: values[0] for option, values in METHODS[name].grid.items()}
    # The tiny model has fewer directions than the default and the columns use.
    return options | ({"orthogonal": 2} if {**METHODS[name].fixed, **options}.get("orthogonal", 0) > 8 else {})


def random_stream(domains="AB", length=1024):
    segments = [Segment(d, torch.randint(ord(d), ord(d) + 8, (1, length + 1))) for d in domains]
    return Stream(segments, torch.randint(256, (len(domains) * length // 512, 513)))


def reader_of(base_model, name, stream):
    return METHODS[name].make_reader(base_model, stream, options_of(name), 5)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_reads_and_does_not_change_the_base_model(base_model, name, monkeypatch):
    monkeypatch.setattr("bench.learning.text.methods.PERIOD", 512)
    before = copy.deepcopy(base_model.model.state_dict())
    stream = random_stream("ABA")
    held = {d: torch.randint(ord(d), ord(d) + 8, (2, 40)) for d in "AB"}
    out = run.read(base_model, METHODS[name], stream, held, 5, options_of(name))
    assert len(out["curve"]) == 6
    assert np.mean(out["curve"]) == pytest.approx(out["new"], abs=1e-3)
    assert [[v is None for v in row] for row in out["matrix"]] == [[False, True], [False, False], [False, False]]
    assert len(out["recovery"]) == 1
    assert 512 <= out["recovery"][0] <= 1024
    assert (out["time_ratio"] is None) == (name == "joint")
    again = run.read(base_model, METHODS[name], stream, held, 5, options_of(name))
    assert {**again, "time_ratio": 0} == {**out, "time_ratio": 0}
    for key, value in base_model.model.state_dict().items():
        assert torch.equal(value, before[key]), key
    still = {"frozen", "in-context only", "joint"}
    frozen = run.read(base_model, METHODS["frozen"], stream, held, 5, {})
    assert (out["old"] == frozen["old"]) == (name in still - {"joint"})
    assert (out["state_bytes"] == 0) == (name in still - {"joint"})
    columns = list(zip(*out["matrix"], strict=True))
    assert (len({v for v in columns[0] if v is not None}) == 1) == (name in still)


@pytest.mark.parametrize("name", METHODS)
def test_scores_do_not_depend_on_later_text(base_model, name, monkeypatch):
    monkeypatch.setattr("bench.learning.text.methods.PERIOD", 512)
    stream = random_stream("A")
    ids = stream.segments[0].ids
    other = ids.clone()
    other[:, 701:] = torch.randint(256, other[:, 701:].shape)
    scores = []
    for each in (ids, other):
        reader = reader_of(base_model, name, stream)
        scores.append(torch.cat([reader.read(each, 0, 512), reader.read(each, 512, 1024)], 1))
    assert scores[0].shape == (1, 1024)
    assert torch.equal(scores[0][:, :700], scores[1][:, :700])
    assert not torch.equal(scores[0][:, 700:], scores[1][:, 700:])


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"joint", "in-context only"}))
def test_the_first_chunk_is_scored_by_the_base_model(base_model, name):
    stream = random_stream("A")
    nll = reader_of(base_model, name, stream).read(stream.segments[0].ids, 0, 128)
    with torch.no_grad():
        logits = base_model.model(input_ids=stream.segments[0].ids[:, :64]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, stream.segments[0].ids[0, 1:65], reduction="none")
    torch.testing.assert_close(nll[0, :64], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["EWC", "MAS", "EWC + layer replay", "layer generative", "orthogonal + layer replay"])
def test_shared_calibration_equals_calibration(base_model, name):
    found, options = method(name), options_of(name)
    config = found.config(base_model.config, options, 0)
    alone = ttt.adapt_(copy.deepcopy(base_model.model), config)
    ttt.Learner(alone).calibrate(base_model.batches)
    shared = found.learner(base_model, options, 0).model
    assert found.learner(base_model, {**options, "lr": 0.5}, 3).model is not shared
    for (_, a), (_, b) in zip(ttt.learning_layers(alone), ttt.learning_layers(shared), strict=True):
        assert a.config == b.config
        for key, value in a.state().items():
            other = b.state()[key]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, key


def test_si_starts_from_its_own_importance_and_the_base_weights(base_model):
    si, ewc = (method(name).learner(base_model, options_of(name), 0) for name in ("SI", "EWC"))
    for (_, a), (_, b) in zip(ttt.learning_layers(si.model), ttt.learning_layers(ewc.model), strict=True):
        assert torch.equal(a.weight, b.weight)
        assert torch.equal(a.anchor, b.anchor)
        assert not torch.equal(a.importance, b.importance)
    total = sum(float(layer.importance.sum()) for _, layer in ttt.learning_layers(si.model))
    assert total / base_model.parameters == pytest.approx(1, abs=1e-4)


def test_nearest_neighbours_are_mixed_with_the_model(base_model):
    ids = torch.randint(256, (1, 41))
    reader = NearestNeighbours(base_model.model, 0.3, 2.0, neighbours=5, chunk=8)
    nll = reader.read(ids, 0, 40)[0]
    with torch.no_grad():
        hidden = base_model.model.base_model(input_ids=ids[:, :40]).last_hidden_state[0]
        p = base_model.model.get_output_embeddings()(hidden).softmax(-1).double()
    hidden, values = hidden.double().numpy(), ids[0, 1:].numpy()
    for t in range(40):
        mixed = float(p[t, values[t]])
        if stored := t // 8 * 8:  # what the chunks before this one added
            distance = ((hidden[t] - hidden[:stored]) ** 2).sum(1)
            near = np.argsort(distance)[:5]
            weight = np.exp(-distance[near] / 2)
            mixed = 0.7 * mixed + 0.3 * weight[values[near] == values[t]].sum() / weight.sum()
        assert float(nll[t]) == pytest.approx(-np.log(mixed), rel=1e-4)


def test_growing_columns_score_held_out_text_with_all_columns(base_model):
    stream = random_stream("AB")
    reader = reader_of(base_model, "growing columns", stream)
    for segment in stream.segments:
        for start in (0, 512):
            reader.read(segment.ids, start, start + 512)
        reader.growing.close()
    rows = torch.cat([segment.ids[:, :60] for segment in stream.segments] * 5)
    expected = float(reader.growing.score(rows).double().mean()) / np.log(2)
    assert reader.bits(rows) == pytest.approx(expected, rel=1e-5)
    assert reader.state_bytes() == Learning.state_bytes(reader) + reader.growing.bytes()
    assert reader.growing.bytes() > sum(column.bytes for column in reader.growing.columns)


def test_the_configuration_for_columns_is_the_tuned_one():
    chosen = tuning.load(tuning.tuned_path(TextSuite()))["tuning"]["growing columns"]
    assert METHODS["growing columns"].config(COMBINED, chosen, COMBINED.seed) == COLUMNS


def test_fine_tuning_changes_only_its_layers(base_model):
    stream = random_stream("A", 2048)
    for name, all_of_them in (("fine-tuning", False), ("fine-tuning (all)", True)):
        reader = reader_of(base_model, name, stream)
        for start in range(0, 2048, 512):
            reader.read(stream.segments[0].ids, start, start + 512)
        before = base_model.model.state_dict()
        changed = {key for key, value in reader.model.state_dict().items() if not torch.equal(value, before[key])}
        layers = {f"model.layers.1.mlp.{m}.weight" for m in ("up_proj", "down_proj")}
        assert changed == (set(before) if all_of_them else layers)


def test_the_time_ratio_is_the_median_over_blocks_of_turns(monkeypatch):
    clock = run.Clock()
    # Blocks of four turns, the first of each followed by a frozen one.
    spans = [(2, 1), (2,), (2,), (6,), (4, 2), (4,), (4,), (4,), (1, 0.1)]
    now, ticks = 0.0, []
    for span in (s for group in spans for s in group):
        ticks += [now, now := now + span]
    monkeypatch.setattr(run.time, "perf_counter", lambda: ticks.pop(0))
    for group in spans:
        with clock.turn():
            pass
        assert clock.due() == (len(group) == 2)
        if clock.due():
            with clock.frozen():
                pass
    assert clock.ratio() == 3.0  # of 12 / 4 / 1, 16 / 4 / 2 and 1 / 0.1


def test_tuning_is_scored_on_other_windows():
    data = held_out_python()
    reported, tuned = (old_windows(tuning=tuning) for tuning in (False, True))
    assert reported.shape == (32, 512)
    assert tuned.shape == (31, 512)
    starts, others = ([data.find(bytes(row.tolist())) for row in rows] for rows in (reported, tuned))
    assert min(starts + others) >= 0
    assert min(abs(a - b) for a in starts for b in others) >= 512


def test_rules_are_made_for_each_run_from_text_that_the_model_knows(base_model, monkeypatch):
    METHODS["layer replay"].learner(base_model, {"lr": 0.1}, 0)  # so that calibration is done
    monkeypatch.setattr(ttt, "Learner", lambda model, **given: given)
    given = []
    rules = [lambda *args: given.append(args) or "a", lambda *args: "b"]
    found = TextMethod("replay", {"alpha": (0.1,)}, {"replay_rows": 4}, rules=rules)
    made = found.learner(base_model, {"alpha": 0.1, "lr": 0.5}, 7)
    assert made == {"context": 512, "rules": ["a", "b"]}
    ((options, seed, known),) = given
    assert (options, seed) == ({"alpha": 0.1, "lr": 0.5}, 7)
    assert torch.equal(known, torch.cat(base_model.batches))
    config = found.config(base_model.config, options, 7)
    assert (config.lr, config.replay_rows, config.ewc_lambda, config.seed) == (0.5, 4, 0.0, 7)


# -- figures of runs made by hand -------------------------------------------------------------------------------------


def record(name, new, old, scenario="adapt-html", **more):
    base = {"scenario": scenario, "method": name, "seed": 0, "new": new, "old": old, "segments": ["html"],
            "matrix": [[]], "recovery": [], "time_ratio": 1.5, "state_bytes": 60, "parameters": 10, "options": {},
            "protocol": {"tuning": False}}  # fmt: skip
    return {**base, **more}


OTHERS = {"frozen": record("frozen", 3.0, 1.0), "naive": record("naive", 2.0, 1.5)}


def test_protocol_and_options_survive_json():
    suite = TextSuite()
    for value in (suite.protocol(), suite.facts(), *(options_of(name) for name in METHODS)):
        assert json.loads(json.dumps(value)) == value  # or finished runs would not be found again
    for name, found in METHODS.items():
        option, values = suite.sweep(name, "adapt-rst") or ("", ())
        assert not values or option in found.grid
        assert len(set(values)) == len(values)


def test_shares_are_relative_to_naive():
    suite = TextSuite()
    found = suite.measure(record("EWC", 2.1, 1.1), OTHERS)
    assert found["gain"] == pytest.approx(0.9)
    assert found["gain_share"] == pytest.approx(0.9)
    assert found["forgetting_share"] == pytest.approx(0.2)
    assert found["state"] == 6.0
    assert found["forgetting"] is found["bwt"] is found["recovery"] is None
    assert suite.score(record("EWC", 2.1, 1.1), OTHERS) == pytest.approx(0.7)
    assert suite.score(record("naive", 2.0, 1.5), {}) == -2.0  # the gain on new text alone
    assert suite.score(record("EWC", 2.5, 1.1), OTHERS) == pytest.approx(0.5 - 0.2)
    assert suite.measure(record("EWC", 2.1, 1.1), {})["gain_share"] is None
    others = {**OTHERS, "naive, best": record("naive", 1.8, 1.4)}
    assert suite.score(record("EWC", 2.1, 1.1), others) == pytest.approx(0.7)
    assert suite.score(record("growing columns", 2.1, 1.1), others) == pytest.approx(0.75 - 0.25)
    assert suite.combine("EWC", [0.5, 0.7]) == pytest.approx(0.6)
    assert suite.combine("growing columns", [0.7, 0.5, 0.9]) == 0.5
    lucky = {**OTHERS, "naive": record("naive", 2.0, 0.9)}
    assert suite.measure(record("EWC", 2.1, 1.1), lucky)["forgetting_share"] is None
    with pytest.raises(ValueError, match="naive gained or forgot nothing"):
        suite.score(record("EWC", 2.1, 1.1), lucky)


def test_figures_of_the_recurring_stream():
    matrix = [[2.0, None], [2.4, 1.0], [1.8, 1.1], [2.1, 0.9], [1.9, 1.3]]
    visits = ["html", "rst", "html", "rst", "html"]
    one = record("EWC", 2.1, 1.1, "recurring", matrix=matrix, segments=visits, recovery=[512, 600, 1000])
    found = TextSuite().measure(one, OTHERS)
    assert found["forgetting"] == pytest.approx(1.3 - 0.9)  # html is the last segment's
    assert found["bwt"] == pytest.approx(0.9 - 1.3)
    assert found["recovery"] == pytest.approx(704)


def test_points_of_a_trade_off_curve_are_means_over_scenarios():
    runs = []
    for where in ("adapt-english", "adapt-rst"):
        runs += [record("frozen", 3.0, 1.0, where), record("naive", 2.0, 1.5, where, options={"lr": 0.02})]
        shift = 0.1 if where == "adapt-rst" else 0.0
        runs.append(record("EWC", 2.1 + shift, 1.1, where, options={"lr": 0.02, "ewc_lambda": 0.01}))
        for value, new in ((0.001, 2.0), (0.1, 2.5)):
            more = {"options": {"lr": 0.02, "ewc_lambda": value}, "protocol": {"tuning": False, "sweep": True}}
            runs.append(record("EWC", new, 1.2, where, **more))
    runs.append({**runs[-1], "scenario": "adapt-english", "options": {"lr": 0.02, "ewc_lambda": 9.0}})  # unfinished
    points = plots.tradeoff(TextSuite(), runs, "EWC")
    assert [(p[0], p[3]) for p in points] == [(0.001, False), (0.01, True), (0.1, False)]
    assert [p[1] for p in points] == pytest.approx([0.4, 0.2, 0.4])
    assert [p[2] for p in points] == pytest.approx([1.0, 0.85, 0.5])
    assert plots.tradeoff(TextSuite(), runs, "joint") == []
