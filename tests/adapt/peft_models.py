"""Tiny models that PEFT adapts, random low-rank states, and adapters loaded by PEFT."""

import copy

import torch
from peft import PeftModel
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

TARGETS = ["gate_proj", "up_proj", "down_proj"]


def llama():
    config = LlamaConfig(
        vocab_size=40, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=64, n_embd=24, n_layer=2, n_head=4)).eval()


def linear_shapes(model):
    return {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def random_state(model, rows, dtype=torch.float32, layers=TARGETS):
    """A user's low-rank state; ``rows`` a number, or a function of the layer's."""
    state = {}
    for number, (name, (m, n)) in enumerate(linear_shapes(model).items()):
        if name.split(".")[-1] in layers:
            count = rows(number) if callable(rows) else rows
            state[f"{name}.a"] = torch.randn(count, n, dtype=torch.float64).mul(0.2).to(dtype)
            state[f"{name}.b"] = torch.randn(count, m, dtype=torch.float64).mul(0.2).to(dtype)
    return state


def with_deltas(model, state):
    """A copy of ``model`` with b^T a added to each layer of ``state``, in float64."""
    model = copy.deepcopy(model)
    for key in state:
        if key.endswith(".a"):
            module = model.get_submodule(key[:-2])
            delta = state[key[:-2] + ".b"].double().T @ state[key].double()
            module.weight.data = (module.weight.data.double() + delta).float()
    return model


def loaded(model, folder):
    return PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()
