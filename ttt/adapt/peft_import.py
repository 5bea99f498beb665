"""`import_peft`: a LoRA adapter as a user's low-rank state."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ttt.adapt.factors import padded
from ttt.adapt.peft_config import by_pattern, read_config
from ttt.adapt.peft_export import CONFIG, PREFIX, WEIGHTS
from ttt.adapt.validate import check_header_size
from ttt.checks import check_path, check_whole
from ttt.nn import LowRankLinear
from ttt.per_user.pool import pool_of

_KEY = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight")
_HEADER_BYTES = 1 << 24
_DTYPES = ("F64", "F32", "F16", "BF16")


def import_peft(
    folder: str | os.PathLike, *, rows: int | None = None, model: nn.Module | None = None
) -> dict[str, Tensor]:
    """Read a LoRA adapter of PEFT as the low-rank state of a user.

    The scaling (``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` for rsLoRA; Kalajdzievski, arXiv 2312.03732) is
    multiplied into b. ``rank_pattern`` and ``alpha_pattern`` are followed. Importing what `export_peft` wrote gives the
    exported state, to the bit, and the zero rows that the export added.

    With ``model`` the state is whole, and ``ttt.pool_of(model).load`` and the store take it:

        ttt.pool_of(model).load("alice", ttt.import_peft("alice-lora", model=model))

    The rows then count as made by a compression that dropped nothing: the user's next tokens are added to them, and all
    rows together are truncated to the model's rank when the slot is full.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        rows: number of rows of every layer: zero rows are added, or unused ones dropped from the end. Default: the
            ranks in the file.
        model: adapted with ``per_user``; None for the factors alone. Unused rows are dropped from the end of each
            layer, so ``rows`` must be None. Layers that the adapter does not have get no rows.

    Returns:
        ``{layer}.a`` (rows, n) and ``{layer}.b`` (rows, m), with delta = b^T a, (m, n), in float32 (float64 if either
        factor in the file is). m is the size of the output, of a ``Conv1D`` layer, too. With ``model`` the factors are
        in the dtype of its layers, and ``{layer}.eta_sum``, ``lost`` and ``step`` (1,) are beside them.

    Raises:
        TypeError: if ``folder`` is no path, or ``model`` no module.
        ValueError: if the adapter asks for what cannot be expressed so (DoRA, bias, modules to save, embeddings,
            initial values that change the base weights, ...), which is named; if ``rows`` is too few; if a field or a
            tensor has a wrong type or is out of range, values that are not finite included; if a pattern is no regular
            expression of the subset in `ttt.adapt.patterns`; if a file is damaged; if ``model`` was not adapted for
            users or ``rows`` is given beside it; or if a layer of the adapter is none in which users of ``model``
            learn, has other sizes, is not finite in the layer's dtype, or is of larger rank than a slot has rows.
        OSError: if a file cannot be read.
    """
    folder = check_path("folder", folder)
    if rows is not None:
        check_whole("rows", rows, 1)
    layers = None if model is None else pool_of(model).layers
    if layers is not None and rows is not None:
        raise ValueError(f"rows must be None where model says how many rows its layers have, got {rows}")
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise ValueError(f"{folder} holds adapter_model.bin, a pickle that may run code; convert it to safetensors")
    path = folder / CONFIG
    config = read_config(path)
    pairs = _pairs_of(folder / WEIGHTS)
    ranks = by_pattern(path, "rank_pattern", config.get("rank_pattern"), pairs, config["r"])
    alphas = by_pattern(path, "alpha_pattern", config.get("alpha_pattern"), pairs, config["lora_alpha"])
    state = {}
    for (name, (a, b)), rank, alpha in zip(pairs.items(), ranks, alphas, strict=True):
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            shapes = tuple(a.shape), tuple(b.shape)
            raise ValueError(f"{name}: lora_A and lora_B must have shapes ({rank}, n) and (m, {rank}), got {shapes}")
        wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        a, b = a.to(wide), b.T.to(wide).contiguous() * scaling
        for factor, t in (("lora_A", a), ("lora_B, times its scaling,", b)):
            if not bool(torch.isfinite(t).all()):
                raise ValueError(f"{folder / WEIGHTS}: {name}: {factor} must be finite in {wide}")
        state[f"{name}.a"], state[f"{name}.b"] = (a, b) if rows is None else _with_rows(name, a, b, rows)
    return state if layers is None else _whole(folder, state, layers)


def _whole(folder: Path, factors: dict[str, Tensor], layers: dict[str, LowRankLinear]) -> dict[str, Tensor]:
    """``factors`` as a state that slots of ``layers`` hold after a compression."""
    found = {key.rpartition(".")[0] for key in factors}
    if other := sorted(found - set(layers)):
        raise ValueError(f"{folder}: users of model do not learn in {other[0]}; they learn in {sorted(layers)}")
    state: dict[str, Tensor] = {}
    for name, layer in layers.items():
        a, b = (factors.get(f"{name}.{key}", getattr(layer, key).new_empty(0, getattr(layer, key).shape[2]))
                for key in ("a", "b"))  # fmt: skip
        in_use = (a.any(1) & b.any(1)).nonzero()  # a row that is zero in either factor adds nothing
        used = int(in_use.max()) + 1 if len(in_use) else 0
        if used > layer.low_rank.capacity:
            raise ValueError(
                f"{folder}: {name} must be of rank {layer.low_rank.capacity} at most (LowRank's rank + window), "
                f"got {used} rows"
            )
        part = {"a": a[:used].to(layer.a), "b": b[:used].to(layer.b)}
        for key, value in (("eta_sum", 0), ("lost", 0), ("step", 1)):
            part[key] = torch.full_like(getattr(layer, key)[:1], value)
        try:
            layer.check_slot_state(part)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        state |= {f"{name}.{key}": t for key, t in part.items()}
    return state


def _pairs_of(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> (lora_A, lora_B)."""
    check_header_size(path, _HEADER_BYTES)
    found: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                match = _KEY.fullmatch(key)
                if match is None:
                    raise ValueError(
                        f"{path}: {key} is not supported; only {PREFIX}<layer>.lora_A.weight and lora_B are"
                    )
                dtype = file.get_slice(key).get_dtype()
                if dtype not in _DTYPES:
                    raise ValueError(f"{path}: {key} must have one of the dtypes {_DTYPES}, got {dtype}")
                found.setdefault(match[1], {})[match[2]] = file.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated, damaged or no safetensors file ({error})") from None
    for name, pair in found.items():
        if len(pair) != 2:
            raise ValueError(f"{path}: {name} has lora_{next(iter(pair))} only")
    if not found:
        raise ValueError(f"{path} holds no tensors")
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def _with_rows(name: str, a: Tensor, b: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    if a.shape[0] <= rows:
        return padded(a, b, rows)
    if bool((a[rows:].any(1) & b[rows:].any(1)).any()):  # a row that is zero in either factor adds nothing
        raise ValueError(f"rows must be at least {a.shape[0]} for {name}, whose last rows are in use, got {rows}")
    return a[:rows].clone(), b[:rows].clone()
