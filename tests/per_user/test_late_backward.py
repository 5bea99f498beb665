"""A backward pass after the block of its users has ended: right, or refused where layers are computed again."""

import pytest
import torch
from helpers import plain_config
from tiny_models import ids_of, tiny

import ttt


@pytest.fixture
def model():
    config = plain_config(target_modules=["down_proj", "q_proj"], lr=0.05, per_user=ttt.LowRank(slots=2))
    model = ttt.adapt_(tiny(), config)
    ttt.Learner(model).observe(ids_of(1, 20), users=["a"])
    model.model.embed_tokens.weight.requires_grad_(True)
    return model.train()


def loss(model, ids):
    return model(ids, use_cache=False).logits.square().sum()


def gradient(model, of):
    model.zero_grad()
    of.backward()
    return model.model.embed_tokens.weight.grad.clone()


def inside(model, ids):
    with ttt.users(model, ["a"]):
        return gradient(model, loss(model, ids))


def late(model, ids):
    with ttt.users(model, ["a"]):
        found = loss(model, ids)
    return gradient(model, found)


def test_without_checkpoints_the_gradient_is_the_users(model):
    ids = ids_of(1, 12)
    assert torch.equal(late(model, ids), inside(model, ids))


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_checkpoints_it_is_refused_and_inside_it_is_right(model, reentrant):
    ids = ids_of(1, 12)
    wanted = inside(model, ids)
    base = gradient(model, loss(model, ids))
    assert not torch.allclose(base, wanted)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.testing.assert_close(inside(model, ids), wanted)
    with pytest.raises(RuntimeError, match=r"after the block that named their users has ended.*inside ttt\.users"):
        late(model, ids)
    # The base model's own pass is none of a block's.
    torch.testing.assert_close(gradient(model, loss(model, ids)), base)
    torch.testing.assert_close(inside(model, ids), wanted)


def test_what_the_learner_does_in_between_does_not_matter(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = ids_of(1, 12)
    ttt.Learner(model.eval()).observe(ids, users=["a"])
    model.train()
    gradient(model, loss(model, ids))
    with ttt.users(model, ["a"]), torch.no_grad():
        model(ids)
    gradient(model, loss(model, ids))
