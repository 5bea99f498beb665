"""`export_peft`: write what was learnt as a LoRA adapter, which PEFT, vLLM and SGLang load."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from ttt.adapt import factors as lowrank
from ttt.adapt.convert import learning_layers, require_layers
from ttt.adapt.names import canonical
from ttt.checks import check_bool, check_choice, check_dense, check_path, check_type
from ttt.files import errors_naming, sync_folder
from ttt.layer_lock import exclusive
from ttt.nn.experts import STACKS
from ttt.per_user.pool import has_pool

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM serves (its ``--max-lora-rank``); an adapter is padded up to one of them."""
TOLERANCE = 0.05
"""Part of what a model learnt, in the Frobenius norm, that the rank chosen for it may lose."""
_MUCH = 0.1  # from this loss on, there is a warning
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Exported:
    """What `export_peft` returns.

    Attributes:
        folder: where the adapter is.
        rank: the adapter's ``r``.
        errors: layer -> ||written - learnt||_F / ||learnt||_F of its delta, the rounding to ``dtype`` included; 0 where
            nothing was learnt.
        error: the same for all layers together.
    """

    folder: Path
    rank: int
    errors: dict[str, float]
    error: float


@dataclasses.dataclass(frozen=True)
class _Change:
    """What one layer learnt, as it is written.

    ``factors`` (a, b), in the adapter's dtype; ``lost`` ||delta - b^T a||_F; ``size`` ||delta||_F.
    """

    factors: lowrank.Factors
    lost: float
    size: float


