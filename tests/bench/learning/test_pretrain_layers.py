"""The bench that trains models of sequence layers: their sizes, and the results that a run writes."""

import json

import pytest
from typer.testing import CliRunner

from bench.learning import pretrain
from ttt.nn.sequence import GatedDeltaNet, TTTLinear, WindowAttention


def test_models_are_of_one_size():
    """Within 3 % of the demo model's parameters."""
    sizes = {layer: sum(p.numel() for p in pretrain.model_of(layer).parameters()) for layer in pretrain.LAYERS}
    assert all(size == pytest.approx(sizes["llama"], rel=0.03) for size in sizes.values()), sizes


def test_hybrids_attend_to_a_window_in_every_second_block():
    for layer, kind in (("hybrid", GatedDeltaNet), ("hybrid-linear", TTTLinear)):
        mixers = [type(block.mixer) for block in pretrain.model_of(layer).model.layers]
        assert mixers == [kind, WindowAttention, kind, WindowAttention, kind]


@pytest.fixture
def short(monkeypatch):
    """Everything is measured on a few bytes."""
    monkeypatch.setattr(pretrain, "RANGES", ((0, 16), (16, 40)))
    monkeypatch.setattr(pretrain, "TEXTS", 1)
    monkeypatch.setattr(pretrain, "PROMPT", 20)
    monkeypatch.setattr(pretrain, "DECODED", 2)


def test_a_run_replaces_the_results_of_its_layer(tmp_path, short):
    file = tmp_path / "results.json"
    for layer, steps in (("hybrid", "2"), ("llama", "1"), ("hybrid", "1")):
        command = ["--layer", layer, "--steps", steps, "--batch", "1", "--json", str(file)]
        done = CliRunner().invoke(pretrain.app, command)
        assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())
    assert [row["layer"] for row in found["rows"]] == ["hybrid", "llama"]
    assert found["about"]["context"] == 512
    for row in found["rows"]:
        assert (row["steps"], row["bytes_read"]) == (1, 512)
        assert set(row["held_out_bpb"]) == {"0-16", "16-40"}
        assert row["decode"]["state_bytes"] > 0
        assert row["machine"]["torch"]


@pytest.mark.parametrize("layer", ["hybrid", "llama"])
def test_a_saved_model_is_measured_anew(layer, tmp_path, short):
    file, folder = tmp_path / "results.json", tmp_path / "model"
    command = ["--layer", layer, "--json", str(file)]
    done = CliRunner().invoke(pretrain.app, [*command, "--saved", str(folder)])
    assert done.exit_code == 2
    assert f"must hold the row of layer {layer!r} for saved" in " ".join(done.output.replace("│", " ").split())
    for more in (["--steps", "1", "--batch", "1", "--out", str(folder)], ["--saved", str(folder)]):
        done = CliRunner().invoke(pretrain.app, [*command, *more])
        assert done.exit_code == 0, done.output
        rows = json.loads(file.read_text())["rows"]
        if "--out" in more:
            first = rows[0]
    other = {"hybrid": "llama", "llama": "hybrid"}[layer]
    found = json.loads(file.read_text())
    file.write_text(json.dumps(found | {"rows": [found["rows"][0] | {"layer": other}]}))
    done = CliRunner().invoke(pretrain.app, ["--layer", other, "--json", str(file), "--saved", str(folder)])
    assert done.exit_code == 2
    assert f"saved must hold a model of layer {other!r}" in " ".join(done.output.replace("│", " ").split())
    (again,) = rows
    assert again["held_out_bpb"] == pytest.approx(first["held_out_bpb"], abs=1e-3)  # of weights that training changed
    assert again["trained"] == first["machine"]
    for key in ("steps", "train_bpb", "parameters", "cpu_seconds"):
        assert again[key] == first[key]


def test_unknown_layers_are_refused():
    done = CliRunner().invoke(pretrain.app, ["--layer", "mamba"])
    assert done.exit_code == 2
    assert "layer must be one of ttt-linear" in done.output.replace("\n", " ")
