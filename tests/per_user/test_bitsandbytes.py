"""Users' low-rank weights beside layers of bitsandbytes with 4 and 8 bits, whose weights are never written."""

import copy

import bitsandbytes
import pytest
import torch
from helpers import plain_config, relative_error
from tiny_models import assert_users_learn_side_by_side, ids_of, tiny
from torch import nn

import ttt
from ttt.adapt.checkpoint import base_hash
from ttt.nn import row_blocks as row_blocks_module
from ttt.nn.bnb import stored_values
from ttt.nn.frozen_weight import FrozenWeight
from ttt.nn.module_weight import ModuleWeight
from ttt.nn.quantized import QuantizedLowRankLinear, why_blocked

KINDS = ["nf4", "fp4", "nf4 nested", "int8"]
DTYPES = [torch.float32, torch.bfloat16]
USERS = ttt.LowRank(slots=3, rank=4, window=6)
TARGETS = ["down_proj", "q_proj"]


def quantized(dense, kind, threshold=0.0):
    """A layer of bitsandbytes with the weight of ``dense``."""
    sizes = {"input_features": dense.in_features, "output_features": dense.out_features, "bias": dense.bias is not None}
    if kind == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(**sizes, has_fp16_weights=False, threshold=threshold)
    else:
        layer = bitsandbytes.nn.Linear4bit(**sizes, compute_dtype=dense.weight.dtype)
    layer.load_state_dict(dense.state_dict())
    if kind != "int8":  # in the dtype of the dense weight
        data = dense.weight.detach().clone()
        layer.weight = bitsandbytes.nn.Params4bit(
            data, False, quant_type=kind[:3], compress_statistics=kind.endswith("nested"), module=layer
        )
    return layer.to("cpu").requires_grad_(False).eval()


def quantized_model(kind, dtype=torch.float32, names=None, **options):
    """A model whose linear layers, or those with one of the ``names``, are quantized."""
    torch.manual_seed(0)
    model = tiny(layers=2, hidden_size=64, intermediate_size=128).to(dtype)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head" and (names is None or name.endswith(names)):
            model.set_submodule(name, quantized(module, kind, **options))
    return model.eval()


def config(**options):
    return plain_config(**{"target_modules": TARGETS, "lr": 0.05, "chunk": 8, "per_user": USERS, **options})


def parts(layer):
    """The tensors of which a quantized layer consists, adapted or not."""
    frozen = layer.weight.frozen if isinstance(layer.weight, ModuleWeight) else FrozenWeight(layer)
    return {name: t.clone() for name, t in frozen.parts().items()}


def targets_of(model):
    return {name: module for name, module in model.named_modules() if name.endswith(tuple(TARGETS))}