def export_peft(
    source: nn.Module | Mapping[str, Tensor],
    folder: str | os.PathLike,
    *,
    base_model: str | None = None,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    task_type: str | None = "CAUSAL_LM",
    fan_in_fan_out: bool = False,
) -> Exported:
    """Write what was learnt as a LoRA adapter: ``adapter_config.json`` and ``adapter_model.safetensors``.

    The delta of a layer is ``lora_B @ lora_A``: ``lora_alpha`` equals ``r``. Servers cache adapters by path, so each
    version needs a new folder, which gets its name once the adapter is complete. Loading was tested with PEFT and vLLM.
    SGLang was not available; tests check the rules of both servers: ranks, keys, no bias, no modules to save, a list of
    targets. SGLang loads no k or v without q, no q without v, and no up without gate. Experts that learnt are written
    as PEFT's ``target_parameters``, with the adapter's rank for each expert; loading those was tested with PEFT only.

    Args:
        source: either a model of `ttt.adapt_`, whose deltas (effective weight less the weight before any learning)
            are approximated by truncated SVD, on their device, in float64; or a user's low-rank state with tensors
            ``{layer}.a`` (rows, n) and ``{layer}.b`` (rows, m), delta = b^T a, other tensors being ignored. Such a
            state is written exactly, up to ``dtype``, if rows <= rank, with zero rows added, and otherwise as the
            nearest delta of that rank. Names of layers are the model's module names.
        folder: new, or empty.
        base_model: the adapter's ``base_model_name_or_path``. Default: ``model.config._name_or_path``.
        rank: one of `RANKS`. Default: for a model the smallest that loses at most 5 % of what was learnt (`TOLERANCE`),
            for a state the smallest that holds it exactly; 512 at most.
        dtype: of the adapter's tensors: float32, bfloat16 or float16.
        task_type: as PEFT's; None for a model without ``generate``.
        fan_in_fan_out: whether the layers of a state are transformers' ``Conv1D`` (GPT-2); ignored for a model, where
            it is known. The factors are the same; vLLM does not serve LoRA on such models.

    Warns if more than a tenth of what was learnt is lost.

    Returns:
        The folder, the rank, and how far what was written is from what was learnt.

    Raises:
        TypeError: if ``source``, ``folder`` or ``fan_in_fan_out`` is of another type, or a state holds more than
            tensors.
        ValueError: if ``folder`` is not empty, ``rank`` or ``dtype`` is not allowed, the base model is not known,
            ``source`` holds no layer or is a model adapted for users, or a layer's tensors do not fit each other, are
            not finite, or are too large for ``dtype``. Nothing is written.
        RuntimeError: if ``source`` is a model, and another thread is in a method of its learners or in `ttt.learning`,
            or a write to the layers ended half-way. Nothing is written.
        OSError: if the folder cannot be written; there is nothing at ``folder`` then.
    """
    check_type("source", source, (nn.Module, Mapping), "a model or a user's state, a dict of tensors")
    folder = check_path("folder", folder)
    check_bool("fan_in_fan_out", fan_in_fan_out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder must be new or empty, for servers cache adapters by path; {str(folder)!r} is not")
    if rank is not None and (not isinstance(rank, int) or rank not in RANKS):
        raise ValueError(f"rank must be one of {RANKS}, which vLLM serves, got {rank!r}")
    check_choice("dtype", str(dtype), [str(allowed) for allowed in _DTYPES])
    routed: set[str] = set()
    if isinstance(source, nn.Module):
        if has_pool(source):
            raise ValueError(
                f"source ({type(source).__name__}) was adapted for users, each with weights of their own; "
                "export_peft(pool_of(model).export(user), ...) writes those of one"
            )
        layers = require_layers(source)
        base_model = base_model or _name_of(source)
        routed = {canonical(name) for name, layer in learning_layers(source) if layer.routed}
        fan_in_fan_out = any(layer.transposed for layer in layers)
        if routed and fan_in_fan_out:
            raise ValueError(
                "source has experts and transformers' Conv1D layers that learnt, which no one adapter holds"
            )
        with exclusive(layers, "ttt.export_peft"):
            rank, changes = _of_model(source, rank, dtype)
    else:
        pairs = dict(_pairs_of(source))
        rows = max(a.shape[0] for a, _ in pairs.values())
        rank = rank or next((allowed for allowed in RANKS if allowed >= rows), RANKS[-1])
        changes = {name: _of_factors(a, b, rank, dtype) for name, (a, b) in pairs.items()}
    for name, change in changes.items():
        for factor, t in zip(("lora_A", "lora_B"), change.factors, strict=True):
            if not bool(torch.isfinite(t).all()):
                raise ValueError(f"{name}: {factor} is too large for {dtype}; choose another dtype")
    if not base_model or not isinstance(base_model, str):
        raise ValueError(f"base_model must name the model that the adapter belongs to, got {base_model!r}")
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(set(changes) - routed),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
    }
    if routed:
        config["target_parameters"] = sorted({name.rpartition(".")[0] for name in routed})
    tensors = dict(_tensors({name: change.factors for name, change in changes.items()}, routed))
    _write(folder, config, tensors)
    lost, size = (math.hypot(*(getattr(c, what) for c in changes.values())) for what in ("lost", "size"))
    errors = {name: _ratio(change.lost, change.size) for name, change in changes.items()}
    error = _ratio(lost, size)
    if error > _MUCH:
        way = f"a rank above {rank} loses less" if rank < RANKS[-1] else "ttt.save keeps all of it"
        warnings.warn(
            f"the adapter of rank {rank} in {folder} lost {error:.0%} of what was learnt; {way}", stacklevel=2
        )
    return Exported(folder, rank, errors, error)


