"""Backward passes of other weights, and learning inside of learning, are refused by name; nothing changes."""

import pytest
import torch
from helpers import plain_config
from tiny_models import adapted, assert_same, ids_of, state_of, tiny
from torch import nn

import ttt
from ttt.nn import Capturing


def net(window=4):
    torch.manual_seed(0)
    return ttt.adapt_(
        nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)),
        plain_config(target_modules="all-linear", window=window),
    )


def teach(model):
    with ttt.learning(model):
        model(torch.randn(3, 8)).square().sum().backward()


@pytest.mark.parametrize("window", [1, 4, 16])
def test_a_backward_pass_after_learning_is_refused(window):
    model, x = net(window), torch.randn(5, 8, requires_grad=True)
    loss = model(x).sum()
    teach(model)
    with pytest.raises(RuntimeError, match="has learnt, or was reset or loaded"):
        loss.backward()
    assert x.grad is None
    model(x).sum().backward()  # and the next one is right
    weights = [layer.effective_weight() for _, layer in ttt.learning_layers(model)]
    y = torch.tanh(x @ weights[0].T + model[0].bias)
    expected = ((1 - y**2) * weights[1].sum(0)) @ weights[0]
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)


def test_gradients_from_before_a_reset_do_not_enter_the_state():
    model, learner = adapted(window=8)
    ids = ids_of(1, 12)
    learner.observe(ids)
    with ttt.learning(model):
        loss = model(input_ids=ids, labels=ids).loss
        for layer in learner.layers:
            layer.reset()
        with pytest.raises(RuntimeError, match="was reset or loaded"):
            loss.backward()
    assert all(layer.pending == 0 for layer in learner.layers)
    learner.observe(ids)


def test_several_backward_passes_of_one_forward_pass_are_right():
    model, x = net(), torch.randn(5, 8, requires_grad=True)
    loss = model(x).square().sum()
    (one,) = torch.autograd.grad(loss, x, retain_graph=True)
    (two,) = torch.autograd.grad(loss, x)
    assert torch.equal(one, two)


def users_model():
    config = plain_config(
        target_modules=["down_proj"], layers="last:2", per_user=ttt.LowRank(slots=3, rank=4, window=4)
    )
    learner = ttt.Learner(ttt.adapt_(tiny(), config))
    for user in ("ann", "bob"):
        learner.observe(ids_of(1, 9), users=[user])
    return learner


def gradient_of(learner, user, between=lambda: None):
    embedded = learner.model.get_input_embeddings()(torch.arange(7).view(1, 7)).detach().requires_grad_()
    with ttt.users(learner.model, [user]):
        loss = learner.model(inputs_embeds=embedded).logits.square().mean()
    between()
    loss.backward()
    return embedded.grad


def test_what_another_user_learns_refuses_nothing():
    learner = users_model()
    before = gradient_of(learner, "ann")
    after = gradient_of(learner, "ann", lambda: learner.observe(ids_of(1, 9), users=["bob"]))
    assert torch.equal(before, after)


@pytest.mark.parametrize("what", ["learn", "forget", "load"])
def test_what_the_user_learns_or_loses_does(what):
    learner = users_model()
    state = learner.pool.export("bob")
    act = {
        "learn": lambda: learner.observe(ids_of(1, 9), users=["ann"]),
        "forget": lambda: learner.pool.forget("ann"),
        "load": lambda: learner.pool.load("ann", state),
    }[what]
    with pytest.raises(RuntimeError, match="down_proj has learnt, or was reset or loaded"):
        gradient_of(learner, "ann", act)


def test_learning_inside_of_learning_is_refused_and_the_outer_block_goes_on():
    rows = []
    for nested in (False, True):
        model = net(window=16)
        torch.manual_seed(1)
        with ttt.learning(model):
            model(torch.randn(3, 8)).square().sum().backward()
            if nested:
                with pytest.raises(RuntimeError, match="learns already in this thread"), ttt.learning(model):
                    pass
            model(torch.randn(2, 8)).square().sum().backward()
        rows.append(state_of(model))
        assert model[0].pending == 5
    assert_same(*rows)


def test_after_a_block_that_was_interrupted_half_way_others_learn(monkeypatch):
    """As by the handler of a signal: the block has left a sink behind."""
    model, x = net(window=16), torch.randn(3, 8)
    ended = Capturing.__exit__
    monkeypatch.setattr(Capturing, "__exit__", lambda *args: None)
    with ttt.learning(model):
        model(x).sum().backward()
    monkeypatch.setattr(Capturing, "__exit__", ended)
    assert model[0].sink is not None
    with ttt.learning(model):
        model(x).sum().backward()
    assert (model[0].pending, model[0].sink) == (6, None)


def test_a_learner_inside_of_learning_is_refused():
    model, learner = adapted(window=64)
    ids = ids_of(1, 12)
    with ttt.learning(model):
        model(input_ids=ids, labels=ids).loss.backward()
        before = state_of(model)
        for call in (lambda: learner.observe(ids), lambda: learner.calibrate([ids])):
            with pytest.raises(RuntimeError, match=r"learns already|ttt\.learning"):
                call()
        assert_same(before, state_of(model))
    assert all(layer.pending == 12 for layer in learner.layers)