@pytest.mark.parametrize("block", [1 << 20, 200])
@pytest.mark.parametrize("shape", [(64, 64), (32, 192), (32, 96), (7, 130), (5, 9)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_the_weight_that_the_layer_computes_with(kind, dtype, shape, block, monkeypatch):
    monkeypatch.setattr(row_blocks_module, "_BLOCK", block)
    layer = quantized(nn.Linear(shape[1], shape[0], bias=False).to(dtype), kind)
    weight = FrozenWeight(layer, dtype)
    dense = weight.dense()
    assert (dense.shape, dense.dtype) == (shape, dtype)
    columns = weight.product(torch.eye(shape[1], dtype=dtype)).T  # the identity is rounded without an error
    bound = 1e-2 if kind == "int8" or dtype == torch.bfloat16 else 1e-6
    assert relative_error(dense, columns) < bound
    delta = torch.randn(4, shape[0]).to(dtype)
    assert (
        relative_error(weight.transposed_product(delta), delta.double() @ dense.double()) < 2 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("block", [1 << 20, 200])
def test_a_weight_that_was_packed_for_reading_is_read_as_it_is_then(kind, block, monkeypatch):
    """On processors without AVX512-BF16 nothing is packed, and the weight stays."""
    monkeypatch.setattr(row_blocks_module, "_BLOCK", block)
    layer = quantized(nn.Linear(128, 96, bias=False), kind)
    fresh, stored = FrozenWeight(layer).dense(), stored_values(layer.weight).clone()
    with torch.no_grad():
        seen = layer(torch.eye(128))
    weight = FrozenWeight(layer)
    assert weight.dtype == torch.float32
    assert relative_error(weight.dense(), seen.T) < 1e-2
    assert relative_error(weight.dense(), fresh) < 1e-2
    assert torch.equal(stored_values(layer.weight), stored), "the values themselves are not changed by packing"
    before = parts(layer)
    weight.dense()
    assert all(torch.equal(t, before[name]) for name, t in parts(layer).items()), "reading changes nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradient_are_those_of_the_dequantized_weight(kind):
    dense = nn.Linear(64, 32)
    net, plain = (nn.Sequential(quantized(dense, kind)) for _ in range(2))
    ttt.adapt_(net, config(target_modules="all-linear"))
    layer, users = net[0], torch.tensor([0, -1, 2, 1], dtype=torch.int32)
    assert type(layer) is QuantizedLowRankLinear
    given = torch.tensor([0, 1, 0, 2, 2, 1, 1, -1, 0], dtype=torch.int32)
    layer.learn(torch.randn(9, 64), torch.randn(9, 32), torch.rand(9), given)
    x = torch.randn(4, 3, 64)
    unpacked = x.clone().requires_grad_(True)  # the layer of bitsandbytes alone packs its weight for other inputs
    assert torch.equal(layer(x), plain(unpacked))
    layer.routing.set(users)
    assert torch.equal(layer(x)[1], plain(unpacked)[1]), "the base model's bits"
    exact = x.double().requires_grad_(True)
    changes = torch.stack([torch.zeros(32, 64).double() if u < 0 else
                           layer.b[u, : layer.rows[u]].double().T @ layer.a[u, : layer.rows[u]].double()
                           for u in users])  # fmt: skip
    weights = layer.weight.dequantize().double() + changes
    wanted = torch.einsum("btn,bmn->btm", exact, weights) + layer.bias.double()
    own = x.clone().requires_grad_(True)
    found = layer(own)
    assert relative_error(found, wanted.detach()) < (1e-2 if kind == "int8" else 1e-5)
    gradient = torch.randn_like(found)
    found.backward(gradient)
    wanted.backward(gradient.double())
    assert relative_error(own.grad, exact.grad) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_made_in_inference_mode_are_computed_with_as_others(kind):
    net = nn.Sequential(quantized(nn.Linear(64, 32), kind))
    before = parts(net[0])
    layer = ttt.adapt_(net, config(target_modules="all-linear"))[0]
    x = torch.randn(3, 64)
    with torch.inference_mode():
        made = x.clone()
        inside = net(made), net(x)
    assert all(torch.equal(y, net(x)) for y in inside)
    for routed in (None, torch.tensor([0, -1, 2], dtype=torch.int32)):
        layer.routing.set(routed)
        with torch.no_grad():
            assert torch.equal(net(made), net(x))
    assert all(torch.equal(t, before[name]) for name, t in parts(layer).items()), "nothing was packed anew"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_users_learn_side_by_side_and_the_base_is_not_written(kind, dtype):
    model = quantized_model(kind, dtype)
    names, before = list(model.state_dict()), {name: parts(layer) for name, layer in targets_of(model).items()}
    learner = ttt.Learner(ttt.adapt_(model, config()))
    learner.calibrate([ids_of(2, 24)])
    ids = ids_of(3, 30)
    assert_users_learn_side_by_side(learner, ids)
    pool = ttt.pool_of(model)
    state = pool.export("a")
    others = learner.observe(ids.roll(1, 0), users=["b", None, "a"], learn=False).nll[1]
    own = learner.observe(ids, users=["a", "b", None], learn=False).nll
    copied = ttt.Learner(copy.deepcopy(model)).observe(ids, users=["a", "b", None], learn=False).nll
    assert torch.equal(copied, own)
    pool.forget("a")
    assert not torch.equal(learner.observe(ids, users=["a", "b", None], learn=False).nll[0], own[0])
    pool.load("a", state)
    assert torch.equal(learner.observe(ids, users=["a", "b", None], learn=False).nll, own)
    changed = ids.clone()
    changed[0] = changed[0].flip(0)  # what another user says changes no bit of b's
    assert torch.equal(learner.observe(changed, users=["a", "b", None], learn=False).nll[1:], own[1:])
    assert others.isfinite().all()
    assert list(model.state_dict()) == names
    ttt.restore_(model)
    assert {type(layer) for layer in targets_of(model).values()} == {type(quantized(nn.Linear(64, 32), kind))}
    for name, layer in targets_of(model).items():
        assert all(torch.equal(t, before[name][part]) for part, t in parts(layer).items()), name


@pytest.mark.parametrize("per_user", [None, USERS])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_learnt_below_quantized_layers_is_what_dequantized_ones_teach(kind, per_user):
    names = ("up_proj", "gate_proj", "o_proj")
    model = quantized_model(kind, names=names)
    with torch.no_grad():
        model(ids_of(1, 4))  # packed from here on, where the processor lets the library pack
    dense = copy.deepcopy(model)
    for name, module in list(dense.named_modules()):
        if name.endswith(names):
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight.data.copy_(FrozenWeight(module).dense())
            dense.set_submodule(name, plain)
    ids, found = torch.arange(1, 33).view(1, 32), []
    for each in (model, dense):
        learner = ttt.Learner(ttt.adapt_(each, config(target_modules=["q_proj"], per_user=per_user, lr=0.02)))
        learner.observe(ids, users=None if per_user is None else ["a"])
        layers = list(learner.pool.layers.values()) if per_user else learner.layers
        slot = () if per_user is None else (learner.pool.slot("a"),)
        base = [layer.base_weight.clone() for layer in layers]
        found.append([layer.effective_weight(*slot) - w for layer, w in zip(layers, base, strict=True)])
    for one, other in zip(*found, strict=True):
        assert float(other.norm()) > 0
        assert relative_error(one, other) < 0.1  # the library computes its outputs in 8 or 16 bits
    assert all(not why_blocked(m, own=True) for m in model.modules() if type(m).__module__.startswith("bitsandbytes"))


def test_outliers_of_one_user_would_change_another():
    model = quantized_model("int8", threshold=6.0)
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"q_proj .*threshold > 0.*llm_int8_threshold=0.0"):
        ttt.adapt_(model, config())
    assert dict(model.named_modules()) == modules
    part = quantized_model("int8", names="up_proj", threshold=6.0)
    with pytest.raises(ValueError, match=r"up_proj .*outliers.*llm_int8_threshold=0.0"):
        ttt.adapt_(part, config())
    ttt.adapt_(part, config(per_user=None))


def test_without_users_they_are_refused_and_nothing_changes():
    model = quantized_model("nf4")
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"down_proj is quantized \(bitsandbytes' Linear4bit\).*per_user=ttt.LowRank"):
        ttt.adapt_(model, config(target_modules=["down_proj"], per_user=None))
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("kind", KINDS)
def test_files_fit_a_model_whose_layers_were_packed_meanwhile(kind, tmp_path):
    names = ("up_proj", "gate_proj")
    model, other = (quantized_model(kind, names=names) for _ in range(2))
    learner = ttt.Learner(ttt.adapt_(model, config(per_user=None)))
    learner.observe(ids_of(2, 30))
    ttt.save(model, tmp_path / "x")
    ttt.load(other, tmp_path / "x")
    layer = other.model.layers[0].mlp.up_proj
    before = base_hash(other)
    layer.weight.data.view(torch.uint8)[0] += 1
    assert base_hash(other) != before


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_may_have_any_dtype_and_the_model_may_be_converted(kind):
    net = nn.Sequential(quantized(nn.Linear(64, 32), kind))
    ttt.adapt_(net, config(target_modules="all-linear"))
    layer, x = net[0], torch.randn(3, 64)
    dense = layer.weight.dequantize()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert net(x.to(dtype)).dtype == dtype
        with torch.autocast("cpu", torch.bfloat16):
            assert net(x.to(dtype)).dtype == torch.bfloat16
    net.to(torch.bfloat16)
    assert {t.dtype for t in (layer.weight, layer.a, layer.b, layer.weight.dequantize())} == {torch.bfloat16}
    net.to(torch.float32)
    assert torch.equal(layer.weight.dequantize(), dense), "the quantized weight stayed as it is"
    assert layer.a.dtype == torch.float32
    held = sum(t.numel() * t.element_size() for t in parts(layer).values())
    assert ttt.memory_usage(net).bytes["weight"] == held
