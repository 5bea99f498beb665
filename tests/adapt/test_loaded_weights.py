"""`load_state_dict` on an adapted model, and the rank that an exported adapter gets."""

import copy
import warnings

import pytest
import torch
from tiny_models import adapted, ids_of, state_of, tiny

import ttt
from ttt.adapt.convert import learning_layers


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("forked", [False, True])
def test_loaded_weights_are_a_new_base(family, assign, forked):
    """The model then computes and learns as one that was adapted with them, and restores to them."""
    options = {"ewc_lambda": 0.0, "replay_rows": 2, "rate": "constant", "lr": 0.01, "window": 12}
    model, learner = adapted(family, **options)
    ids, other = ids_of(2, 30), tiny(family)
    learner.observe(ids)
    if forked:
        fork = ttt.fork(model)
        before = state_of(fork)
    learner.consolidate()
    learner.observe(ids)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    fresh = ttt.Learner(ttt.adapt_(copy.deepcopy(other), learner.config))
    for name, layer in learning_layers(model):
        wanted = fresh.model.get_submodule(name)
        assert torch.equal(layer.anchor, wanted.anchor)
        assert torch.equal(layer.weight, wanted.weight)
        assert torch.equal(layer.base_weight, wanted.weight)
        assert layer.pending == 0
        assert float(layer.win_eta.abs().sum()) == 0
        assert int(layer.tokens) == 0
        layer.memory.zero_(), layer.seen.zero_()  # what was calibrated or consolidated stays
    assert torch.equal(learner.observe(ids).nll, fresh.observe(ids).nll)
    ttt.restore_(model)
    wanted = other.state_dict()
    assert all(torch.equal(t, wanted[key]) for key, t in model.state_dict().items())
    if forked:
        found = state_of(fork)
        assert all(torch.equal(t, found[key]) for key, t in before.items())


def test_what_is_learnt_after_a_load_can_be_saved_reset_and_loaded(tmp_path):
    model, learner = adapted(ewc_lambda=0.0, replay_rows=0)
    ids, other = ids_of(2, 30), tiny()
    learner.observe(ids)
    learner.consolidate()
    model.load_state_dict(other.state_dict())
    learner.observe(ids)
    ttt.save(model, tmp_path / "x")
    again = ttt.load(copy.deepcopy(other), tmp_path / "x")
    found, wanted = state_of(again), state_of(model)
    assert all(torch.equal(t, found[key]) for key, t in wanted.items())
    learner.reset()
    assert all(torch.equal(layer.weight, other.get_submodule(n).weight) for n, layer in learning_layers(model))


def taught(rank, noise):
    model = ttt.adapt_(torch.nn.Sequential(torch.nn.Linear(40, 50)), ttt.TTTConfig(target_modules=["0"], protect=[]))
    change = torch.randn(50, rank) @ torch.randn(rank, 40)
    change /= change.norm()
    spread = torch.linalg.qr(torch.randn(50, 40))[0]
    with torch.no_grad():
        model[0].weight += change + noise * spread / spread.norm()
    return model


def test_the_rank_of_an_adapter_is_chosen_by_its_error(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rank, wanted in ((3, 8), (8, 8), (9, 16), (20, 32)):
            found = ttt.export_peft(taught(rank, 0.03), tmp_path / str(rank), base_model="m")
            assert found.rank == wanted
            assert 0.001 < found.error <= 0.05
        found = ttt.export_peft(taught(3, 1.0), tmp_path / "full", base_model="m")
        assert (found.rank, found.error < 1e-6) == (64, True)  # all of a matrix of rank 40
    with pytest.warns(UserWarning, match=r"the adapter of rank 8 in .* lost (5|6|7)\d% .* a rank above 8 loses less"):
        found = ttt.export_peft(taught(3, 1.0), tmp_path / "less", base_model="m", rank=8)
    assert found.error > 0.5
