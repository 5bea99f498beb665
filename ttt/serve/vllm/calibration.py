"""What is measured of the base model before anyone learns, once for each model: in a file."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch

import ttt
from ttt.config import TTTConfig
from ttt.per_user.calibration_file import SHARED, calibrate_once, weights_name
from ttt.per_user.pool import Pool

log = logging.getLogger("vllm.ttt")


def calibrate(pool: Pool, config: TTTConfig, model: Any, path: str) -> str:
    """Give the layers of ``pool`` what calibration measures, from a file; where there is none, measure and write it.

    Measuring loads the model once more, with transformers on the CPU, and lets it write text; it is freed again.

    Args:
        pool: of the top blocks; its layers have the names of the whole model's modules.
        config: of its layers.
        model: vLLM's ``ModelConfig``.
        path: of the file; "" for `ttt.per_user.calibration_file.default_file`.

    Returns:
        A short name of the model's weights: users of another model are refused.

    Raises:
        ValueError: as `ttt.per_user.calibration_file.calibrate_once`.
    """
    file = Path(path) if path else None
    began = time.perf_counter()
    if calibrate_once(pool, file, lambda: _measure(pool, config, model)):
        log.info("what must not be forgotten was measured in %.0f s", time.perf_counter() - began)
    return weights_name(pool)


@torch.inference_mode(False)
def _measure(pool: Pool, config: TTTConfig, model: Any) -> None:
    """Calibrate the whole model, loaded once more, and copy what its layers hold into those of ``pool``.

    It is loaded in float32: processors without instructions for bfloat16 multiply such matrices thirty times more
    slowly.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log.info("measuring what must not be forgotten")
    source = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    whole = AutoModelForCausalLM.from_pretrained(model.model, dtype=torch.float32, **source).eval()
    tokenizer = AutoTokenizer.from_pretrained(model.tokenizer, **source)
    ttt.adapt_(whole, config, filter_fn=lambda module, name: name in pool.layers)
    ttt.Learner(whole).calibrate(tokenizer=tokenizer)
    for name, layer in ttt.pool_of(whole).layers.items():
        for buffer in SHARED:
            if (t := getattr(layer, buffer, None)) is not None:
                getattr(pool.layers[name], buffer).copy_(t)
