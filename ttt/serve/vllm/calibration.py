"""What is measured of the base model before anyone learns, once for each model: in a file."""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import ttt
from ttt.config import TTTConfig
from ttt.files import write_atomically
from ttt.per_user.pool import Pool

SHARED = ("importance_m", "importance_n", "memory", "seen", "basis", "output_basis", "calibrated")
"""Buffers of `ttt.nn.LowRankLinear` that are measured by `ttt.Learner.calibrate`."""
log = logging.getLogger("vllm.ttt")


def calibrate(pool: Pool, config: TTTConfig, model: Any, path: str) -> str:
    """Give the layers of ``pool`` what calibration measures, from a file; where there is none, measure and write it.

    Measuring loads the model once more, with transformers on the CPU, and lets it write text; it is freed again.

    Args:
        pool: of the top blocks; its layers have the names of the whole model's modules.
        config: of its layers.
        model: vLLM's ``ModelConfig``.
        path: of the file; "" for one in ``~/.cache/ttt``, named by a digest of the model.

    Returns:
        A short name of the model's weights: users of another model are refused.

    Raises:
        ValueError: if the file is of another model or configuration.
    """
    digest = _digest(pool, config)
    file = Path(path) if path else Path.home() / ".cache" / "ttt" / f"calibration-{digest[:16]}.safetensors"
    if not file.exists():
        began = time.perf_counter()
        log.info("measuring what must not be forgotten, into %s", file)
        found = _measured(pool, config, model)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, safetensors.torch.save(found, {"digest": digest}))
        log.info("measured in %.0f s", time.perf_counter() - began)
    with safetensors.safe_open(file, "pt") as held:
        if (held.metadata() or {}).get("digest") != digest:
            raise ValueError(f"{file} must be the calibration of this model and configuration, got that of another")
        for name, layer in pool.layers.items():
            for buffer in SHARED:
                if (t := getattr(layer, buffer)) is not None:
                    t.copy_(held.get_tensor(f"{name}.{buffer}"))
    return _weights_digest(pool)[:16]


def _digest(pool: Pool, config: TTTConfig) -> str:
    """Of what is measured: the configuration, without sizes and speeds of learning, and the weights that learn."""
    measured = {name: value for name, value in config.to_dict().items() if name not in ("per_user", "lr", "chunk")}
    return hashlib.sha256(f"{sorted(measured.items())} {_weights_digest(pool)}".encode()).hexdigest()


def _weights_digest(pool: Pool) -> str:
    """Of samples of the weights that learn."""
    made = hashlib.sha256()
    for name, layer in pool.layers.items():
        made.update(name.encode() + str(tuple(layer.weight.shape)).encode())
        made.update(layer.weight[::97, ::89].float().cpu().numpy().tobytes())
    return made.hexdigest()


@torch.inference_mode(False)
def _measured(pool: Pool, config: TTTConfig, model: Any) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    whole = AutoModelForCausalLM.from_pretrained(model.model, dtype=model.dtype, **source).eval()
    tokenizer = AutoTokenizer.from_pretrained(model.tokenizer, **source)
    ttt.adapt_(whole, config, filter_fn=lambda module, name: name in pool.layers)
    ttt.Learner(whole).calibrate(tokenizer=tokenizer)
    layers = ttt.pool_of(whole).layers
    return {
        f"{name}.{buffer}": t.contiguous().cpu()
        for name, layer in layers.items()
        for buffer in SHARED
        if (t := getattr(layer, buffer)) is not None
    }
