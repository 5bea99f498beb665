"""The language models of the model-level suites."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.kernels.registry import shared

CONTEXT = 512


def load(name: str, device: str, dtype: str) -> nn.Module:
    """A model of its own for the caller, in eval mode.

    Args:
        name: "demo": the trained byte-level Llama of `ttt.demo`. "llama LxD": a `LlamaForCausalLM` with random weights,
            L blocks of width D, 64 features a head, an MLP of 8/3 D and 32000 tokens.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if name == "demo":
        from ttt.demo.model import load_model

        model: nn.Module = load_model()[0]
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
    """(1, count) int64: English text for the demo model, random tokens for the others; the same at each call.

    Args:
        skip: tokens of the same stream to leave out before them.
    """
    if name == "demo":
        from ttt.demo.model import as_ids
        from ttt.demo.text import stream_of

        return as_ids(stream_of("english")[skip : skip + count]).to(device)
    generator = torch.Generator().manual_seed(7)
    return torch.randint(32000, (1, skip + count), generator=generator)[:, skip:].to(device)


def frozen(name: str, device: str, dtype: str) -> nn.Module:
    """The model as it is, shared by all who only read it."""
    return shared(("model", name, device, dtype), lambda: load(name, device, dtype).requires_grad_(False))


def parameters_of(model: nn.Module) -> int:
    """Parameters that a token is multiplied with: all but the embedding table."""
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    tied = table is model.get_output_embeddings().weight  # type: ignore[operator]
    return sum(p.numel() for p in model.parameters()) - (0 if tied else table.numel())
