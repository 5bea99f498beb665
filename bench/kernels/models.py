"""The language models of the suites that read or write text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.kernels.case import shared
from bench.kernels.contender import Unavailable
from ttt.demo.language_model import load_language_model
from ttt.demo.model import as_ids, load_model
from ttt.demo.text import stream_of

CONTEXT = 512
SMOLLM = "SmolLM2-135M"
MIXTURE = "mixture 4x256, 4 of 32 experts"
_MIXTURE_TOKENS = 512  # few, so that the head is a small part of the time


def load(name: str, device: str, dtype: str) -> nn.Module:
    """A new copy of a model, in eval mode.

    Args:
        name: "demo": the trained byte-level Llama of `ttt.demo`. "llama LxD": a `LlamaForCausalLM` with random weights,
            L blocks of width D, 64 features per head, an MLP of width 8/3 D and a vocabulary of 32000 tokens.
            `SMOLLM`: SmolLM2-135M-Instruct, with its pretrained weights. `MIXTURE`: a Qwen3-MoE with random weights, 4
            blocks of width 256, each with 32 experts of width 128, of which a token takes 4, and 512 tokens.

    Raises:
        Unavailable: for `SMOLLM`, if its package is not installed.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if name == "demo":
        model: nn.Module = load_model()[0]
    elif name == SMOLLM:
        model = smollm()[0]
    elif name == MIXTURE:
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        sizes = Qwen3MoeConfig(
            vocab_size=_MIXTURE_TOKENS,
            hidden_size=256,
            moe_intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=32,
            num_experts_per_tok=4,
            norm_topk_prob=True,
            max_position_embeddings=CONTEXT,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Qwen3MoeForCausalLM(sizes)
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        layers, width = map(int, name.removeprefix("llama ").split("x"))
        config = LlamaConfig(
            vocab_size=32000,
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            max_position_embeddings=CONTEXT,
            pad_token_id=None,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = LlamaForCausalLM(config)
    return model.to(device=device, dtype=getattr(torch, dtype)).eval()


def tokens(name: str, count: int, device: str, skip: int = 0) -> Tensor:
    """(1, count) int64: English text for trained models, random tokens for the others; the same at each call.

    Args:
        skip: number of tokens at the beginning of the stream to leave out.
    """
    if name == "demo":
        return as_ids(stream_of("english")[skip : skip + count]).to(device)
    if name == SMOLLM:
        return shared((name, "text"), english)[:, skip : skip + count].to(device)
    generator = torch.Generator().manual_seed(7)
    return torch.randint(_MIXTURE_TOKENS if name == MIXTURE else 32000, (1, skip + count), generator=generator)[
        :, skip:
    ].to(device)


def smollm() -> tuple[nn.Module, Any]:
    """SmolLM2 and its tokenizer.

    Raises:
        Unavailable: if its package is not installed.
    """
    try:
        return load_language_model()
    except FileNotFoundError as error:
        raise Unavailable(str(error)) from None


def english() -> Tensor:
    """(1, T) int64: English text as SmolLM2's tokens."""
    return smollm()[1](stream_of("english").decode(), return_tensors="pt", verbose=False).input_ids


def frozen(name: str, device: str, dtype: str) -> nn.Module:
    """The model without learning; all callers share it and must not change it."""
    return shared(("model", name, device, dtype), lambda: load(name, device, dtype).requires_grad_(False))


def parameters_of(model: nn.Module) -> int:
    """Number of parameters that a token is multiplied with: all except the embedding table, unless the head uses it."""
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    tied = table is model.get_output_embeddings().weight  # type: ignore[operator]
    return sum(p.numel() for p in model.parameters()) - (0 if tied else table.numel())
