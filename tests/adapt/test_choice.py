"""Which layers "all-linear" and ``layers`` take of transformers' models, and what is refused as a whole."""

import contextlib
import copy
import io
import warnings

import pytest
import torch
from tiny_models import VOCAB, ids_of, tiny
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import ttt
from ttt.adapt.checkpoint import read_tensors
from ttt.adapt.convert import learning_layers, left_out

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


def llava():
    text = LlamaConfig(**SIZES, num_hidden_layers=4, num_key_value_heads=2, vocab_size=VOCAB)
    vision = CLIPVisionConfig(**SIZES, num_hidden_layers=7, image_size=8, patch_size=4)
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision)).eval()


def names_of(model, **options):
    ttt.adapt_(model, ttt.TTTConfig(**options))
    return [name for name, _ in learning_layers(model)]


def parts(model):
    return {n: id(m) for n, m in model.named_modules()} | {
        n: (id(p), p.requires_grad) for n, p in model.named_parameters()
    }


def refused(model, match, **options):
    before = parts(model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if not p.is_meta}
    with pytest.raises(ValueError, match=match):
        ttt.adapt_(model, ttt.TTTConfig(**options))
    assert parts(model) == before
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in weights.items())
    assert not any(name.startswith("_ttt") for name in vars(model))


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_leaves_out_the_head(tied):
    model = tiny()
    if tied:
        model.lm_head.weight = model.get_input_embeddings().weight
    names = names_of(model, target_modules="all-linear")
    assert len(names) == 4 * 7
    assert not any("lm_head" in name for name in names)
    assert left_out(model) == {"lm_head": "output head"}
    out = io.StringIO()
    found = ttt.info(out, model=model)
    assert found["learning"] == names
    assert "left_out    lm_head: output head" in out.getvalue()
    ttt.restore_(model)
    assert left_out(model) == {}


def test_all_linear_leaves_out_classifiers_and_pooled_heads():
    model = BertForSequenceClassification(BertConfig(**SIZES, num_hidden_layers=2, vocab_size=VOCAB, num_labels=3))
    names = names_of(model, target_modules="all-linear")
    assert "bert.pooler.dense" in names
    assert left_out(model) == {"classifier": "head outside of the model's body, as a classifier"}


def test_all_linear_leaves_out_routers_unfit_classes_and_experts_and_warns():
    class Quantized(nn.Linear):
        pass

    class Moe(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = nn.Linear(6, 4), nn.Linear(6, 6)
            self.experts = nn.ParameterDict({"stack": nn.Parameter(torch.zeros(4, 5, 6))})
            self.shared_expert_gate, self.odd = nn.Linear(6, 1), Quantized(6, 6)

    model = nn.Sequential(Moe(), nn.Linear(6, 6))
    with pytest.warns(
        UserWarning, match=r"leaves out 0\.odd \(.*Quantized; only .*0\.experts\.stack \(a stack of experts"
    ):
        assert names_of(model, target_modules="all-linear") == ["0.up", "1"]
    found = left_out(model)
    assert list(found) == ["0.gate", "0.shared_expert_gate", "0.odd", "0.experts.stack"]
    assert found["0.gate"] == found["0.shared_expert_gate"] == "router of experts"


def test_all_linear_leaves_out_loras_own_layers_and_names_are_as_without_peft(tmp_path):
    import peft

    base = tiny()
    wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["down_proj"], r=3))
    found = [name for name in names_of(wrapped, target_modules="all-linear") if "lora" in name]
    assert found == []
    assert {why for name, why in left_out(wrapped).items() if "lora_" in name} == {"part of an adapter"}
    wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["down_proj"], r=3)).eval()
    config = ttt.TTTConfig(target_modules=["down_proj"], layers="last:2", protect=[], lr=0.05)
    ttt.adapt_(wrapped, config)
    plain = ttt.adapt_(copy.deepcopy(base), config)
    ids = ids_of(2, 24)
    assert torch.equal(ttt.Learner(wrapped).observe(ids).nll, ttt.Learner(plain).observe(ids).nll)
    for model, folder in ((wrapped, "one"), (plain, "two")):
        ttt.export_peft(model, tmp_path / folder, base_model="base")
    one, two = (ttt.import_peft(tmp_path / folder) for folder in ("one", "two"))
    assert one.keys() == two.keys()
    assert sorted({key.rpartition(".")[0] for key in one}) == [f"model.layers.{i}.mlp.down_proj" for i in (2, 3)]


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("compiled", [False, True])
def test_models_of_peft_are_read_chunk_by_chunk_whatever_their_task(task_type, compiled):
    import peft

    base, ids = tiny(layers=2), ids_of(2, 24)
    config = ttt.TTTConfig(target_modules=["down_proj"], layers="last:1", protect=[], lr=0.05, chunk=7)
    lora = peft.LoraConfig(target_modules=["q_proj"], r=3, task_type=task_type)
    wrapped = peft.get_peft_model(copy.deepcopy(base), lora).eval()  # LoRA begins as zeros
    wrapped = torch.compile(wrapped, backend="eager") if compiled else wrapped
    ttt.adapt_(wrapped, config)
    plain = ttt.adapt_(copy.deepcopy(base), config)
    for _ in range(2):
        found, wanted = (ttt.Learner(model).observe(ids) for model in (wrapped, plain))
        assert (found.learned, found.rejected) == (wanted.learned, 0)
        torch.testing.assert_close(found.nll, wanted.nll)


