"""Stacks of experts that learn, against autograd's gradients of the original stacks and per-token steps in float64."""

import copy
import warnings

import peft
import pytest
import safetensors.torch
import torch
import transformers
from helpers import plain_config
from tiny_models import VOCAB, assert_same, ids_of, state_of
from torch import nn

import ttt
from ttt.adapt.convert import learning_layers, left_out
from ttt.nn.experts import LearningExperts, is_stack
from ttt.ops import backends

COMMON = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
          "num_experts_per_tok": 2}  # fmt: skip
FAMILIES = {
    "Mixtral": {"intermediate_size": 24, "num_local_experts": 4},
    "Qwen3Moe": {"intermediate_size": 24, "moe_intermediate_size": 16, "num_experts": 4, "head_dim": 8},
    "Olmoe": {"intermediate_size": 24, "num_experts": 4},
}


def mixture(family="Mixtral", dtype=torch.float32):
    config = getattr(transformers, f"{family}Config")(**COMMON, **FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # others have no kernels for it
    return model.to(dtype)


def config(**options):
    return plain_config(**{"target_modules": ["experts"], "lr": 0.01, "chunk": 8, "window": 4, **options})


def loss_of(model, ids):
    logits = model(ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten(), reduction="sum")


def stacks(model):
    return {name: p for name, p in model.named_parameters() if p.ndim == 3}


def layer_of(model, name, expert):
    return model.get_submodule(f"{name}.{expert}")


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_the_original_computes(family):
    model = mixture(family)
    plain, ids = copy.deepcopy(model), ids_of(3, 11)
    experts = model.model.layers[1].mlp.experts
    assert is_stack(experts)
    memory = experts.down_proj.data_ptr()
    ttt.adapt_(model, config())
    mine = model.model.layers[1].mlp.experts
    assert isinstance(mine, LearningExperts)
    assert mine.down_proj[0].weight.data_ptr() == memory, "no copy is made"
    assert len(learning_layers(model)) == 2 * 2 * 4
    with torch.no_grad():
        found, wanted = model(ids).logits, plain(ids).logits
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()  # the order of sums differs
    found, wanted = model.state_dict(), plain.state_dict()
    assert set(found) == set(wanted)
    assert all(torch.equal(t, found[name]) for name, t in wanted.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("window", [1, 64])
def test_a_step_is_the_gradient_step_on_each_expert(family, window):
    model = mixture(family, torch.float64)
    plain, ids = copy.deepcopy(model), ids_of(2, 9)
    plain.requires_grad_(True)
    loss_of(plain, ids).backward()
    ttt.adapt_(model, config(lr=0.01, window=window))
    with ttt.learning(model):
        loss_of(model, ids).backward()
    assert len(stacks(plain)) == 4
    for name, parameter in stacks(plain).items():
        for e in range(4):
            wanted = parameter.detach()[e] - 0.01 * parameter.grad[e]
            torch.testing.assert_close(layer_of(model, name, e).effective_weight(), wanted, rtol=1e-8, atol=1e-10)


def test_each_expert_is_read_and_learnt_by_the_kernels_in_the_memory_of_the_stack():
    model = mixture("Qwen3Moe")
    stack = model.model.layers[1].mlp.experts.down_proj
    before = stack.detach().clone()
    options = ttt.TTTConfig(["experts"], protect=[ttt.KroneckerFisher(), ttt.EWC(0.01)], chunk=8, window=4)
    learner = ttt.Learner(ttt.adapt_(model, options))
    learner.calibrate([ids_of(4, 40)])
    backends.calls.clear()
    learner.observe(ids_of(2, 60))
    plain = "cpu" in backends.unavailable
    ran = {(op, backend) for op, backend, _ in backends.calls if op in backends.OPS}
    assert {backend for _, backend in ran} == ({"reference"} if plain else {"cpu"})
    assert {"project_out", "commit"} <= {op for op, _ in ran}
    together = {(op, backend) for op, backend, _ in backends.calls if op in backends.MANY}
    assert together == {(op, backends.ONE_BY_ONE if plain else "cpu") for op in backends.MANY}
    for e, layer in enumerate(model.model.layers[1].mlp.experts.down_proj):
        assert layer.weight.data_ptr() == stack[e].data_ptr()
        assert torch.equal(layer.weight, stack[e])
    assert not torch.equal(stack, before)


def test_tokens_enter_the_windows_of_the_experts_that_they_are_routed_to():
    model = mixture()
    ttt.adapt_(model, config(window=64))
    gate, seen = model.model.layers[1].mlp.gate, []
    handle = gate.register_forward_hook(lambda module, args, out: seen.append((args[0].detach(), out[2])))
    with ttt.learning(model):
        loss_of(model, ids_of(2, 9)).backward()
    handle.remove()
    ((x, chosen),) = seen
    for e, layer in enumerate(model.model.layers[1].mlp.experts.gate_up_proj):
        tokens = (chosen == e).any(1)
        assert layer.pending == int(tokens.sum())
        torch.testing.assert_close(layer.win_x[: layer.pending], x.view(-1, 32)[tokens])


@pytest.mark.parametrize("masked", ["padding", "learn_mask"])
def test_masks_are_those_of_the_tokens_routed(masked):
    """Rows at which no token that teaches is predicted enter no window, whichever experts they go to."""
    model = mixture(dtype=torch.float64)
    plain, ids = copy.deepcopy(model), ids_of(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, 4] = masked == "padding"
    learner = ttt.Learner(ttt.adapt_(model, config(chunk=16, window=64)))
    if masked == "padding":
        learner.observe(ids, attention_mask=mask)
    else:
        learner.observe(ids, learn_mask=mask)
    columns = mask[:, 1:].bool()
    columns = (columns & mask[:, :-1].bool() if masked == "padding" else columns).flatten()
    inputs = {"input_ids": ids[:, :-1]}
    if masked == "padding":
        inputs |= {"attention_mask": mask[:, :-1], "position_ids": (mask[:, :-1].cumsum(1) - 1).clamp_min(0)}
    seen = []
    for block in plain.model.layers:
        block.mlp.gate.register_forward_hook(lambda module, args, out: seen.append((args[0].view(-1, 32), out[2])))
    with torch.no_grad():
        plain(**inputs)
    for block, (x, chosen) in zip(model.model.layers, seen, strict=True):
        experts = block.mlp.experts
        assert sum(layer.pending for layer in experts.down_proj) == 2 * int(columns.sum())
        for e, (up, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
            tokens = (chosen == e).any(1) & columns
            assert up.pending == down.pending == int(tokens.sum())
            torch.testing.assert_close(up.win_x[: up.pending], x[tokens], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("protect", [[], [ttt.KroneckerFisher(directions=3)], [ttt.EWC(0.01), ttt.LayerReplay(rows=2)]])
def test_a_learner_learns_saves_loads_rolls_back_and_restores(protect, tmp_path):
    model = mixture("Qwen3Moe")
    plain, ids = copy.deepcopy(model), ids_of(2, 30)
    options = ttt.TTTConfig(["experts", "q_proj"], protect=protect, lr=0.1, chunk=8, window=4, replay_capacity=32)
    learner = ttt.Learner(ttt.adapt_(model, options))
    learner.calibrate([ids_of(1, 4)])  # some experts see no token of it
    base = state_of(model)
    snapshot, first = learner.snapshot(), learner.observe(ids)
    assert (first.learned, first.rejected) == (4, 0)
    for _ in range(2):
        seen = learner.observe(ids)
    assert float(seen.nll.mean()) < float(first.nll.mean()) - 0.1
    learner.consolidate()
    state = state_of(model)
    assert all(bool(t.isfinite().all()) for t in state.values())
    ttt.save(model, tmp_path / "x")
    with pytest.raises(ValueError, match=r"holds what experts learnt; adapt the model with the same target_modules"):
        ttt.load(copy.deepcopy(plain), tmp_path / "x")
    other = ttt.load(ttt.adapt_(copy.deepcopy(plain), options), tmp_path / "x")
    assert_same(state, state_of(other))
    forked = ttt.fork(model)
    ttt.Learner(forked).observe(ids)
    assert_same(state, state_of(model))
    learner.rollback(snapshot)
    assert_same(base, state_of(model))
    for each in (forked, other, model):
        ttt.restore_(each)
        found = each.state_dict()
        assert all(torch.equal(t, found[name]) for name, t in plain.state_dict().items())
        assert set(found) == set(plain.state_dict())
        assert type(each.model.layers[0].mlp.experts) is type(plain.model.layers[0].mlp.experts)


def test_what_was_learnt_can_be_kept_in_the_stacks_and_written_as_the_model_is():
    model = mixture()
    ids = ids_of(2, 20)
    learner = ttt.Learner(ttt.adapt_(model, config()))
    learner.observe(ids)
    learner.flush()
    loaded = mixture()
    loaded.load_state_dict(model.state_dict())
    wanted = learner.observe(ids, learn=False).nll
    names = list(model.state_dict())
    ttt.restore_(model, keep_learned=True)
    assert set(model.state_dict()) == set(names)
    for each in (model, loaded):
        again = ttt.Learner(ttt.adapt_(each, config()))
        torch.testing.assert_close(again.observe(ids, learn=False).nll, wanted, rtol=1e-4, atol=1e-4)
    ttt.Learner(model).observe(ids)
    model.load_state_dict(loaded.state_dict())
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj[2].anchor, loaded.state_dict()[
        "model.layers.0.mlp.experts.down_proj"][2])  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [["experts"], ["experts", "q_proj"]])
def test_peft_computes_what_was_learnt(family, targets, tmp_path):
    model = mixture(family)
    plain, ids = copy.deepcopy(model), ids_of(2, 30)
    learner = ttt.Learner(ttt.adapt_(model, config(target_modules=targets, lr=0.05)))
    learner.observe(ids)  # some rows are in the window
    with torch.no_grad():
        wanted, before = model(ids).logits, plain(ids).logits
    found = ttt.export_peft(model, tmp_path / "adapter", base_model="x", rank=32)
    assert found.error < 1e-6
    assert set(found.errors) == {name for name, _ in learning_layers(model)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of keys that are missing or that it does not know
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        outputs = loaded(ids).logits
    torch.testing.assert_close(outputs, wanted, rtol=1e-3, atol=1e-3)
    assert float((outputs - before).abs().max()) > 0.1
    merged = loaded.merge_and_unload().state_dict()
    for name, layer in learning_layers(model):
        stack, _, expert = name.rpartition(".")
        weight = merged[stack][int(expert)] if layer.routed else merged[f"{name}.weight"]
        torch.testing.assert_close(weight, layer.effective_weight(), rtol=1e-4, atol=1e-5)


def test_an_adapter_of_smaller_rank_is_the_nearest_for_each_expert(tmp_path):
    model = mixture("Mixtral")
    ttt.Learner(ttt.adapt_(model, config(lr=0.05))).observe(ids_of(4, 40))
    with pytest.warns(UserWarning, match="lost"):
        found = ttt.export_peft(model, tmp_path / "adapter", base_model="x", rank=8, dtype=torch.float32)
    tensors = safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, layer in learning_layers(model):
        module, stack, expert = name.rsplit(".", 2)
        key = f"base_model.model.{module}{'.base_layer' if stack == 'gate_up_proj' else ''}.lora_"
        a = tensors[f"{key}A.weight"].view(4, 8, -1)[int(expert)].double()
        b = tensors[f"{key}B.weight"].view(-1, 8, 4)[..., int(expert)].double()
        delta = layer.effective_weight().double() - layer.base_weight.double()
        values = torch.linalg.svdvals(delta)
        lost = float((delta - b @ a).norm())
        assert lost == pytest.approx(float(values[8:].norm()), rel=1e-4, abs=1e-7)
        assert found.errors[name] == pytest.approx(lost / float(delta.norm()), rel=1e-6)


def test_experts_beside_a_conv1d_are_not_exported(tmp_path):
    model = mixture()
    model.extra = transformers.pytorch_utils.Conv1D(32, 32)
    ttt.adapt_(model, config(target_modules=["experts", "extra"]))
    with pytest.raises(
        ValueError, match=r"experts and transformers' Conv1D layers that learnt, which no one adapter holds"
    ):
        ttt.export_peft(model, tmp_path / "adapter", base_model="x")
    assert not (tmp_path / "adapter").exists()


def test_a_converted_model_is_restored_in_its_new_dtype():
    model = mixture()
    plain = copy.deepcopy(model)
    ttt.adapt_(model, config()).to(torch.bfloat16)
    assert ttt.Learner(model).observe(ids_of(1, 20)).rejected == 0
    found = ttt.restore_(model).state_dict()
    assert all(torch.equal(t, found[n]) for n, t in plain.to(torch.bfloat16).state_dict().items())


def test_the_share_of_a_step_counts_the_matrices_that_a_token_passes_through():
    model = ttt.adapt_(mixture(), config(target_modules=["experts", "q_proj"]))
    assert {layer.share for _, layer in learning_layers(model)} == {1 / (2 * (2 * 2) + 2)}


def test_what_cannot_be_is_refused_by_name_and_nothing_changes():
    model = mixture()
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    with pytest.raises(ValueError, match=r"experts is a stack of experts: users cannot learn in it"):
        ttt.adapt_(model, config(per_user=ttt.LowRank(slots=2)))
    with pytest.raises(ValueError, match=r"gate_up_proj is a stack of experts of shape.*name '\S+experts'"):
        ttt.adapt_(model, config(target_modules=["gate_up_proj"]))
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in before.items())
    with pytest.warns(UserWarning, match=r"is adapted if target_modules names 'experts'"):
        ttt.adapt_(model, config(target_modules="all-linear"))
    assert not any("experts" in name for name, _ in learning_layers(model))
    assert "model.layers.0.mlp.experts.down_proj" in left_out(model)
    ttt.restore_(model)
    learner = ttt.Learner(ttt.adapt_(model, config()))
    with pytest.raises(ValueError, match=r"gate_up_proj\.0 is part of an expert"):
        ttt.capturable_(model, 8)
    with pytest.raises(ValueError, match=r"learner must have no experts of a mixture"):
        ttt.GrowingLearner(learner)
    assert learner.observe(ids_of(1, 9)).rejected == 0


def test_experts_that_compute_something_else_are_refused():
    model = mixture()
    experts = model.model.layers[0].mlp.experts
    forward = experts.forward
    for other in (lambda *args: 1.5 * forward(*args), lambda *args: forward(*args).clamp(-30, 30)):
        experts.forward = other
        with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts \(MixtralExperts\) .* computes something else"):
            ttt.adapt_(model, config())
        assert experts is model.model.layers[0].mlp.experts
    del experts.forward
    ttt.adapt_(model, config())


def test_experts_that_cannot_compute_are_refused_with_their_own_error():
    model = mixture()
    experts = model.model.layers[0].mlp.experts

    def fails(*args):
        raise RuntimeError("no product of such numbers")

    experts.forward = fails
    with pytest.raises(
        ValueError, match=r"MixtralExperts\) .* cannot be tried \(no product of such numbers\), so it ca"
    ):
        ttt.adapt_(model, config())
    assert experts is model.model.layers[0].mlp.experts


def test_experts_of_another_form_are_left_out():
    settings = {**COMMON, "num_local_experts": 4, "intermediate_size": 24, "head_dim": 8}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**settings, layer_types=["full_attention"] * 2))
    with pytest.raises(ValueError, match=r"experts holds 3-D expert parameters; only"):
        ttt.adapt_(model, config())
    with pytest.warns(UserWarning, match=r"a stack of experts of shape \(4, 32, 48\), which cannot be adapted"):
        ttt.adapt_(model, config(target_modules="all-linear"))
