"""The comparison of rates between models: its grid, its shares, and models of other shapes."""

import pytest
import torch

from ttt.demo import transfer
from ttt.demo.pretrain import new_model


def row(model, rate, lr, new, protected=False, text="tuning: headers"):
    return {"model": model, "text": text, "rate": rate, "lr": lr, "clip": None, "protected": protected, "new_bpb": new}


def test_shares_are_of_the_best_of_each_model():
    rows = [row("a", None, 0.0, 3.0), row("a", "rms", 0.1, 2.0), row("a", "rms", 0.2, 2.5),
            row("b", None, 0.0, 2.0), row("b", "rms", 0.1, 1.9), row("b", "rms", 0.2, 1.6),
            row("a", "rms", 0.1, 2.2, protected=True)]  # fmt: skip
    transfer.shares(rows)
    assert [r["share"] for r in rows] == [None, 1.0, 0.5, None, 0.25, 1.0, 1.0]
    assert rows[2]["gain"] == 0.5


def test_the_summary_has_settings_tried_on_all_models_best_first():
    rows = []
    for model, best in zip(transfer.MODELS, (0.1, 0.2, 0.1), strict=True):
        rows += [row(model, None, 0.0, 3.0)]
        rows += [row(model, "rms", lr, 2.0 if lr == best else 2.0 + 10 * abs(lr - best)) for lr in (0.1, 0.15, 0.2)]
    rows.append(row("128x4", "constant", 0.02, 2.0))  # on one model only
    transfer.shares(rows)
    found = transfer.summary(rows)
    assert [line["lr"] for line in found] == [0.15, 0.1, 0.2]
    assert found[0]["worst"] == pytest.approx(0.5)
    assert set(found[0]["shares"]) == set(transfer.MODELS)


def test_the_default_has_the_largest_smallest_share_with_and_without_protection():
    def line(lr, protected, *shares, text="tuning: headers"):
        shares = dict(zip(transfer.MODELS, shares, strict=True))
        return {"text": text, "protected": protected, "rate": "rms", "clip": 3.0, "lr": lr, "shares": shares}

    lines = [line(0.1, False, 1.0, 0.9, 1.0), line(0.1, True, 1.0, 0.5, 1.0),
             line(0.2, False, 0.7, 0.8, 0.9), line(0.2, True, 0.6, 0.8, 0.9),
             line(0.3, False, 1.0, 1.0, 1.0), line(0.2, True, 0.1, 0.2, 0.3, text="report: other")]  # fmt: skip
    found = transfer.default(lines)
    assert (found["rate"], found["lr"], found["clip"]) == ("rms", 0.2, 3.0)
    assert found["report"] == {"protected": dict(zip(transfer.MODELS, (0.1, 0.2, 0.3), strict=True))}
    assert transfer.default(lines[4:5]) == {}


def test_the_grid_tries_each_setting_once():
    grid = transfer.grid()
    assert len({tuple(setting.values()) for setting in grid}) == len(grid)
    assert {setting["rate"] for setting in grid} == set(transfer.RATES)


@pytest.mark.parametrize(("hidden", "layers"), [(64, 1), (192, 2)])
def test_models_of_other_shapes(hidden, layers):
    model = new_model(hidden, layers)
    assert model.config.num_attention_heads * 64 == hidden
    assert len(model.model.layers) == layers
    assert model.model.layers[0].mlp.up_proj.weight.shape == (3 * hidden, hidden)
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 256)


def test_shapes_that_cannot_be_are_refused():
    for hidden in (0, 63, 100):
        with pytest.raises(ValueError, match=f"hidden must be a multiple of 64, got {hidden}"):
            new_model(hidden)
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        new_model(64, 0)
