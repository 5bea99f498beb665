"""The demo model, the configurations it learns with, and its scores in bits per byte."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ttt
from ttt.config import TTTConfig
from ttt.defences import SWITCHES
from ttt.demo.text import training_python
from ttt.learn.huggingface import cache_of, cached

FOLDER_VARIABLE = "TTT_BYTE_MODEL"
WEIGHTS = Path(__file__).parents[2] / "bench" / "learning" / "byte_model"
CONTEXT = 512  # bytes: the longest context that the model was trained with
LN2 = math.log(2)

CONFIG = TTTConfig(target_modules=["gate_proj", "up_proj", "down_proj"], layers="last:2")

# The defences of the commit together. Chosen by `python -m bench.learning.experiments.tune`, on text that the demo does
# not read.
COMBINED = dataclasses.replace(
    CONFIG,
    rate="constant",
    lr=0.04,
    clip=3.0,
    burst=None,
    protect=[ttt.EWC(0.003), ttt.LayerReplay(rows=4, strength=0.1), ttt.OrthogonalUpdates(32)],
)

# For `ttt.GrowingLearner`, which can always go back to the anchor and therefore needs less protection. Chosen by
# `python -m bench.learning --suite text --tune --methods "growing columns"`, on text that no benchmark reports.
COLUMNS = dataclasses.replace(COMBINED, rate="rms", lr=0.08, protect=[ttt.OrthogonalUpdates(32)], replay_capacity=512)

# The names of the demo's methods.
FROZEN, IN_CONTEXT, SGD, EWC, REPLAY = "frozen", "in-context only", "SGD", "EWC", "replay"
ORTHOGONAL, ALL, DEFAULT, GROWING = "orthogonal", "combined", "default", "columns"

# The best settings of a single protection. They are stronger than in COMBINED, and the best rate is lower: see
# `bench.learning.experiments.tune`.
RATE_ALONE, EWC_ALONE, BETA_ALONE, DIRECTIONS_ALONE = 0.02, 0.003, 0.2, 16


def methods(config: TTTConfig) -> dict[str, TTTConfig | None]:
    """The demo's methods: name -> configuration, or None for a method that does not learn.

    `SGD` has no protection and the rate that is best without protection; `ALL` is `COMBINED`; `DEFAULT` is ``config``;
    `GROWING` has a configuration of its own.
    """
    plain: dict[str, Any] = {**SWITCHES, "lr": RATE_ALONE}
    return {
        FROZEN: None,
        IN_CONTEXT: None,
        SGD: COMBINED.with_flat(**plain),
        EWC: COMBINED.with_flat(**{**plain, "ewc_lambda": EWC_ALONE}),
        REPLAY: COMBINED.with_flat(**{**plain, "replay_rows": COMBINED.replay_rows, "replay_beta": BETA_ALONE}),
        ORTHOGONAL: COMBINED.with_flat(**{**plain, "orthogonal": DIRECTIONS_ALONE}),
        ALL: COMBINED,
        DEFAULT: config,
        GROWING: COLUMNS,
    }


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
    """(model, its default `TTTConfig`): a byte-level `LlamaForCausalLM` of 4.4 M parameters in float32, not adapted.

    Its tokens are bytes: ``torch.tensor([list(text.encode())])``. It was trained by
    ``python -m bench.learning.experiments.pretrain`` on the Python standard library.

    Raises:
        FileNotFoundError: the folder of the model is missing (see `model_folder`).
        ImportError: without transformers (the extra ``demo``).
    """
    folder = model_folder()
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), CONFIG


def as_ids(data: bytes) -> Tensor:
    """(1, T) int64: the tokens of ``data``, which are its bytes."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long().view(1, -1)


def windows(data: bytes, count: int) -> Tensor:
    """(count, CONTEXT) int64: evenly spaced windows of ``data``, from its first byte to its last."""
    ids = as_ids(data)[0]
    starts = torch.linspace(0, len(ids) - CONTEXT, count).long()
    return torch.stack([ids[s : s + CONTEXT] for s in starts])


def calibration_batches() -> list[Tensor]:
    """4 batches (16, CONTEXT) of text that the demo model was trained on, for `ttt.Learner.calibrate`."""
    return list(windows(training_python(), 64).split(16))


def new_learner(base: nn.Module, config: TTTConfig, batches: list[Tensor], **options: Any) -> ttt.Learner:
    """A `ttt.Learner` on an adapted copy of ``base``, calibrated on ``batches`` if ``config`` needs that.

    Args:
        options: further arguments of `ttt.Learner`.
    """
    learner = ttt.Learner(ttt.adapt_(copy.deepcopy(base), config), context=CONTEXT, **options)
    if config.calibrates:
        learner.calibrate(batches)
    return learner


@torch.no_grad()
def score(model: Any, ids: Tensor, chunk: int = 64) -> Tensor:
    """(1, T - 1) float32: losses in nats of ``ids`` (1, T), read in chunks with a KV cache, as learners read it."""
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
    """(1, end - start): losses in nats of bytes ``start + 1`` ... ``end`` of ``ids`` (1, T), with a long context.

    A window of `CONTEXT` bytes moves by half its size, so that each byte has a context of at least half of `CONTEXT`
    where the text before it is that long.
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
    """Mean bits per byte of ``rows`` (N, T), each of which is read with an empty context."""
    total = 0.0
    for part in rows.split(8):
        logits = model(input_ids=part).logits[:, :-1].float()
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    return total / LN2 / (rows.shape[0] * (rows.shape[1] - 1))
