"""The demo model and the configuration it learns with by default."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ttt.config import TTTConfig

WEIGHTS = Path(__file__).parent / "weights"

# Chosen by `python -m ttt.demo.tune`, on text that the demo does not show.
CONFIG = TTTConfig(
    target_modules=["gate_proj", "up_proj", "down_proj"],
    layers="last:2",
    lr=0.02,
    clip=3.0,
    ewc_lambda=0.003,
    replay_rows=4,
    replay_beta=0.1,
)


def load_model() -> tuple[nn.Module, TTTConfig]:
    """(model, its default `TTTConfig`): a byte-level `LlamaForCausalLM` of 4.4 M parameters in float32.

    Its tokens are bytes: ``torch.tensor([list(text.encode())])``. It was trained by ``ttt.demo.pretrain`` on the
    Python standard library; it is not adapted yet.

    Raises:
        ImportError: without transformers (``pip install 'ttt[demo]'``).
    """
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32, local_files_only=True)
    return model.eval(), CONFIG
