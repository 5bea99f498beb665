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


def test_a_run_replaces_the_results_of_its_layer(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "RANGES", ((0, 16), (16, 40)))
    monkeypatch.setattr(pretrain, "TEXTS", 1)
    monkeypatch.setattr(pretrain, "PROMPT", 20)
    monkeypatch.setattr(pretrain, "DECODED", 2)
    file = tmp_path / "results.json"
    for layer, steps in (("hybrid", "2"), ("llama", "1"), ("hybrid", "1")):
        command = ["--layer", layer, "--steps", steps, "--batch", "1", "--json", str(file)]
        done = CliRunner().invoke(pretrain.app, command)
        assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())
    assert [row["layer"] for row in found["rows"]] == ["hybrid", "llama"]
    assert "same number of steps" in found["about"]["note"]
    for row in found["rows"]:
        assert (row["steps"], row["bytes_read"]) == (1, 512)
        assert set(row["held_out_bpb"]) == {"0-16", "16-40"}
        assert row["decode"]["state_bytes"] > 0
        assert row["machine"]["torch"]


def test_unknown_layers_are_refused():
    done = CliRunner().invoke(pretrain.app, ["--layer", "mamba"])
    assert done.exit_code == 2
    assert "layer must be one of ttt-linear" in done.output.replace("\n", " ")
