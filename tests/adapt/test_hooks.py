"""Hooks on replaced layers go on working; forward passes that were set on a module are refused by name."""

import copy
import types

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from helpers import plain_config
from tiny_models import ids_of, tiny
from torch import nn

import ttt

USERS = [None, ttt.LowRank(slots=2, rank=4, window=4)]


def layer_of(model):
    return model.model.layers[-1].mlp.down_proj


def adapted(model, per_user=None):
    return ttt.adapt_(model, plain_config(target_modules=["down_proj"], layers="last:0.5", per_user=per_user))


def add_one(module, args, output):
    return output + 1.0


def halve(module, args):
    return (args[0] / 2,)


def with_keywords(module, args, kwargs, output):
    return output * 3.0


@torch.no_grad()
@pytest.mark.parametrize("per_user", USERS)
def test_what_hooks_do_stays(per_user):
    model, ids = tiny(), ids_of(2, 9)
    plain = model(ids).logits
    layer = layer_of(model)
    layer.register_forward_hook(add_one)
    layer.register_forward_pre_hook(halve)
    layer.register_forward_hook(with_keywords, with_kwargs=True)
    hooked = model(ids).logits
    assert float((hooked - plain).abs().max()) > 0.1
    adapted(model, per_user)
    torch.testing.assert_close(model(ids).logits, hooked)
    torch.testing.assert_close(copy.deepcopy(model)(ids).logits, hooked)
    ttt.restore_(model)
    assert torch.equal(model(ids).logits, hooked)


@torch.no_grad()
@pytest.mark.parametrize("per_user", USERS)
def test_handles_work_across_adapt_and_restore(per_user):
    model, ids = tiny(), ids_of(2, 9)
    plain = model(ids).logits
    before = layer_of(model).register_forward_hook(add_one)
    hooked = model(ids).logits
    adapted(model, per_user)
    before.remove()
    torch.testing.assert_close(model(ids).logits, plain)
    later = layer_of(model).register_forward_hook(add_one)
    torch.testing.assert_close(model(ids).logits, hooked)
    ttt.restore_(model)
    assert torch.equal(model(ids).logits, hooked)
    later.remove()
    assert torch.equal(model(ids).logits, plain)


def test_backward_hooks_see_the_gradients_of_the_layer():
    model, seen = tiny(), []
    layer_of(model).register_full_backward_hook(lambda module, into, out: seen.append(out[0].clone()))
    embedded = model.get_input_embeddings()(ids_of(1, 7)).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    adapted(model)
    model(inputs_embeds=embedded).logits.sum().backward()
    ttt.restore_(model)
    model(inputs_embeds=embedded).logits.sum().backward()
    assert len(seen) == 3
    torch.testing.assert_close(seen[1], seen[0])
    assert torch.equal(seen[2], seen[0])


def test_what_a_hook_changes_is_what_is_learnt():
    """A hook that halves the inputs of the layer: its rows are the halved ones."""
    rows = []
    for halves in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4))
        if halves:
            model[0].register_forward_pre_hook(halve)
        ttt.adapt_(model, plain_config(target_modules="all-linear", window=8))
        x = torch.arange(12.0).view(2, 6)
        with ttt.learning(model):
            model(x).sum().backward()
        rows.append(model[0].win_x[:2].clone())
    assert torch.equal(rows[1] * 2, rows[0])


class Doubling(ModelHook):
    def post_forward(self, module, output):
        return output * 2


def patched(layer):
    own = layer.forward
    layer.forward = types.MethodType(lambda self, x: own(x) * 2, layer)


def by_accelerate(layer):
    add_hook_to_module(layer, Doubling())


@pytest.mark.parametrize("per_user", USERS)
@pytest.mark.parametrize("change", [patched, by_accelerate])
def test_a_forward_pass_of_its_own_is_refused_and_all_linear_leaves_it_out(change, per_user):
    model, ids = tiny(), ids_of(2, 9)
    change(layer_of(model))
    before, kinds = model(ids).logits, [type(each) for each in model.modules()]
    with pytest.raises(ValueError, match="down_proj has a forward pass that was set on this module"):
        adapted(model, per_user)
    assert [type(each) for each in model.modules()] == kinds
    with pytest.warns(UserWarning, match="leaves out .*down_proj has a forward pass"):
        ttt.adapt_(model, plain_config(target_modules="all-linear", per_user=per_user))
    torch.testing.assert_close(model(ids).logits, before)
