"""The demo model, the configuration it learns with by default, and how it is measured."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttt.config import TTTConfig
from ttt.learn.huggingface import cache_of, cached

FOLDER_VARIABLE = "TTT_BYTE_MODEL"
WEIGHTS = Path(__file__).parents[2] / "bench" / "learning" / "byte_model"
CONTEXT = 512  # bytes the model was trained to look back
LN2 = math.log(2)

# Chosen by `python -m bench.learning.experiments.tune`, on text that the demo does not show.
CONFIG = TTTConfig(
    target_modules=["gate_proj", "up_proj", "down_proj"],
    layers="last:2",
    rate="constant",
    lr=0.04,
    clip=3.0,
    burst=None,
    ewc_lambda=0.003,
    replay_rows=4,
    replay_beta=0.1,
    orthogonal=32,
)

# Inside `ttt.GrowingLearner`, where the anchor is always at hand, less protection gains more: chosen by
# `python -m bench.learning --suite text --tune --methods "growing columns"`, on text that no benchmark reports.
COLUMNS = dataclasses.replace(
    CONFIG, rate="rms", lr=0.08, ewc_lambda=0.0, replay_rows=0, replay_capacity=512, orthogonal=32
)


def model_folder() -> Path:
    """The folder of the byte-level model: the one that ``TTT_BYTE_MODEL`` names, else the one in the repository.

    Raises:
        FileNotFoundError: it does not hold ``config.json`` and ``model.safetensors``. The model is not part of the
            installed package.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    folder = Path(named) if named else WEIGHTS
    missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
    if not missing:
        return folder
    what = f"the byte-level model is missing: {folder} has no {' and no '.join(missing)}"
    if named:
        raise FileNotFoundError(f"{what}; {FOLDER_VARIABLE} must name the folder that holds them")
    raise FileNotFoundError(
        f"{what}. The model is in the repository of ttt, not in the installed package: install ttt from a clone "
        f"(pip install --editable .), or set {FOLDER_VARIABLE} to a copy of the clone's bench/learning/byte_model"
    )


def load_model() -> tuple[nn.Module, TTTConfig]:
    """(model, its default `TTTConfig`): a byte-level `LlamaForCausalLM` of 4.4 M parameters in float32.

    Its tokens are bytes: ``torch.tensor([list(text.encode())])``. It was trained by
    ``python -m bench.learning.experiments.pretrain`` on the Python standard library; it is not adapted yet.

    Raises:
        FileNotFoundError: the folder of the model is missing (see `model_folder`).
        ImportError: without transformers (``pip install 'ttt[demo]'``).
    """
    folder = model_folder()
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), CONFIG


def as_ids(data: bytes) -> Tensor:
    """(1, T) int64: the bytes themselves are the tokens."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long().view(1, -1)


def windows(data: bytes, count: int) -> Tensor:
    """(count, CONTEXT) int64: evenly spaced windows."""
    ids = as_ids(data)[0]
    starts = torch.linspace(0, len(ids) - CONTEXT, count).long()
    return torch.stack([ids[s : s + CONTEXT] for s in starts])


@torch.no_grad()
def score(model: Any, ids: Tensor, chunk: int = 64) -> Tensor:
    """(1, T - 1) float32, nats, of ``ids`` (1, T), read as the learners do: in chunks, with a KV cache."""
    cache, out = None, []
    length = ids.shape[1] - 1
    for at in range(0, length, chunk):
        end = min(at + chunk, length)
        step = model(input_ids=ids[:, at:end], **cached(model, cache))
        cache = cache_of(step)
        targets = ids[:, at + 1 : end + 1].flatten()
        out.append(nn.functional.cross_entropy(step.logits[0].float(), targets, reduction="none"))
    return torch.cat(out).view(1, -1)


def score_in_context(model: Any, ids: Tensor, start: int, end: int) -> Tensor:
    """(1, end - start) nats of bytes ``start + 1`` ... ``end`` of ``ids`` (1, T), within the longest context there is.

    It is `CONTEXT`, in two halves: every byte has at least half of it before it, if the text has.
    """
    half = CONTEXT // 2
    parts = []
    for at in range(start, end, half):
        new = min(half, end - at)
        first = max(0, at + new - CONTEXT)
        parts.append(score(model, ids[:, first : at + new + 1])[:, -new:])
    return torch.cat(parts, 1)


@torch.no_grad()
def bits_per_byte(model: nn.Module, rows: Tensor) -> float:
    """Mean bits per byte of ``rows`` (N, T)."""
    total = 0.0
    for part in rows.split(8):
        logits = model(input_ids=part).logits[:, :-1].float()
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    return total / LN2 / (rows.shape[0] * (rows.shape[1] - 1))
