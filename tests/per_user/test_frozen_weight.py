"""The gradient through quantized layers whose library gives none or a wrong one."""

import copy

import pytest
import torch
from helpers import plain_config
from quantized_models import KINDS, USERS, config, dense_twin
from tiny_models import ids_of, tiny
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    quantize_,
)

import ttt
from ttt.nn import frozen_weight
from ttt.nn import row_blocks as row_blocks_module
from ttt.nn.frozen_weight import FrozenWeight
from ttt.nn.module_weight import ModuleWeight
from ttt.nn.quantized import QuantizedLowRankLinear, row_blocks, why_blocked
from ttt.nn.row_blocks import can_be_cut


class Linear4bit(nn.Linear):
    """A stand-in for a layer of bitsandbytes; ``packs`` is what becomes of its gradient once it ran without one."""

    packs = "right"

    def __init__(self, dense):
        super().__init__(dense.in_features, dense.out_features, bias=dense.bias is not None, dtype=dense.weight.dtype)
        self.load_state_dict(dense.state_dict())
        self.packed = False

    def forward(self, x):
        self.packed = self.packed or not torch.is_grad_enabled()
        y = super().forward(x.detach() if self.packed and self.packs == "none" else x)
        if self.packed and self.packs == "other":
            return y.detach() + x.sum(-1, keepdim=True) - x.sum(-1, keepdim=True).detach()
        if self.packed and self.packs == "raises" and y.requires_grad:
            y.register_hook(self.fail)
        return y

    @staticmethod
    def fail(gradient):
        raise NotImplementedError("no derivative")


Linear4bit.__module__ = "bitsandbytes.nn.modules"
BLOCKED = {
    "none": "lets no gradient through to its inputs",
    "other": "gives its inputs a gradient that is not its own",
    "raises": "lets no gradient through to its inputs (NotImplementedError: no derivative)",
}


def learnt(model, ids, users):
    """Everything that the layers of ``model``, adapted, hold after they have learnt from ``ids``."""
    learner = ttt.Learner(model)
    output = learner.observe(ids, users=None if users is None else ["a", "b"])
    assert output.learned > 0
    if users is None:
        return {f"{la.name}.{key}": t for la in learner.layers for key, t in la.state().items()}
    layers, slots = learner.pool.layers.items(), [learner.pool.slot(user) for user in ("a", "b")]
    return {f"{name} {slot}": layer.effective_weight(slot) - layer.weight for name, layer in layers for slot in slots}


@pytest.mark.parametrize("packs", ["right", *BLOCKED])
@pytest.mark.parametrize("users", [None, USERS])
def test_what_is_learnt_below_a_layer_with_a_wrong_gradient_is_right(users, packs, monkeypatch):
    """The reference is the same model with a layer of torch in its place."""
    monkeypatch.setattr(Linear4bit, "packs", packs)
    plain = tiny()
    model = copy.deepcopy(plain)
    mlp = model.model.layers[1].mlp
    mlp.up_proj = packed = Linear4bit(mlp.up_proj)
    assert why_blocked(packed) == BLOCKED.get(packs, "")
    random, ids = torch.get_rng_state(), torch.arange(1, 49).view(2, 24)
    for each in (model, plain):
        ttt.adapt_(each, config(target_modules=["q_proj"], per_user=users))
    assert torch.equal(random, torch.get_rng_state())
    assert not packed.packed, "a copy is tried"
    copied = copy.deepcopy(model)
    found, wanted = (learnt(each, ids, users) for each in (model, plain))
    assert found.keys() == wanted.keys()
    for name, t in wanted.items():
        torch.testing.assert_close(found[name], t, rtol=1e-3, atol=1e-5)
    again = learnt(copied, ids, users)
    assert all(torch.equal(t, again[name]) for name, t in found.items()), "a copy learns the same"
    for each in (model, copied):
        ttt.restore_(each)
        assert not each.model.layers[1].mlp.up_proj._forward_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_layer_that_is_read_through_the_identity(dtype, monkeypatch):
    monkeypatch.setattr(Linear4bit, "packs", "none")
    monkeypatch.setattr(frozen_weight, "_IDENTITY", 7)
    dense = nn.Linear(32, 21).to(dtype)
    weight = FrozenWeight(Linear4bit(dense))
    torch.testing.assert_close(weight.dense(), dense.weight.detach(), rtol=2 * torch.finfo(dtype).eps, atol=0.0)
    delta = torch.randn(5, 3, 21).to(dtype)
    exact = delta.double() @ weight.dense().double()
    assert float((weight.transposed_product(delta).double() - exact).norm() / exact.norm()) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("learns", ["q_proj", "up_proj"])
