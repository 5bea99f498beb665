"""Fine-tuning of low-rank weights (LoRA: Hu et al., 2021) on the turns of a chat, with AdamW and PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ttt.demo.questions import padded


def with_lora(model: nn.Module, modules: Sequence[str], rank: int, seed: int) -> Any:
    """``model`` with low-rank weights of ``rank`` at ``modules``, drawn with ``seed``; alpha is twice the rank."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(modules))
    wrapped: Any = model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(wrapped, config).eval()


def fine_tune(model: Any, turns: Sequence[tuple[list[int], list[bool]]], lr: float, steps: int) -> None:
    """Take ``steps`` steps of AdamW on all ``turns`` at once, each tokens and which of them a loss is taken on."""
    device = next(model.parameters()).device
    rows = padded([ids for ids, _ in turns], device)
    wanted = padded([said for _, said in turns], device) != 0
    targets = torch.where(wanted, rows, -100)  # which the loss ignores
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    for _ in range(steps):
        logits = model(input_ids=rows).logits[:, :-1].float()
        loss = functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
