"""Calibration names layers that the text does not reach, and protects the others."""

import pytest
import torch
from torch import nn
from transformers import BartConfig, BartForCausalLM

import ttt


class Forked(nn.Module):
    """Of its three layers ``aside`` is never called, and the weight of ``read`` is read without a call."""

    def __init__(self):
        super().__init__()
        self.up, self.aside, self.read, self.down = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)) @ self.read.weight.T)


def loss(model, x):
    return model(x).square().sum()


@pytest.mark.parametrize("per_user", [None, ttt.LowRank(slots=1, rank=2, window=4)])
@pytest.mark.parametrize("protect", [[ttt.KroneckerFisher(directions=2)], [ttt.EWC(0.1), ttt.LayerReplay(2)]])
def test_they_are_named_and_the_others_are_protected(per_user, protect):
    batches = [torch.randn(20, 6) for _ in range(3)]
    learner = ttt.Learner(
        ttt.adapt_(Forked(), ttt.TTTConfig(target_modules="all-linear", protect=protect, per_user=per_user))
    )
    with pytest.warns(UserWarning, match="no gradient at aside, read: the text does not reach them"):
        learner.calibrate(batches, loss=loss)
    without = ttt.Learner(
        ttt.adapt_(Forked(), ttt.TTTConfig(target_modules=["up", "down"], protect=protect, per_user=per_user))
    )
    without.model.load_state_dict(learner.model.state_dict())
    without.calibrate(batches, loss=loss)
    for name in ("up", "down"):
        one, two = (each.model.get_submodule(name) for each in (learner, without))
        for buffer in ("basis", "output_basis", "memory", "calibrated"):
            found, wanted = getattr(one, buffer, None), getattr(two, buffer, None)
            assert (found is None) == (wanted is None)
            assert found is None or torch.equal(found, wanted)
    for name in ("aside", "read"):
        layer = learner.model.get_submodule(name)
        assert not any(
            bool(getattr(layer, each).any()) for each in ("basis", "memory") if getattr(layer, each) is not None
        )


def test_a_loss_that_reaches_none_is_refused():
    learner = ttt.Learner(ttt.adapt_(Forked(), ttt.TTTConfig(target_modules=["aside"])))
    with pytest.raises(ValueError, match="no gradient at any layer that learns"):
        learner.calibrate([torch.randn(4, 6)], loss=lambda model, x: loss(model, x.clone().requires_grad_()))


def test_a_decoder_whose_cross_attention_has_no_encoder_learns_with_the_defaults():
    sizes = {"d_model": 16, "decoder_layers": 2, "decoder_ffn_dim": 24, "decoder_attention_heads": 2}
    model = BartForCausalLM(BartConfig(vocab_size=40, max_position_embeddings=64, **sizes)).eval()
    learner = ttt.Learner(ttt.adapt_(model, ttt.TTTConfig(target_modules="all-linear")))
    ids = torch.randint(3, 40, (4, 40))
    with pytest.warns(UserWarning, match="encoder_attn"):
        learner.calibrate([ids])
    first = learner.observe(ids)
    assert first.rejected == 0
    assert learner.observe(ids, learn=False).bits < first.bits
