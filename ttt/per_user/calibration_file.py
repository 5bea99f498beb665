"""What is measured of a base model before anyone learns, kept in a file for the next start."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ttt.files import write_atomically
from ttt.per_user.pool import Pool

HELD_BACK = (8, 32)
"""Texts, and tokens of each, on which a guard measures: 256 tokens to be read after each lesson."""
SHARED = ("importance_m", "importance_n", "memory", "seen", "basis", "output_basis", "calibrated")
"""Buffers of `ttt.nn.LowRankLinear` that `ttt.Learner.calibrate` fills."""


def weights_name(pool: Pool) -> str:
    """A short name of the weights that learn: 16 hexadecimal digits of a digest of their shapes and some of them."""
    digest = hashlib.sha256()
    for name, layer in pool.layers.items():
        digest.update(f"{name} {tuple(layer.weight.shape)} {layer.weight.dtype}".encode())
        digest.update(layer.base_weight[::97, ::89].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def default_file(pool: Pool) -> Path:
    """Where the calibration of these weights and this configuration is kept: in the user's folder for caches."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "ttt" / f"calibration-{_digest(pool)[:16]}.safetensors"


def calibrate_once(pool: Pool, file: Path | None, measure: Callable[[], None]) -> bool:
    """Fill the layers' calibration from ``file``; where there is none, ``measure`` it and write the file.

    Args:
        pool: of the model's users, none of whom has a slot.
        file: safetensors, with a digest of weights and configuration, and a checksum; None for `default_file`, which
            nobody has chosen, and which is written anew if it is damaged.
        measure: calibrates the layers.

    Returns:
        Whether it was measured.

    Warns:
        RuntimeWarning: if the file cannot be written, or the default one is damaged.

    Raises:
        ValueError: if the file is of other weights or another configuration, damaged, or no such file. Nothing has
            changed then.
    """
    digest, chosen = _digest(pool), file
    file = chosen or default_file(pool)
    try:
        found = _read(file, digest, "calibration") if file.exists() else None
    except ValueError as error:
        if chosen is not None or not file.is_file():
            raise
        warnings.warn(f"{error}: it is a copy that was kept, and is written anew", RuntimeWarning, stacklevel=2)
        found = None
    if found is None:
        measure()
        tensors = {
            f"{name}.{buffer}": t.detach().cpu().contiguous()
            for name, layer in pool.layers.items()
            for buffer in SHARED
            if (t := getattr(layer, buffer, None)) is not None
        }
        _keep(file, tensors, digest)
        return True
    with torch.no_grad():
        for name, layer in pool.layers.items():
            for buffer in SHARED:
                if (t := getattr(layer, buffer, None)) is not None:
                    t.copy_(found[f"{name}.{buffer}"])
    return False


def held_back_once(pool: Pool, calibration: Path, write: Callable[[], Tensor]) -> list[Tensor]:
    """Text that the users' guards measure on, from a file beside that of the ``calibration``.

    Args:
        pool: of the model's users.
        calibration: the file of `calibrate_once`.
        write: (B, T) int64, what the base model has written; the last `HELD_BACK` tokens of a few rows are kept. Called
            where there is no file.

    Returns:
        (B, T) int64 each.

    Warns, raises:
        As `calibrate_once`.
    """
    file, digest = calibration.with_name(f"{calibration.stem}-guard{calibration.suffix}"), _digest(pool)
    device = next(iter(pool.layers.values())).rows.device
    if not file.exists():
        rows, length = HELD_BACK
        ids = write()[:rows, -length:].cpu().contiguous()
        _keep(file, {"ids": ids}, digest)
        return list(ids.to(device).split(4))
    return list(_read(file, digest, "guard's text")["ids"].to(device).split(4))


def _read(file: Path, digest: str, what: str) -> dict[str, Tensor]:
    """The tensors of a file that `_keep` wrote, all of them as they were written.

    Raises:
        ValueError: if it is of another model or configuration, or damaged.
    """
    try:
        with safetensors.safe_open(file, "pt") as held:
            metadata = held.metadata() or {}
            if metadata.get("digest") != digest:
                raise ValueError(f"{file} must be the {what} of this model and configuration, not of another")
            tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118, it is no dict
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{file} must be a {what}, but cannot be read ({error}); remove it") from None
    if metadata.get("sha256") != _checksum(tensors):
        raise ValueError(f"{file} must be a {what}, but is damaged: its tensors do not fit its checksum; remove it")
    return tensors


def _checksum(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(safetensors.torch.save(tensors)).hexdigest()


def _keep(file: Path, tensors: dict[str, Tensor], digest: str) -> None:
    """Write the file for the next start; where that fails, as in a container that can only be read, go on without."""
    data = safetensors.torch.save(tensors, {"digest": digest, "sha256": _checksum(tensors)})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, data)
    except OSError as error:
        warnings.warn(
            f"{file} cannot be written ({error.strerror}); what is in it is measured again at the next start",
            RuntimeWarning, stacklevel=3,
        )  # fmt: skip


def _digest(pool: Pool) -> str:
    """Of the weights that learn and of the options that calibration depends on."""
    options = {name: value for name, value in pool.config.to_dict().items() if name not in ("per_user", "chunk", "lr")}
    return hashlib.sha256(
        f"{weights_name(pool)} {json.dumps(options, sort_keys=True, default=str)}".encode()
    ).hexdigest()
