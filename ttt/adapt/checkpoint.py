"""`save` and `load`: what a model has learnt, in one safetensors file.

The file holds the state of every learning layer. Its metadata holds the format version, the configuration,
a SHA-256 of the tensors and one of the base weights, so that a damaged file, or one that belongs to another
model, is refused before anything is changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ttt.adapt.convert import adapt_, learning_layers, require_layers, restore_
from ttt.config import TTTConfig
from ttt.files import write_atomically

FORMAT = "ttt"
FORMAT_VERSION = "1"
_SAMPLE = 16384  # elements hashed of each weight that does not learn

# Not saved where they equal what the base model gives, and rebuilt from it on loading.
_FROM_BASE = "anchor"


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Write what ``model`` learnt to ``path`` (safetensors).

    The bytes go to a temporary file in the same folder, are flushed to the disk, and take the name ``path`` in one
    step: a crash leaves the old file or the new one, never a part.

    Raises:
        ValueError: if ``model`` has no learning layer.
        OSError: if the file cannot be written; a file that was there is unharmed.
    """
    require_layers(model)
    layers = learning_layers(model)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers:
        state = layer.state()
        if not layer.base:
            state.pop(_FROM_BASE)
        tensors |= {f"{name}:{key}": t for key, t in state.items()}
        # Of a fork's layer the base and the live state may be one tensor, which the file's format does not take.
        tensors |= {f"{name}:base.{key}": t.clone() for key, t in layer.base.items() if key != _FROM_BASE}
    tensors = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": json.dumps(layers[0][1].config.to_dict()),
        "layers": json.dumps([name for name, _ in layers]),
        "base_sha256": base_hash(model),
        "tensors_sha256": tensor_hash(tensors),
    }
    write_atomically(Path(path), safetensors.torch.save(tensors, metadata))


def load(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Give ``model`` what a file of `save` holds. A model that is not adapted yet is adapted as the file says.

    Returns:
        ``model``.

    Raises:
        ValueError: if the file is truncated, damaged, of another version, or belongs to another model; ``model``
            is as it was.
        OSError: if the file cannot be read.
    """
    tensors, metadata = _read(Path(path))
    try:
        names, config = json.loads(metadata["layers"]), TTTConfig.from_dict(json.loads(metadata["config"]))
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: its metadata cannot be read ({error})") from None
    fresh = not learning_layers(model)
    found = [name for name, module in model.named_modules() if name in names] if fresh else None
    present = found if fresh else [name for name, _ in learning_layers(model)]
    if sorted(present or []) != sorted(names):
        raise ValueError(f"{path} is of a model with learning layers {names}; this model has {present}")
    if metadata.get("base_sha256") != base_hash(model, names if fresh else None):
        raise ValueError(f"{path} belongs to another base model: the hash of the base weights differs")
    if fresh:
        adapt_(model, config, filter_fn=lambda _, name: name in names)
    try:
        layers = dict(learning_layers(model))
        states = {name: _state_of(name, layers[name], tensors, path) for name in names}
    except ValueError:
        if fresh:
            restore_(model)
        raise
    for name, (state, base) in states.items():
        layer = layers[name]
        held = not layer.base and "anchor" not in layer.shared  # by the live anchor, which is written below
        base_weight = layer.base_weight.clone() if held else layer.base_weight
        if base is None:
            layer.base = {}
            state[_FROM_BASE] = base_weight
        else:
            device = base_weight.device
            layer.base = {_FROM_BASE: base_weight} | {key: t.to(device, copy=True) for key, t in base.items()}
        layer.load_state(state)
    return model


def _state_of(name: str, layer, tensors: dict[str, Tensor], path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    prefix = name + ":"
    state = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    base = {key.removeprefix("base."): state.pop(key) for key in list(state) if key.startswith("base.")}
    live = layer.state()
    expected = {key: (t.shape, t.dtype) for key, t in live.items()}
    if _FROM_BASE not in state:
        expected.pop(_FROM_BASE)
    got = {key: (t.shape, t.dtype) for key, t in state.items()}
    if got != expected:
        differ = sorted(key for key in got.keys() | expected.keys() if got.get(key) != expected.get(key))
        raise ValueError(
            f"{path} does not fit layer {name}: {differ} differ in presence, shape or dtype (other config?)"
        )
    for key, t in base.items():
        if key not in live or t.shape != live[key].shape or t.dtype != live[key].dtype:
            raise ValueError(f"{path} does not fit layer {name}: base.{key} differs in shape or dtype")
    return state, (base if _FROM_BASE in state else None)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated, damaged or no safetensors file ({error})") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by ttt.save: format is {metadata.get('format')!r}, not {FORMAT!r}")
    if metadata.get("format_version") != FORMAT_VERSION:
        version = metadata.get("format_version")
        raise ValueError(f"{path} has format version {version!r}; this release reads version {FORMAT_VERSION!r}")
    if metadata.get("tensors_sha256") != tensor_hash(tensors):
        raise ValueError(f"{path} is damaged: its checksum does not fit its content")
    return tensors, metadata


def _bytes_of(t: Tensor):
    t = t.detach().cpu().contiguous()
    return t.view(torch.uint8).numpy() if t.numel() else b""


def tensor_hash(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        t = tensors[key]
        digest.update(f"{key}|{t.dtype}|{tuple(t.shape)}|".encode())
        digest.update(_bytes_of(t.reshape(-1)))
    return digest.hexdigest()


def base_hash(model: nn.Module, names: list[str] | None = None) -> str:
    """SHA-256 of the base weights: those that learn in full, of every other up to 16384 evenly spaced elements.

    ``names`` are the modules that will learn, for a model that is not adapted.
    """
    layers = dict(learning_layers(model))
    learn = set(layers) if names is None else set(names)
    digest = hashlib.sha256()
    for key, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        owner, _, leaf = key.rpartition(".")
        value = parameter.detach()
        if owner in layers and leaf == "weight":
            value = layers[owner].base_weight
            if layers[owner].transposed:
                value = value.T
        digest.update(f"{key}|{value.dtype}|{tuple(value.shape)}|".encode())
        flat = value.reshape(-1)
        if not (owner in learn and leaf == "weight") and flat.numel() > _SAMPLE:
            flat = flat[:: -(-flat.numel() // _SAMPLE)]
        digest.update(_bytes_of(flat))
    return digest.hexdigest()
