"""Adapters of PEFT as states of users: `import_peft` with a model gives what the pool and the store take."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_models import gpt2, llama
from transformers import LlamaConfig, LlamaForCausalLM

import ttt

IDS = torch.arange(24).view(1, 24) % 23


def adapter(base, folder, targets=("q_proj", "down_proj"), rank=4):
    """The adapted model, with random factors, which PEFT saved in ``folder``."""
    config = LoraConfig(r=rank, lora_alpha=7, target_modules=list(targets), task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config).eval()
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn_like(p) * 0.2
    model.save_pretrained(folder)
    return model


def for_users(base, targets=("q_proj", "down_proj"), rank=4, window=8):
    config = ttt.TTTConfig(target_modules=list(targets), per_user=ttt.LowRank(slots=3, rank=rank, window=window))
    return ttt.adapt_(copy.deepcopy(base), config)


def logits(model, user=None):
    with torch.no_grad():
        if user is None:
            return model(IDS).logits
        with ttt.users(model, [user]):
            return model(IDS).logits


@pytest.mark.parametrize(("make", "targets"), [(llama, ("q_proj", "down_proj")), (gpt2, ("c_fc", "c_proj"))])
def test_a_user_begins_with_an_adapter_of_peft_and_goes_on_learning(tmp_path, make, targets):
    base = make()
    exact = logits(adapter(base, tmp_path / "lora", targets))
    model = for_users(base, targets)
    assert (exact - logits(model)).abs().max() > 0.05
    pool = ttt.pool_of(model)
    pool.load("alice", ttt.import_peft(tmp_path / "lora", model=model))
    torch.testing.assert_close(logits(model, "alice"), exact, rtol=0, atol=1e-5)
    before = pool.export("alice")
    learner = ttt.Learner(model)
    learner.observe(IDS[:, :7], users=["alice"])
    after = pool.export("alice")
    for name in pool.layers:
        assert torch.equal(after[f"{name}.a"][:4], before[f"{name}.a"])  # learning adds rows to those of the adapter
        assert after[f"{name}.a"].shape[0] == 4 + 6
    learner.observe(IDS.repeat(1, 2), users=["alice"])
    assert all(int(pool.export("alice")[f"{name}.step"]) > 1 for name in pool.layers)
    assert bool(torch.isfinite(logits(model, "alice")).all())


def test_layers_without_an_adapter_begin_with_the_base_model(tmp_path):
    base = llama()
    exact = logits(adapter(base, tmp_path / "lora", ["down_proj"]))
    model = for_users(base)
    state = ttt.import_peft(tmp_path / "lora", model=model)
    ttt.pool_of(model).load("alice", state)
    torch.testing.assert_close(logits(model, "alice"), exact, rtol=0, atol=1e-5)
    assert {t.shape[0] for key, t in state.items() if key.endswith("q_proj.a")} == {0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_a_user_learnt_comes_back_to_the_bit_through_an_adapter_and_the_store(tmp_path, dtype):
    model = for_users(llama().to(dtype))
    pool = ttt.pool_of(model)
    ttt.Learner(model).observe(IDS, users=["alice"])
    held = pool.export("alice")
    if dtype == torch.float64:  # adapters have at most float32
        held |= {key: t.float().double() for key, t in held.items() if key.endswith((".a", ".b"))}
    ttt.export_peft(held, tmp_path / "lora", base_model="tiny/llama")
    with ttt.Store(tmp_path / "store") as store:
        with store.lease("bob") as lease:
            store.put(lease, ttt.import_peft(tmp_path / "lora", model=model))
        pool.load("bob", store.get("bob").tensors)
    back = pool.export("bob")
    for key, t in held.items():
        if key.endswith((".a", ".b")):
            assert back[key].dtype == t.dtype
            assert torch.equal(back[key], t), key


def test_adapters_that_do_not_fit_are_refused_by_name(tmp_path):
    base = llama()
    adapter(base, tmp_path / "lora", rank=13)
    model = for_users(base)
    with pytest.raises(ValueError, match=r"q_proj must be of rank 12 at most \(.*\), got 13 rows"):
        ttt.import_peft(tmp_path / "lora", model=model)
    ttt.import_peft(tmp_path / "lora", model=for_users(base, rank=5))
    with pytest.raises(ValueError, match=r"users of model do not learn in model\.layers\.0\.self_attn\.q_proj; they"):
        ttt.import_peft(tmp_path / "lora", model=for_users(base, ["down_proj"], rank=16))
    other = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"q_proj\.a must have shape \(13, 16\), got \(13, 24\)"):
        ttt.import_peft(tmp_path / "lora", model=for_users(LlamaForCausalLM(other), rank=16))
    with pytest.raises(ValueError, match="rows must be None where model says how many rows its layers have, got 16"):
        ttt.import_peft(tmp_path / "lora", rows=16, model=model)
    with pytest.raises(ValueError, match="one set of weights for all"):
        ttt.import_peft(tmp_path / "lora", model=base)
    with pytest.raises(TypeError, match="model must be"):
        ttt.import_peft(tmp_path / "lora", model="my/model")
    large = for_users(base.half(), rank=16)
    state = ttt.import_peft(tmp_path / "lora")
    ttt.export_peft({key: t * 1e6 for key, t in state.items()}, tmp_path / "large", base_model="tiny/llama")
    with pytest.raises(ValueError, match=r"q_proj\.[ab] must be finite"):
        ttt.import_peft(tmp_path / "large", model=large)


def test_factors_alone_are_refused_with_what_to_do(tmp_path):
    base = llama()
    adapter(base, tmp_path / "lora")
    pool = ttt.pool_of(for_users(base))
    with pytest.raises(ValueError, match=r"got \['a', 'b'\]; ttt.import_peft\(folder, model=model\) makes them all"):
        pool.load("alice", ttt.import_peft(tmp_path / "lora"))
    assert pool.users == ()
