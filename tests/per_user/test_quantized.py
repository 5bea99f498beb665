"""Users' low-rank weights beside a base that torchao has quantized, which is never written."""

import copy

import pytest
import torch
from helpers import plain_config
from quantized_models import KINDS, config, dense_twin, is_head, is_inner, parts, quantized_model, same
from tiny_models import assert_users_learn_side_by_side, ids_of, tiny
from torch import nn
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

import ttt
from ttt.adapt.checkpoint import base_hash
from ttt.nn import row_blocks as row_blocks_module
from ttt.nn.frozen_weight import FrozenWeight
from ttt.nn.quantized import QuantizedLowRankLinear, dequantized, row_blocks, why_blocked
from ttt.nn.row_blocks import can_be_cut


@pytest.mark.parametrize("block", [1 << 20, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradient_are_those_of_the_dequantized_weight(kind, block, monkeypatch):
    monkeypatch.setattr(row_blocks_module, "_BLOCK", block)
    net = nn.Sequential(nn.Linear(32, 21))
    quantize_(net, KINDS[kind])
    plain = copy.deepcopy(net)
    ttt.adapt_(net, config(target_modules="all-linear"))
    layer = net[0]
    assert type(layer) is QuantizedLowRankLinear
    rows, delta = torch.randn(9, 32), torch.randn(9, 21)
    layer.learn(rows, delta, torch.rand(9), torch.tensor([0, 1, 0, 2, 2, 1, 1, -1, 0], dtype=torch.int32))
    users = torch.tensor([0, -1, 2, 1], dtype=torch.int32)
    x = torch.randn(4, 3, 32)
    assert torch.equal(layer(x), plain(x))
    layer.routing.set(users)
    twin = dense_twin(layer)
    twin.routing.set(users)
    assert torch.equal(layer(x)[1], plain(x)[1]), "the base model's bits"
    assert not torch.equal(layer(x)[0], plain(x)[0])
    own, exact = x.clone().requires_grad_(True), x.double().requires_grad_(True)
    found, wanted = layer(own), twin(exact)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    g = torch.randn_like(found)
    found.backward(g)
    wanted.backward(g.double())
    torch.testing.assert_close(own.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)
    for slot in (0, 1, 2):
        torch.testing.assert_close(
            layer.effective_weight(slot).double(), twin.effective_weight(slot), rtol=1e-5, atol=1e-5
        )


def test_a_row_that_is_not_finite_reaches_no_other():
    net = nn.Sequential(nn.Linear(32, 21))
    quantize_(net, KINDS["int8"])
    layer = ttt.adapt_(net, config(target_modules="all-linear"))[0]
    layer.routing.set(torch.tensor([0, -1, 2], dtype=torch.int32))
    x = torch.randn(3, 32)
    wanted, bad = layer(x), x.clone()
    bad[1, 5] = torch.inf
    assert torch.equal(layer(bad)[::2], wanted[::2])
    assert layer(bad)[1].isnan().all()
    g = torch.randn(3, 21)
    found = layer.transposed_product(g, torch.tensor([0, -1, 2], dtype=torch.int32))
    worse = g.clone()
    worse[1, 5] = torch.nan
    again = layer.transposed_product(worse, torch.tensor([0, -1, 2], dtype=torch.int32))
    assert torch.equal(again[::2], found[::2])
    assert again[1].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_dequantized_in_blocks_that_cover_the_weight(kind, monkeypatch):
    monkeypatch.setattr(row_blocks_module, "_BLOCK", 100)
    net = nn.Sequential(nn.Linear(32, 21))
    quantize_(net, KINDS[kind])
    weight = net[0].weight
    blocks = [block for _, block in row_blocks(weight)]
    assert {len(block) for block in blocks} == {3}
    assert torch.equal(torch.cat(blocks), weight.dequantize())
    assert type(dequantized(weight)) is torch.Tensor
    frozen = FrozenWeight(net[0])
    assert torch.equal(frozen.dense(), weight.dequantize())
    assert frozen.found is None, "nothing is kept a second time"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_users_learn_side_by_side_and_the_base_is_not_written(kind, dtype):
    model = quantized_model(kind, dtype=dtype)
    plain, before = copy.deepcopy(model), parts(model)
    learner = ttt.Learner(ttt.adapt_(model, config()))
    learner.calibrate([ids_of(2, 24)])
    ids = ids_of(3, 30)
    assert_users_learn_side_by_side(learner, ids)
    assert same(before, parts(model))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    state = ttt.pool_of(model).export("a")
    with torch.no_grad(), ttt.users(model, ["a"]):
        own = model(ids[:1]).logits
        assert not torch.equal(own, plain(ids[:1]).logits)
    ttt.pool_of(model).forget("a")
    ttt.pool_of(model).load("a", state)
    with torch.no_grad(), ttt.users(model, ["a"]):
        assert torch.equal(model(ids[:1]).logits, own)
    ttt.restore_(model)
    assert same(before, parts(model))
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_they_learn_what_they_would_learn_beside_the_dequantized_weights():
    model = quantized_model("int4")
    dense = copy.deepcopy(model)
    for module in dense.modules():
        if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter:
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    ids, found = ids_of(2, 30), []
    for each in (model, dense):
        learner = ttt.Learner(ttt.adapt_(each, config()))
        learner.observe(ids, users=["a", "b"])
        found.append(learner.observe(ids, users=["a", "b"], learn=False).nll)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_a_study_is_written_beside_a_quantized_base():
    model = quantized_model()
    learner = ttt.Learner(ttt.adapt_(model, config(lr=0.0)), episodes=ttt.EpisodeLog())
    before, ids = parts(model), ids_of(1, 20)
    learner.observe(ids, users=["a"])
    result = learner.study("a", passes=5)
    assert result.after < result.losses[0]
    assert float(learner.observe(ids, users=["a"], learn=False).nll.mean()) < result.losses[0]
    assert same(before, parts(model))


def test_without_users_a_quantized_layer_is_refused_and_nothing_changes():
    model = quantized_model()
    before, modules = parts(model), dict(model.named_modules())
    with pytest.raises(ValueError, match=r"down_proj is quantized \(torchao's Int8Tensor\).*per_user=ttt.LowRank"):
        ttt.adapt_(model, plain_config(target_modules=["down_proj"]))
    with pytest.raises(ValueError, match=r"leaves no layer to adapt.*cannot be rewritten"):
        ttt.adapt_(model, plain_config(target_modules="all-linear"))
    assert same(before, parts(model))
    assert dict(model.named_modules()) == modules
    quantize_(other := tiny(), KINDS["int8"], filter_fn=lambda m, n: n.endswith("down_proj"))
    with pytest.warns(UserWarning, match=r"leaves out .*down_proj.*cannot be rewritten"):
        ttt.adapt_(other, plain_config(target_modules="all-linear"))


def test_what_rounds_its_inputs_is_refused_with_users_too():
    net = nn.Sequential(nn.Linear(32, 21))
    quantize_(net, Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ValueError, match="it rounds its inputs, too"):
        ttt.adapt_(net, config(target_modules="all-linear"))


@pytest.mark.parametrize("users", [False, True])
def test_a_model_that_is_quantized_after_it_was_adapted_is_refused_by_name(users):
    model = ttt.adapt_(tiny(), config() if users else ttt.TTTConfig(["down_proj"]))
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name.endswith("down_proj"))
    with pytest.raises(ValueError, match=r"down_proj can no longer learn: its weight became torchao's Int8Tensor"):
        ttt.Learner(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_users_learn_beside_packed_4_bits_of_torchao(dtype):
    model = tiny(hidden_size=64, intermediate_size=96).to(dtype)
    quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=32), filter_fn=is_inner)
    up = model.model.layers[1].mlp.up_proj
    assert not can_be_cut(up)
    assert "derivative for aten::_weight_int4pack_mm_for_cpu is not implemented" in why_blocked(up)
    plain, before, ids = copy.deepcopy(model), parts(model), ids_of(3, 30)
    learner = ttt.Learner(ttt.adapt_(model, config()))
    assert_users_learn_side_by_side(learner, ids)
    ttt.restore_(model)
    assert same(before, parts(model))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_another_class_of_tensors_is_refused_by_name():
    class Odd(torch.Tensor):
        pass

    net = nn.Sequential(nn.Linear(4, 3))
    net[0].weight = nn.Parameter(torch.randn(3, 4).as_subclass(Odd))
    with pytest.raises(ValueError, match=r"0\.weight is a Odd, not a plain tensor"):
        ttt.adapt_(net, plain_config(target_modules="all-linear"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_head_keeps_nothing_from_working(kind, tmp_path):
    model = quantized_model(kind, is_head)
    twin, ids = copy.deepcopy(model), ids_of(2, 30)
    learner = ttt.Learner(ttt.adapt_(model, plain_config(target_modules=["down_proj"], lr=0.02, chunk=8)))
    first = learner.observe(ids)
    assert (first.learned, first.rejected) == (4, 0)
    seen = learner.observe(ids, learn=False)
    assert float(seen.nll.mean()) < float(first.nll.mean())
    ttt.save(model, tmp_path / "x")
    ttt.load(twin, tmp_path / "x")
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, model(ids).logits)
    forked = ttt.fork(model)
    assert torch.equal(ttt.Learner(forked).observe(ids, learn=False).nll, seen.nll)


def test_files_know_another_quantized_head():
    model = quantized_model("int8", is_head)
    other = copy.deepcopy(model)
    assert base_hash(other, []) == base_hash(model, [])
    other.lm_head.weight.qdata[3, 3] += 1
    assert base_hash(other, []) != base_hash(model, [])
