"""`import_peft`: a LoRA adapter as a user's low-rank state."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ttt.adapt.factors import padded
from ttt.adapt.peft_export import CONFIG, PREFIX, WEIGHTS
from ttt.checks import check_whole

_KEY = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight")

# What does not change the delta, or is read below. Whatever else a config asks for is refused by name: PEFT's features
# change what the factors mean (use_dora, alora_invocation_tokens, ...) or add to them (lora_bias, modules_to_save).
_UNDERSTOOD = frozenset(
    (
        *("peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora"),
        *("rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias", "init_lora_weights"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
        *("lora_dropout", "inference_mode", "auto_mapping", "peft_version", "megatron_core", "runtime_config"),
        # of initial values, which are over
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    )
)
_HARMLESS_STARTS = ("gaussian", "eva", "orthogonal")


def import_peft(folder: str | os.PathLike, *, rows: int | None = None) -> dict[str, Tensor]:
    """The low-rank state that a LoRA adapter of PEFT is.

    The scaling (``lora_alpha / r``, or ``/ sqrt(r)`` for rsLoRA; Kalajdzievski, arXiv 2312.03732) is multiplied into
    b; ``rank_pattern`` and ``alpha_pattern`` are followed. The state of an exported state is the same, to the bit, up
    to the zero rows that export added.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        rows: give every layer so many rows: zero rows are added, or dropped from the end. Default: those of the file.

    Returns:
        ``{layer}.a`` (rows, n) and ``{layer}.b`` (rows, m), with delta = b^T a, (m, n), in float32 (float64 if the file
        holds that). Of a ``Conv1D`` layer, too, m is the output's size.

    Raises:
        ValueError: if the adapter asks for what cannot be expressed so (DoRA, bias, modules to save, embeddings,
            initial values that change the base weights, ...), which is named; if ``rows`` is too few; or if a file is
            damaged.
        OSError: if a file cannot be read.
    """
    folder = Path(folder)
    if rows is not None:
        check_whole("rows", rows, 1)
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise ValueError(f"{folder} holds adapter_model.bin, a pickle that may run code; convert it to safetensors")
    config = _config_of(folder / CONFIG)
    state = {}
    for name, (a, b) in _pairs_of(folder / WEIGHTS).items():
        rank = int(_by_pattern(config.get("rank_pattern"), name, config["r"]))
        alpha = float(_by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]))
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            shapes = tuple(a.shape), tuple(b.shape)
            raise ValueError(f"{name}: lora_A and lora_B must have shapes ({rank}, n) and (m, {rank}), got {shapes}")
        wide = torch.float64 if a.dtype == torch.float64 else torch.float32
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        a, b = a.to(wide), b.T.to(wide).contiguous() * scaling
        state[f"{name}.a"], state[f"{name}.b"] = (a, b) if rows is None else _with_rows(name, a, b, rows)
    return state


def _config_of(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
        kind, _, _ = config["peft_type"], int(config["r"]), float(config["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or of no LoRA adapter: {error!r}") from None
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type must be 'LORA', got {kind!r}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias must be 'none', got {config['bias']!r}: low-rank factors hold no bias")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start not in _HARMLESS_STARTS:
        raise ValueError(
            f"{path}: init_lora_weights = {start!r} may have changed the base weights, too; save the adapter with "
            "path_initial_model_for_weight_conversion"
        )
    for key, value in config.items():
        if key not in _UNDERSTOOD and value:
            raise ValueError(f"{path}: {key} = {value!r} is not supported; only plain LoRA on linear layers is")
    return config


def _pairs_of(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> (lora_A, lora_B)."""
    found: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                match = _KEY.fullmatch(key)
                if match is None:
                    raise ValueError(
                        f"{path}: {key} is not supported; only {PREFIX}<layer>.lora_A.weight and lora_B are"
                    )
                found.setdefault(match[1], {})[match[2]] = file.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated, damaged or no safetensors file ({error})") from None
    for name, pair in found.items():
        if len(pair) != 2:
            raise ValueError(f"{path}: {name} has lora_{next(iter(pair))} only")
    if not found:
        raise ValueError(f"{path} holds no tensors")
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def _by_pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first key that, as a regular expression, matches the end of the name from a dot on."""
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _with_rows(name: str, a: Tensor, b: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    if a.shape[0] <= rows:
        return padded(a, b, rows)
    if bool((a[rows:].any(1) & b[rows:].any(1)).any()):  # a row of zeros in either adds nothing
        raise ValueError(f"rows must be at least {a.shape[0]} for {name}, whose last rows are in use, got {rows}")
    return a[:rows].clone(), b[:rows].clone()
