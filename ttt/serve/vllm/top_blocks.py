"""The blocks that learn, as a transformers model on vLLM's own weights: `ttt.adapt_` replaces its layers.

`ttt.serve.vllm.blocks` computes with them: learning needs a backward pass, which vLLM's kernels do not have. The blocks
below the lowest that learns are not needed: vLLM has computed them, and their output is captured.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

PACKED = {
    "self_attn.q_proj": ("self_attn.qkv_proj", 0), "self_attn.k_proj": ("self_attn.qkv_proj", 1),
    "self_attn.v_proj": ("self_attn.qkv_proj", 2), "mlp.gate_proj": ("mlp.gate_up_proj", 0),
    "mlp.up_proj": ("mlp.gate_up_proj", 1),
}  # fmt: skip
"""Modules of transformers that are rows of one fused weight in vLLM: its name, and the place among the rows."""


def top_blocks(model: Any, hf_config: Any, first: int) -> nn.Module:
    """The blocks from ``first`` on, the last norm and the head of vLLM's ``model``, sharing its weights.

    Modules have the names of the whole model's, under which errors name them and what was learnt is stored.

    Raises:
        RuntimeError: if vLLM has dropped a weight, or one does not fit.
    """
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = copy.deepcopy(hf_config)
    config.num_hidden_layers, config.tie_word_embeddings = hf_config.num_hidden_layers - first, False
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        top: Any = LlamaForCausalLM(config).to(model.lm_head.weight.dtype).eval()
    top.model.layers = nn.ModuleDict({str(first + index): block for index, block in enumerate(top.model.layers)})
    head = getattr(model.lm_head, "base_layer", model.lm_head).weight
    for name, parameter in list(top.named_parameters()):
        if name == "model.embed_tokens.weight":
            continue
        found = head[: config.vocab_size] if name == "lm_head.weight" else _weight(model, name, config)
        if found.shape != parameter.shape:
            raise RuntimeError(
                f"{name} must have shape {tuple(parameter.shape)}, got {tuple(found.shape)}: vLLM has dropped or "
                "repacked it, and the blocks that learn cannot be computed"
            )
        module, _, attribute = name.rpartition(".")
        setattr(top.get_submodule(module), attribute, nn.Parameter(found.detach(), requires_grad=False))
    top.model.rotary_emb = LlamaRotaryEmbedding(config=config).to(head.device)
    top.model.embed_tokens = nn.Identity()  # lessons begin with captured hidden states
    return top


def _weight(model: Any, name: str, config: Any) -> Tensor:
    """vLLM's tensor for the parameter ``name`` of the top blocks."""
    if not name.startswith("model.layers."):
        return model.get_parameter(name)
    module, _, attribute = name.rpartition(".")
    block, _, inner = module.partition(".self_attn.") if ".self_attn." in module else module.partition(".mlp.")
    kind = "self_attn" if ".self_attn." in module else "mlp"
    fused = PACKED.get(f"{kind}.{inner}") if inner else None
    if fused is None:
        return getattr(_base(model.get_submodule(module)), attribute)
    tensor = getattr(_base(model.get_submodule(f"{block}.{fused[0]}")), attribute)
    return tensor.split(_sizes(config, fused[0]))[fused[1]]


def _base(module: Any) -> Any:
    """``module``, or what vLLM has wrapped for adapters."""
    return getattr(module, "base_layer", module)


def _sizes(config: Any, fused: str) -> list[int]:
    """How many rows of a fused weight each of its parts has."""
    if fused == "mlp.gate_up_proj":
        return 2 * [config.intermediate_size]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [config.num_attention_heads * width, *2 * [config.num_key_value_heads * width]]
