"""The experiments `transfer` and `drift`: settings, shares and ranking, models of other shapes, and streams."""

import json
from pathlib import Path

import pytest
import torch

import ttt
from bench.learning.experiments import drift, transfer
from bench.learning.experiments.pretrain import new_model

RESULTS = Path(__file__).parents[3] / "bench" / "learning" / "results"


def row(model, rate, lr, new, protected=False, text="headers", old=1.5):
    setting = {"rate": rate, "lr": lr, "clip": None, "burst": None, "protected": protected}
    return {"model": model, "text": text, **setting, "new_bpb": new, "old_bpb": old}


def test_shares_are_relative_to_the_best_gain_of_each_model():
    rows = [row("a", None, 0.0, 3.0), row("a", "rms", 0.1, 2.0), row("a", "rms", 0.2, 2.5),
            row("b", None, 0.0, 2.0), row("b", "rms", 0.1, 1.9), row("b", "rms", 0.2, 1.6),
            row("a", "rms", 0.1, 2.2, protected=True, old=1.75)]  # fmt: skip
    transfer.shares(rows)
    assert [r["share"] for r in rows] == [None, 1.0, 0.5, None, 0.25, 1.0, 1.0]
    assert rows[2]["gain"] == 0.5
    assert [r["lost"] for r in rows] == [0.0] * 6 + [0.25]


def test_the_summary_has_only_settings_tried_on_all_models_best_first():
    rows = []
    for model, best in zip(transfer.MODELS, (0.1, 0.2, 0.1), strict=True):
        rows += [row(model, None, 0.0, 3.0)]
        rows += [
            row(model, "rms", lr, 2.0 if lr == best else 2.0 + 10 * abs(lr - best), old=1.5 + best)
            for lr in (0.1, 0.15, 0.2)
        ]
    rows.append(row("128x4", "constant", 0.02, 2.0))  # on one model only
    transfer.shares(rows)
    found = transfer.summary(rows)
    assert [line["lr"] for line in found] == [0.15, 0.1, 0.2]
    assert found[0]["worst"] == pytest.approx(0.5)
    assert set(found[0]["shares"]) == set(transfer.MODELS)
    assert found[0]["lost"] == pytest.approx(0.4 / 3, abs=1e-4)


def test_the_ranking_is_by_the_worst_case_on_tuning_texts_with_protection():
    def line(lr, protected, text, *shares, lost=0.2):
        shares = dict(zip(transfer.MODELS, shares, strict=True))
        setting = {"rate": "rms", "clip": 3.0, "burst": None, "lr": lr}
        return {
            "text": text,
            "protected": protected,
            **setting,
            "shares": shares,
            "worst": min(shares.values()),
            "lost": lost,
        }

    lines = [
        line(lr, True, text, 1.0, share, 1.0) for lr, share in ((0.1, 0.5), (0.2, 0.7)) for text in transfer.TUNING
    ]
    lines += [line(0.3, True, text, 1.0, 1.0, 1.0) for text in transfer.TUNING[:2]]  # not tried on all of them
    lines += [line(0.1, True, "rst/2", 1.0, 1.0, 0.9), line(0.2, True, "rst/2", 0.1, 0.2, 0.3)]
    lines += [line(0.2, False, "headers", 0.4, 0.6, 0.5)]
    found = transfer.ranking(lines)
    assert [(one["lr"], one["worst"]) for one in found] == [(0.2, 0.7), (0.1, 0.5)]
    assert found[0]["tuning"] == dict.fromkeys(transfer.TUNING, 0.7)
    assert [one["report"] for one in found] == [{"rst/2": 0.1}, {"rst/2": 0.9}]
    assert [one["lost"] for one in found] == [0.2, 0.2]
    assert [one["unprotected"] for one in found] == [{"headers": 0.4}, {}]


def test_the_rate_that_the_docs_name_is_the_best_of_the_ranking():
    found = json.loads((RESULTS / "demo_transfer.json").read_text())["ranking"][0]
    named = {name: found[name] for name in ("rate", "lr", "clip", "burst")}
    assert named == {"rate": "rms", "lr": 0.07, "clip": 3.0, "burst": 1.2}
    text = (RESULTS.parents[2] / "docs" / "choices.md").read_text()
    assert '`rate="rms", lr=0.07, clip=3, burst=1.2`' in text


def test_edges_are_best_rates_at_the_end_of_their_grid():
    rows = [
        row("a", None, 0.0, 3.0),
        *(row("a", "rms", lr, new) for lr, new in ((0.1, 2.0), (0.2, 1.0), (0.4, 2.0))),
        row("b", None, 0.0, 3.0),
        *(row("b", "rms", lr, new) for lr, new in ((0.1, 2.0), (0.2, 1.5), (0.4, 1.2))),
    ]
    transfer.shares(rows)
    assert [(r["model"], r["lr"]) for r in transfer.edges(rows)] == [("b", 0.4)]


def test_the_grid_has_each_setting_once():
    grid = transfer.grid()
    assert len({tuple(setting.values()) for setting in grid}) == len(grid)
    assert {setting["rate"] for setting in grid} == {kind["rate"] for kind, _, _ in transfer.GRID.values()}
    for setting in grid:
        ttt.TTTConfig().with_flat(**{name: value for name, value in setting.items() if name != "protected"})


@pytest.mark.parametrize(("hidden", "layers"), [(64, 1), (192, 2)])
def test_new_models_have_the_given_shape(hidden, layers):
    model = new_model(hidden, layers)
    assert model.config.num_attention_heads * 64 == hidden
    assert len(model.model.layers) == layers
    assert model.model.layers[0].mlp.up_proj.weight.shape == (3 * hidden, hidden)
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 256)


def test_impossible_shapes_are_refused():
    for hidden in (0, 63, 100):
        with pytest.raises(ValueError, match=f"hidden must be a multiple of 64, got {hidden}"):
            new_model(hidden)
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        new_model(64, 0)


def test_reported_texts_are_not_tuning_texts():
    assert not set(transfer.TUNING) & set(transfer.REPORTED)
    assert set(transfer.UNPROTECTED) < set(transfer.TUNING)
    for domain in ("yaml", "headers"):
        first, again, other = (transfer.stream(domain + seed, 512) for seed in ("", "/0", "/2"))
        assert first.shape == (1, 513)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_the_streams_of_drift_share_no_text():
    plans = drift.PLANS
    for plan in plans.values():
        assert sum(pieces for _, pieces in plan.parts) == 100
    texts = [{domain for domain, _ in plan.parts} - set(drift.UNNATURAL) for plan in plans.values()]
    assert not set.intersection(*texts)
    assert len({plan.line for plan in plans.values()}) == len({plan.seed for plan in plans.values()}) == len(plans)
    for name, plan in plans.items():
        parts = drift.stream(name, 0.2)
        assert [domain for domain, _ in parts] == [domain for domain, _ in plan.parts]
        assert all(len(data) == max(1, round(0.2 * n)) * drift.EVERY
                   for (_, data), (_, n) in zip(parts, plan.parts, strict=True))  # fmt: skip
        natural = [data for domain, data in parts if domain not in drift.UNNATURAL]
        assert len(set(natural)) == len(natural)
        assert parts == drift.stream(name, 0.2)
    with pytest.raises(ValueError, match="name must be one of"):
        drift.stream("third")
