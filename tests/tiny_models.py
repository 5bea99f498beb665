"""Tiny random language models of transformers, what adapts them, and how their learning state is compared."""

import torch
from helpers import plain_config
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import ttt
from ttt.adapt.convert import learning_layers

VOCAB = 61


def tiny(family="llama", layers=4, **sizes):
    common = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=layers, n_head=2, n_positions=64, **common))
    else:
        config, cls = (LlamaConfig, LlamaForCausalLM) if family == "llama" else (Qwen2Config, Qwen2ForCausalLM)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, **sizes}
        sizes |= {"num_hidden_layers": layers, "num_key_value_heads": 2, "max_position_embeddings": 64}
        model = cls(config(**sizes, **common))
    with torch.no_grad():  # the usual initialisation is so small that the logits hardly depend on the input
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(5)
    return model.eval()


TARGETS = {"llama": ["down_proj"], "qwen2": ["down_proj", "up_proj"], "gpt2": ["mlp.c_proj"]}


def adapted(family="llama", **options):
    options = {"target_modules": TARGETS[family], "layers": "last:0.5", "lr": 0.01, "chunk": 8, "replay_capacity": 32,
               **options}  # fmt: skip
    model = ttt.adapt_(tiny(family), plain_config(**options))
    return model, ttt.Learner(model)


def ids_of(batch, length):
    return torch.randint(1, VOCAB, (batch, length))


def state_of(model):
    return {f"{n}.{k}": t.clone() for n, layer in learning_layers(model) for k, t in layer.state().items()}


def assert_same(before, after):
    assert before.keys() == after.keys()
    assert [k for k in before if not torch.equal(before[k], after[k])] == []


def assert_users_learn_side_by_side(learner, ids):
    """Two users learn a row of ``ids`` (3, 30) each in four readings; the third row, of no user, scores as before."""
    users = ["a", "b", None]
    first = learner.observe(ids, users=users)
    assert (first.learned, first.rejected) == (8, 0)
    for _ in range(3):
        seen = learner.observe(ids, users=users)
    assert bool((seen.nll[:2].mean(1) < first.nll[:2].mean(1) - 0.05).all())
    assert torch.equal(seen.nll[2], first.nll[2]), "those of no user"