def test_files_of_compiled_models_load_into_plain_ones_and_the_other_way_round(tmp_path):
    base = tiny()
    config = ttt.TTTConfig(target_modules=["down_proj"], layers="last:2", protect=[], lr=0.05)
    ids, found = ids_of(2, 24), []
    for wraps in (False, True):
        model = copy.deepcopy(base)
        whole = torch.compile(model, backend="eager") if wraps else model
        assert ttt.adapt_(whole, config) is whole
        found.append(ttt.Learner(model).observe(ids).nll)
        ttt.save(whole, tmp_path / f"{wraps}")
    assert torch.equal(*found)  # the seeds of the layers come from their names
    for wraps in (False, True):
        model = copy.deepcopy(base)
        ttt.load(model if wraps else torch.compile(model, backend="eager"), tmp_path / f"{wraps}")
        ttt.save(model, tmp_path / "again")
        one, two = (read_tensors(tmp_path / name)[0] for name in ("again", "True"))
        assert one.keys() == two.keys()
        assert all(torch.equal(t, two[key]) for key, t in one.items())
        ttt.restore_(model if wraps else torch.compile(model, backend="eager"))
        assert all(type(m).__module__ != "ttt.nn.linear" for m in model.modules())


def test_layers_are_counted_in_each_stack_and_meant_for_the_language_model():
    prefix = "model.language_model.layers"
    targets = ["q_proj"]
    assert names_of(llava(), target_modules=targets, layers="last:0.25") == [f"{prefix}.3.self_attn.q_proj"]
    assert names_of(llava(), target_modules=targets, layers=[0, -1]) == [
        f"{prefix}.{i}.self_attn.q_proj" for i in (0, 3)
    ]
    both = names_of(llava(), target_modules=targets, layers={"language_model": "last:1", "vision_tower": "last:0.25"})
    assert [name.rsplit(".", 3)[1] for name in both] == ["5", "6", "3"]
    assert sum("vision_tower" in name for name in both) == 2
    every = names_of(llava(), target_modules="all-linear")
    assert len(every) == 4 * 7
    assert all(name.startswith(prefix) for name in every)
    assert len(names_of(llava(), target_modules=targets)) == 11  # named, and so taken everywhere
    match = r"layers names 'audio', but the matched layers are in \['model.vision_tower"
    refused(llava(), match, target_modules=targets, layers={"audio": "last:1"})
    match = r"layers = 'last:1' is meant for the language model, but target_modules match in \['model.vision_tower"
    refused(llava(), match, target_modules=["fc1"], layers="last:1")
    model = T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=4, num_decoder_layers=6, num_heads=2, vocab_size=VOCAB)
    )
    assert names_of(model, target_modules=["wo"], layers="last:0.25") == [
        "encoder.block.3.layer.1.DenseReluDense.wo", *(f"decoder.block.{i}.layer.2.DenseReluDense.wo" for i in (4, 5))
    ]  # fmt: skip


def test_a_dictionary_of_layers_is_frozen_and_saved(tmp_path):
    config = ttt.TTTConfig(target_modules=["q_proj"], layers={"language_model": [0], "vision_tower": "last:1"})
    assert hash(config) == hash(ttt.TTTConfig.from_dict(config.to_dict()))
    assert copy.deepcopy(config) == config
    with pytest.raises(TypeError, match="cannot be changed"):
        config.layers["x"] = "all"
    for wrong in ({}, {"a": 3}, {1: "all"}, {"a": {"b": "all"}}, {"a": "first"}):
        with pytest.raises(ValueError, match=r"layers.* must be "):
            ttt.TTTConfig(layers=wrong)
    model = llava()
    other = copy.deepcopy(model)
    ttt.adapt_(model, config)
    ttt.save(model, tmp_path / "x")
    ttt.load(other, tmp_path / "x")
    assert [n for n, _ in learning_layers(other)] == [n for n, _ in learning_layers(model)]


def test_every_entry_must_match():
    refused(tiny(), r"'upproj' matches no linear layer; the nearest names are .*up_proj",
            target_modules=["down_proj", "upproj"])  # fmt: skip
    refused(tiny(), "target_modules.* matches no linear layer", target_modules=[])
    refused(tiny(), r"a regular expression for a layer's whole name: \['down_proj'\] means all that end so",
            target_modules="down_proj")  # fmt: skip


