"""Models that torchao has quantized, and what their users' layers are compared with."""

import torch
from helpers import plain_config
from tiny_models import tiny
from torch import nn
from torchao.quantization import (
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)

import ttt

KINDS = {
    "int8": Int8WeightOnlyConfig(),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)),
}
USERS = ttt.LowRank(slots=3, rank=4, window=6)


def is_head(module, name):
    return isinstance(module, nn.Linear) and name == "lm_head"


def is_inner(module, name):
    return isinstance(module, nn.Linear) and name != "lm_head"


def quantized_model(kind="int8", which=is_inner, dtype=torch.float32, family="llama"):
    model = tiny(family).to(dtype)
    quantize_(model, KINDS[kind], filter_fn=which)
    return model


def config(**options):
    options = {"target_modules": ["down_proj", "q_proj"], "lr": 0.05, "chunk": 8, "per_user": USERS, **options}
    return plain_config(**options)


def parts(model):
    """Every tensor of which what ``model`` saves consists."""
    found = {}
    for name, t in model.state_dict().items():
        names = t.__tensor_flatten__()[0] if hasattr(t, "__tensor_flatten__") else [""]
        found |= {f"{name}:{part}": (getattr(t, part) if part else t).detach().clone() for part in names}
    return found


def same(before, after):
    return before.keys() == after.keys() and all(torch.equal(t, after[name]) for name, t in before.items())


def dense_twin(layer):
    """The same layer on the dequantized weight."""
    twin = ttt.nn.LowRankLinear.from_weight(
        nn.Parameter(layer.weight.dequantize().double()),
        None if layer.bias is None else nn.Parameter(layer.bias.detach().double()),
        layer.config,
        layer.name,
    )
    for name in ("a", "b", "rows"):
        getattr(twin, name).copy_(getattr(layer, name))
    return twin