def _tensors(factors: Mapping[str, lowrank.Factors], routed: set[str]) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of the adapter's file. ``routed`` are the names of the matrices of experts.

    Of a stack of E experts PEFT keeps lora_A (E r, n), expert after expert, and lora_B (m, r E), row after row of all
    experts. It wraps the module of the stacks once for each of them, the first one innermost.
    """
    stacks: dict[str, list[lowrank.Factors]] = {}
    for name, (a, b) in factors.items():
        if name in routed:
            stacks.setdefault(name.rpartition(".")[0], []).append((a, b))
            continue
        yield f"{PREFIX}{name}.lora_A.weight", a.cpu().contiguous()
        yield f"{PREFIX}{name}.lora_B.weight", b.T.cpu().contiguous()
    for name, experts in stacks.items():
        module, _, stack = name.rpartition(".")
        inner = ".base_layer" * (len(STACKS) - 1 - STACKS.index(stack))
        yield f"{PREFIX}{module}{inner}.lora_A.weight", torch.cat([a for a, _ in experts]).cpu()
        rows = torch.stack([b for _, b in experts], -1)  # (r, m, E)
        yield f"{PREFIX}{module}{inner}.lora_B.weight", rows.permute(1, 0, 2).flatten(1).cpu().contiguous()


def _of_model(model: nn.Module, rank: int | None, dtype: torch.dtype) -> tuple[int, dict[str, _Change]]:
    """The rank, and the change of every layer; ``rank`` None: the smallest that keeps the error within `TOLERANCE`."""
    deltas, factors = {}, {}
    for name, layer in learning_layers(model):
        name = canonical(name)
        deltas[name] = layer.effective_weight().double() - layer.base_weight.double()
        _require_finite(name, deltas[name])
        factors[name] = lowrank.truncated(deltas[name], rank or RANKS[-1])
    if rank is None:
        # A factor's rows have the singular values as their squared norms, the largest first.
        values = [a.square().sum(1).square() for a, _ in factors.values()]
        total = sum(float(delta.square().sum()) for delta in deltas.values())
        lost = {r: total - sum(float(each[:r].sum()) for each in values) for r in RANKS}
        rank = next((r for r in RANKS if lost[r] <= TOLERANCE**2 * total), RANKS[-1])
    found = {}
    for name, delta in deltas.items():
        a, b = factors[name]
        a, b = (t.to(dtype) for t in lowrank.padded(a[:rank], b[:rank], rank))
        found[name] = _Change((a, b), float((delta - b.double().T @ a.double()).norm()), float(delta.norm()))
    return rank, found


def _of_factors(a: Tensor, b: Tensor, rank: int, dtype: torch.dtype) -> _Change:
    factors = (a, b) if a.shape[0] <= rank else lowrank.reduced(a, b, rank)
    c, d = (t.to(dtype) for t in lowrank.padded(*factors, rank))
    rows = a.shape[0]
    kept = rows <= rank and torch.equal(c[:rows].double(), a.double()) and torch.equal(d[:rows].double(), b.double())
    return _Change((c, d), 0.0 if kept else lowrank.distance((a, b), (c, d)), lowrank.norm(a, b))


def _pairs_of(state: Mapping[str, Tensor]) -> Iterator[tuple[str, lowrank.Factors]]:
    for key in state:
        check_type("a name in source", key, str, "a string")
    names = sorted({key[:-2] for key in state if key.endswith((".a", ".b"))})
    if not names:
        raise ValueError(f"source holds no layer: no tensors {{layer}}.a and {{layer}}.b among {sorted(state)[:5]}")
    for name in names:
        a, b = state.get(f"{name}.a"), state.get(f"{name}.b")
        if a is None or b is None:
            raise ValueError(f"source holds one of {name}.a and {name}.b only; both are needed")
        for key, t in ((f"{name}.a", a), (f"{name}.b", b)):
            check_dense(key, t)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[0]:
            shapes = tuple(a.shape), tuple(b.shape)
            raise ValueError(f"{name}.a and {name}.b must have shapes (rows, n) and (rows, m), got {shapes}")
        for key, t in ((f"{name}.a", a), (f"{name}.b", b)):
            if not t.is_floating_point():
                raise ValueError(f"{key} must hold floats, got {t.dtype}")
            _require_finite(key, t)
        yield name, (a.detach(), b.detach())


def _require_finite(name: str, t: Tensor) -> None:
    if not torch.isfinite(t).all():
        raise ValueError(f"{name} holds values that are not finite")


def _name_of(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_name_or_path", None)


def _ratio(lost: float, size: float) -> float:
    return lost / size if size else 0.0


def _write(folder: Path, config: dict, tensors: dict[str, Tensor]) -> None:
    """Write both files to a new folder beside ``folder``, flush them to the disk, and rename it to ``folder``."""
    with errors_naming(folder):
        _write_beside(folder, config, tensors)


def _write_beside(folder: Path, config: dict, tensors: dict[str, Tensor]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.parent / f".{folder.name}.{secrets.token_hex(8)}"
    staging.mkdir()
    try:
        contents = {
            WEIGHTS: safetensors.torch.save(tensors, {"format": "pt"}),
            CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
        }
        for name, content in contents.items():
            with open(staging / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(staging)
        if folder.exists():
            folder.rmdir()  # fails unless it is empty
        os.rename(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    sync_folder(folder.parent)