def test_one_unfit_layer_refuses_all_and_changes_nothing():
    model = tiny()
    down = model.model.layers[3].mlp.down_proj
    down.weight = nn.Parameter(down.weight.detach().T.contiguous().T)
    refused(model, r"layers\.3\.mlp\.down_proj\.weight must be contiguous", target_modules=["down_proj"])
    model = tiny()
    model.model.layers[2].mlp.down_proj.to("meta")
    refused(model, r"down_proj\.weight is on the meta device.*device_map", target_modules=["down_proj"])


def test_parameters_that_share_memory_are_refused():
    held = torch.randn(5 * 6 + 12)
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(6, 3, bias=False))
    model[0].weight = nn.Parameter(held[:24].view(4, 6))
    model[1].weight = nn.Parameter(held[18:36].view(3, 6))
    refused(model, r"0\.weight shares its memory with \['1\.weight'\]", target_modules=["0"])
    model[1].weight = nn.Parameter(held[24:].view(3, 6))  # beside, not within
    assert names_of(model, target_modules=["0"]) == ["0"]


def test_data_parallel_wrappers_are_refused(tmp_path):
    import torch.distributed as dist

    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
    refused(nn.DataParallel(model), "model is a DataParallel, which is not supported", target_modules=["0"])
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        refused(
            nn.parallel.DistributedDataParallel(model), "replicas would .* drift apart", target_modules=["module.0"]
        )
        ttt.adapt_(model, ttt.TTTConfig(target_modules=["0"], protect=[]))
        for p in model[1].parameters():
            p.requires_grad_(True)
        wrapped = nn.parallel.DistributedDataParallel(model)
        before = {key: t.clone() for key, t in model[0].state().items()}
        with pytest.raises(ValueError, match="is a DistributedDataParallel"), ttt.learning(wrapped):
            pass
        with pytest.raises(RuntimeError, match="inside of a DistributedDataParallel"), ttt.learning(model):
            wrapped(torch.randn(3, 6)).sum().backward()
        assert all(torch.equal(t, before[key]) for key, t in model[0].state().items())
        with torch.no_grad():
            assert wrapped(torch.randn(3, 6)).shape == (3, 4)  # computing is right
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("before", [True, False])
def test_offloaded_weights_are_refused(before):
    from accelerate import cpu_offload

    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    config = ttt.TTTConfig(target_modules=["0", "2"], protect=[])
    if before:
        cpu_offload(model, torch.device("cpu"))
        with pytest.raises(ValueError, match=r"0 has a hook that keeps its weight elsewhere"):
            ttt.adapt_(model, config)
        return
    ttt.adapt_(model, config)
    x = torch.randn(3, 6)
    want = model(x)
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"0\.?.* on the meta device.*offload"), ttt.learning(model):
        model(x).sum().backward()
    assert torch.equal(model(x), want)
    assert all(layer.pending == 0 for _, layer in learning_layers(model))


@pytest.mark.parametrize("adapt", ["linear1", "linear2"])
@pytest.mark.parametrize("users", [None, ttt.LowRank(slots=2)])
def test_transformer_encoders_compute_with_what_was_learnt(adapt, users):
    block = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(block, 3)).eval()
    before = copy.deepcopy(model)
    config = ttt.TTTConfig(target_modules=rf".*layers\.2\.{adapt}", per_user=users, protect=[], rate="constant", lr=0.1)
    ttt.adapt_(model, config)
    x, mask = torch.randn(2, 7, 16), torch.arange(7) >= torch.tensor([[5], [7]])
    if users is None:
        with ttt.learning(model):
            (model(x) * torch.randn(2, 7, 16)).sum().backward()
        changed = model.get_submodule(f"0.layers.2.{adapt}").effective_weight()
        block = contextlib.nullcontext()
    else:
        layer = next(iter(ttt.pool_of(model).layers.values()))
        slot = ttt.pool_of(model).open("a")
        layer.a[slot, 0], layer.b[slot, 0] = torch.randn(layer.in_features), torch.randn(layer.out_features)
        layer.rows[slot] = 1
        changed, block = layer.effective_weight(slot), ttt.users(model, ["a", "a"])
    reference = copy.deepcopy(before)
    reference.get_submodule(f"0.layers.2.{adapt}").weight.data.copy_(changed)
    with torch.no_grad(), block, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of nested tensors
        for options in ({}, {"src_key_padding_mask": mask}):
            want, found, base = (m[0](x, **options) for m in (reference, model, before))
            keep = ~mask if options else torch.ones_like(mask)
            torch.testing.assert_close(found[keep], want[keep], rtol=1e-4, atol=1e-4)
            assert not torch.allclose(found[keep], base[keep], rtol=1e-3, atol=1e-3)
    ttt.restore_(model)
    assert [vars(m).get("activation_relu_or_gelu") for m in model.modules()] == [
        vars(m).get("activation_relu_or_gelu") for m in before.modules()
    ]
    assert model[0].use_nested_tensor == before[0].use_nested_tensor


def test_the_projection_inside_of_attention_is_refused():
    block = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    refused(nn.Sequential(block), "NonDynamicallyQuantizableLinear; only", target_modules=["out_proj"])
