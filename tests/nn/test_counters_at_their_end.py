"""Layers that have learnt for so long that a counter is at its end: they go on learning, and none is torn."""

import pytest
import torch
from torch import nn

import ttt
from ttt.learn.protection import consolidate
from ttt.ops import cpu
from ttt.ops.reference import LARGEST_SEEN, MOST_ROWS_SEEN
from ttt.rules import SampleReservoir


def network(dtype, **options):
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    config = ttt.TTTConfig(target_modules="all-linear", window=6, replay_capacity=16, **options)
    return ttt.adapt_(model, config)


def learn(model, rows):
    with ttt.learning(model):
        model(torch.randn(rows, 8, dtype=model[0].weight.dtype)).square().sum().backward()


@pytest.fixture(params=["bound", "ops", "float64"])
def dtype(request, monkeypatch):
    if request.param == "ops":
        monkeypatch.setitem(cpu.unavailable, "cpu", "taken away by a test")
        monkeypatch.setattr(cpu, "_C", None)
    return torch.float64 if request.param == "float64" else torch.float32


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("protect", [[ttt.KroneckerFisher()], [ttt.LayerReplay(rows=4)]])
def test_learning_goes_on_when_the_sample_has_counted_all_rows_it_can(dtype, protect, started, tmp_path):
    model = network(dtype, protect=protect)
    layers = [layer for _, layer in ttt.learning_layers(model)]
    if started:
        learn(model, 3)
    state = {k: t.clone() for k, t in layers[1].state().items()}
    layers[1].load_state({**state, "recent_seen": torch.tensor([LARGEST_SEEN - 7])})
    seen = []
    for rows in (5, 2, 4, 3):
        before = [layer.effective_weight() for layer in layers]
        learn(model, rows)
        assert not any(torch.equal(layer.effective_weight(), w) for layer, w in zip(layers, before, strict=True))
        seen.append(int(layers[1].recent_seen))
    assert seen == [LARGEST_SEEN - 2, LARGEST_SEEN, LARGEST_SEEN // 2 + 4, LARGEST_SEEN // 2 + 7]
    assert int(layers[0].recent_seen) == 14 + 3 * started
    assert not any(layer.torn for layer in layers)
    ttt.save(model, tmp_path / "state")
    if layers[1].memory is not None:
        layers[1].seen.fill_(LARGEST_SEEN - 1)
    consolidate(layers)
    assert layers[1].memory is None or int(layers[1].seen) == LARGEST_SEEN
    learn(model, 20)


def test_a_reservoir_of_samples_keeps_some_of_the_rows_after_as_many_as_it_can_draw_among():
    reservoir = SampleReservoir(2**20, seed=3)
    reservoir.insert(x=torch.zeros(2**20))
    reservoir.seen = MOST_ROWS_SEEN + 2**20
    reservoir.insert(x=torch.ones(2**16))
    assert reservoir.seen == MOST_ROWS_SEEN + 2**20 + 2**16
    assert 10 <= int(reservoir.fields["x"].sum()) <= 70  # each with probability 2^20 / 2^31: 32 expected