def test_what_is_no_product_with_a_matrix_is_refused_and_nothing_changes(learns, monkeypatch):
    forward = Linear4bit.forward
    monkeypatch.setattr(Linear4bit, "forward", lambda self, x: forward(self, x).abs())
    model = tiny()
    mlp = model.model.layers[1].mlp
    mlp.up_proj = Linear4bit(mlp.up_proj)
    modules, state = dict(model.named_modules()), {k: t.clone() for k, t in model.state_dict().items()}
    refusal = r"up_proj is quantized \(bitsandbytes' Linear4bit\) and gives its inputs a gradient that is not its own"
    with pytest.raises(ValueError, match=refusal):
        ttt.adapt_(model, config(target_modules=[learns]))
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    later = r"model\.layers\.2\..*q_proj|model\.layers\.1\.mlp\.down_proj"  # after it
    ttt.adapt_(model, config(target_modules=later))


def test_users_learn_beside_a_layer_that_only_its_own_class_can_read(monkeypatch):
    monkeypatch.setattr(Linear4bit, "packs", "none")
    net = nn.Sequential(Linear4bit(nn.Linear(32, 21)), nn.Tanh(), Linear4bit(nn.Linear(21, 4)))
    plain, before = copy.deepcopy(net), {name: t.clone() for name, t in net.state_dict().items()}
    ttt.adapt_(net, config(target_modules="all-linear"))
    assert all(type(net[k]) is QuantizedLowRankLinear and type(net[k].weight.data) is ModuleWeight for k in (0, 2))
    x = torch.randn(3, 32)
    assert torch.equal(net(x), plain(x))
    for layer, rows in ((net[0], 32), (net[2], 21)):
        users = torch.tensor([0, 1, 0, 2], dtype=torch.int32)
        layer.learn(torch.randn(4, rows), torch.randn(4, layer.out_features), torch.rand(4), users)
        layer.routing.set(torch.tensor([0, -1, 2], dtype=torch.int32))
    twins = [dense_twin(net[k]) for k in (0, 2)]
    for twin in twins:
        twin.routing.set(torch.tensor([0, -1, 2], dtype=torch.int32))
    own, exact = x.clone().requires_grad_(True), x.double().requires_grad_(True)
    found, wanted = net(own), twins[1](torch.tanh(twins[0](exact)))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[1], plain(x)[1]), "the base model's bits"
    found.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(own.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    for product in (lambda w: w + 1, lambda w: x @ w.T, lambda w: torch.stack([torch.ones(21, 32), w])):
        with pytest.raises(NotImplementedError, match=r"weight of a Linear4bit.*weight\.dequantize\(\)"):
            product(net[0].weight)
    assert torch.equal(ttt.restore_(net)(x), plain(x))
    assert type(net[0]) is Linear4bit


class _Given(torch.autograd.Function):
    """The product x W^T, with the product of the gradient and another matrix as the gradient at x."""

    @staticmethod
    def forward(ctx, x, weight, other):
        ctx.save_for_backward(other)
        return x @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.saved_tensors[0], None, None


def given_gradient(outputs, inputs, dtype, other_of):
    """A stand-in of bitsandbytes whose gradient is that of the weight ``other_of(weight)``."""

    class Given4bit(nn.Linear):
        def forward(self, x):
            return _Given.apply(x, self.weight, other_of(self.weight))

    Given4bit.__module__ = "bitsandbytes.nn.modules"
    return Given4bit(inputs, outputs, bias=False, dtype=dtype)


def noisy(weight, part):
    """``weight`` with noise of ``part`` of its size, the same in each call."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    return weight + (noise * part * weight.detach().float().std()).to(weight.dtype)


WRONG = {
    "zeros": torch.zeros_like,
    "twice": lambda weight: 2 * weight,
    "negative": lambda weight: -weight,
    "9 tenths": lambda weight: 0.9 * weight,
    "another": lambda weight: noisy(weight, 1.0) - weight,
    "with noise": lambda weight: noisy(weight, 1.0),
    "rows exchanged": lambda weight: weight.roll(1, 0),
    "columns exchanged": lambda weight: weight.roll(1, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4096, 64), (4096, 300), (33, 700), (1, 90), (70, 1)])
def test_a_wrong_gradient_is_found_in_layers_of_any_size(shape, dtype):
    assert why_blocked(given_gradient(*shape, dtype, lambda weight: weight)) == ""
    assert why_blocked(given_gradient(*shape, dtype, lambda weight: noisy(weight, 0.01))) == ""
    for name, other_of in WRONG.items():
        if name.startswith("rows" if shape[0] == 1 else "columns" if shape[1] == 1 else "never"):
            continue  # one row or column exchanged with itself
        found = why_blocked(given_gradient(*shape, dtype, other_of))
        assert found == "gives its inputs a gradient that is not its own", name


@pytest.mark.parametrize("users", [None, USERS])
def test_a_quantized_layer_that_is_not_loaded_is_not_tried(users):
    model = tiny()
    model.model.layers[1].mlp.up_proj = Linear4bit(model.model.layers[1].mlp.up_proj).to("meta")
    ttt.adapt_(model, config(target_modules=["q_proj"], per_user=users))
    learns = ttt.nn.Linear if users is None else ttt.nn.LowRankLinear
    assert type(model.model.layers[0].self_attn.q_proj) is learns


def test_a_module_that_is_no_linear_layer_is_not_tried():
    kind = type("Embedding4bit", (nn.Embedding,), {"__module__": "bitsandbytes.nn.modules"})
    net = nn.ModuleDict({"first": nn.Linear(4, 3), "second": kind(5, 3)})
    ttt.adapt_(net, plain_config(target_modules=["first"]))
    assert type(net["first"]) is ttt.nn.Linear


def test_no_layer_learns_below_one_that_lets_no_gradient_through():
    model = tiny()
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda m, n: n == "model.layers.1.mlp.up_proj")
    modules = dict(model.named_modules())
    for users in (None, USERS):
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj is quantized .* no gradient passes"):
            ttt.adapt_(model, config(target_modules=["q_proj"], per_user=users))
    assert dict(model.named_modules()) == modules
    learner = ttt.Learner(ttt.adapt_(model, plain_config(target_modules=["q_proj"], layers="last:2", chunk=8)))
    assert learner.observe(ids_of(1, 9)).learned == 1


@pytest.mark.parametrize("assign", [False, True])
def test_a_weight_that_was_found_is_found_again_after_another_was_loaded(assign, monkeypatch):
    monkeypatch.setattr(Linear4bit, "packs", "none")
    net = nn.Sequential(Linear4bit(nn.Linear(32, 21)))
    ttt.adapt_(net, config(target_modules="all-linear"))
    assert torch.equal(net[0].weight.dequantize(), net.state_dict()["0.weight"])
    parameters = net[0].weight.frozen.module.weight, net[0].bias
    versions = [ttt.version(net)]
    for _ in range(2):
        other = {name: torch.randn_like(t) for name, t in net.state_dict().items()}
        net.load_state_dict(other, assign=assign)
        torch.testing.assert_close(net[0].weight.dequantize(), other["0.weight"])
        assert torch.equal(net[0].bias, other["0.bias"])
        versions.append(ttt.version(net))
    ttt.restore_(net)
    assert all(one is other for one, other in zip(parameters, (net[0].weight, net[0].bias), strict=True))
    assert len(set(versions)) == 3, "a cache of keys and values from before does not fit any more"


def test_a_weight_that_was_found_is_found_again_after_another_was_put_in_its_place():
    layer = Linear4bit(nn.Linear(32, 21))
    weight = FrozenWeight(layer)
    for _ in range(3):
        layer.weight = nn.Parameter(torch.randn(21, 32), requires_grad=False)
        torch.testing.assert_close(weight.dense(), layer.weight.data)


def test_a_copy_of_the_weight_on_another_device_leaves_the_layer_where_it_is(monkeypatch):
    monkeypatch.setattr(Linear4bit, "packs", "none")
    net = nn.Sequential(Linear4bit(nn.Linear(32, 21)))
    ttt.adapt_(net, config(target_modules="all-linear"))
    x = torch.randn(3, 32)
    before, module = net(x), net[0].weight.frozen.module
    moved = net[0].weight.to("meta")
    assert (moved.device.type, moved.frozen.module.weight.device.type) == ("meta", "meta")
    assert net[0].weight.frozen.module is module
    assert torch.equal(net(x), before)
    net.to("meta")  # which moves the layer itself
    assert net[0].weight.frozen.module is module
    assert {t.device.type for t in (net[0].weight, module.weight, module.bias, net[0].bias, net[0].a)} == {"meta"}


def test_a_weight_whose_layout_cannot_be_cut_is_dequantized_once_for_all_blocks(monkeypatch):
    monkeypatch.setattr(row_blocks_module, "_BLOCK", 100)
    net = nn.Sequential(nn.Linear(32, 21))
    quantize_(net, KINDS["int8"])
    weight, wanted, calls = net[0].weight, net[0].weight.dequantize(), []
    kind = type(weight.data)
    dequantize = kind.dequantize

    def uncut(self, key):
        raise NotImplementedError("aten.slice")

    monkeypatch.setattr(kind, "__getitem__", uncut)
    monkeypatch.setattr(kind, "dequantize", lambda self: calls.append(self.shape) or dequantize(self))
    blocks = [block for _, block in row_blocks(weight)]
    assert torch.equal(torch.cat(blocks), wanted)
    assert {len(block) for block in blocks} == {3}
    assert calls == [(21, 32)]
    assert can_be_cut(net[0])
