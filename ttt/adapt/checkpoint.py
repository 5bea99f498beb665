"""`save` and `load`: what a model has learnt, in one safetensors file.

The file holds the state of every learning layer. Its metadata holds the format version, the configuration, a SHA-256 of
the tensors and one of the base weights. `load` refuses a file that is damaged, was forged, or belongs to another model
before it changes anything; the checks are in `ttt.adapt.validate`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ttt.adapt import validate
from ttt.adapt.convert import (
    adapt_,
    learning_layers,
    linear_modules,
    require_layers,
    restore_,
    weight_of,
)
from ttt.adapt.names import canonical, unwrapped
from ttt.adapt.plan import check_fit
from ttt.adapt.sharding import processes_of
from ttt.atomic import whole_write
from ttt.checks import check_model, check_path
from ttt.config import TTTConfig
from ttt.files import write_atomically
from ttt.layer_lock import exclusive
from ttt.nn import Linear
from ttt.nn.bnb import stored_values
from ttt.nn.experts import STACKS, is_stack
from ttt.nn.parallel import SharedSide, require_same, together, whole
from ttt.nn.quantized import plain_parts
from ttt.nn.row_blocks import is_subclass
from ttt.per_user.pool import has_pool

FORMAT = "ttt"
FORMAT_VERSION = "1"
_HEADER_BYTES = 1 << 24
_SAMPLE = 16384  # elements hashed of each weight that does not learn

# Left out of the file while it equals the base weight, from which `load` takes it.
_FROM_BASE = "anchor"

State = dict[str, Tensor]


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Write what ``model`` learnt to ``path`` (safetensors).

    The bytes go to a temporary file in the same folder, are flushed to the disk, and take the name ``path`` in one
    step: a crash leaves the old file or the new one, never a part. What a killed save left in the folder is removed.

    If the model is sharded over processes (tensor parallelism, FSDP2), all of them must call it, and the first writes
    the state of the whole model. It can be loaded into a model that is sharded otherwise, or not at all. What fails in
    one process is an error in all.

    Raises:
        TypeError: if ``model`` is no module or ``path`` no path. Nothing is written then.
        ValueError: if ``model`` has no learning layer or was adapted for users, or if its state is one that `load`
            would refuse: values that are not finite, for instance. Nothing is written then.
        RuntimeError: if another thread is in a method of the model's learners or in `ttt.learning`, a write to the
            layers ended half-way, or another process refused. Nothing is written then.
        OSError: if the file cannot be written, here or by the process that writes for all; one that was there is
            unharmed.
    """
    processes = processes_of(check_model(model))
    with together(processes, "ttt.save"):
        path = check_path("path", path)
    content = content_of(model)
    with _named_failure(path), together(processes, "ttt.save"):
        if all(side.rank == 0 for side in processes):
            write_atomically(path, content, sweep=True)


@contextlib.contextmanager
def _named_failure(path: Path) -> Iterator[None]:
    """Raise OSError where the first process, which writes ``path`` for all, has failed."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(errno.EIO, "the first process of the group could not write the file", str(path)) from error


def content_of(model: nn.Module) -> bytes:
    """The content of the file that `save` writes, which all processes gather; it raises what `save` does."""
    processes = processes_of(check_model(model))
    with contextlib.ExitStack() as held:
        with together(processes, "ttt.save"):
            refuse_users(model, "saved")
            held.enter_context(exclusive(require_layers(model, sharded=True), "ttt.save"))
        return _bytes_of_model(model, processes)


def _bytes_of_model(model: nn.Module, processes: list[SharedSide]) -> bytes:
    layers, found = learning_layers(model), dict[str, tuple[Linear, State, State]]()
    for full, layer in layers:
        state = {key: t.detach().cpu().contiguous() for key, t in layer.gathered(layer.state()).items()}
        earlier = {key: t for key, t in layer.base.items() if key != _FROM_BASE}
        base = {key: t.detach().cpu().contiguous() for key, t in layer.gathered(earlier).items()}
        found[canonical(full)] = layer, state, base
    base_sha256 = base_hash(model)
    first, config = layers[0][0], json.dumps(layers[0][1].config.to_dict())
    tensors: State = {}
    with together(processes, "ttt.save"):
        if other := [full for full, layer in layers if layer.config != layers[0][1].config]:
            raise ValueError(
                f"model cannot be saved: its layers {first} and {other[0]} have different configurations, and a file "
                "holds one"
            )
        validate.config_of(config, "model cannot be saved: its configuration")
        for name, (layer, state, base) in found.items():
            validate.check_state(f"model cannot be saved: layer {name}", _trial_layer(layer), state, base)
            if not layer.base:
                state.pop(_FROM_BASE)
            tensors |= {f"{name}:{key}": t for key, t in state.items()}
            # Base and live state of a fork's layer may be one tensor, which safetensors does not take twice.
            tensors |= {f"{name}:base.{key}": t.clone() for key, t in base.items()}
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": config,
        "layers": json.dumps(list(found)),
        "base_sha256": base_sha256,
        "tensors_sha256": tensor_hash(tensors),
    }
    return safetensors.torch.save(tensors, metadata)


def load(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Give ``model`` the state that `save` wrote to ``path``.

    A model that is not adapted yet is adapted with the configuration in the file. One that is adapted keeps its own
    configuration, which must give tensors of the same shapes. If the model is sharded over processes, all of them must
    call it, and see the same file. What fails in one process is an error in all.

    A file has no log of episodes: a learner's `ttt.EpisodeLog` stays as it is. A learner's `ttt.Guard` begins anew with
    the loaded state.

    Returns:
        ``model``.

    Raises:
        TypeError: if ``model`` is no module or ``path`` no path.
        ValueError: if the file is truncated, damaged, forged or of another version, if it belongs to another model, or
            if ``model`` was adapted for users. ``model`` is unchanged, to the bit.
        OSError: if the file cannot be read; ``model`` is unchanged.
        RuntimeError: if another thread is in a method of the model's learners or in `ttt.learning`; if a layer is
            capturable and must replace what it shares with a fork, see `ttt.nn.Linear.capturable_`; or if another
            process refused. ``model`` is unchanged.
    """
    processes = processes_of(check_model(model))
    with contextlib.ExitStack() as held:
        with together(processes, "ttt.load"):
            path = check_path("path", path)
            refuse_users(model, "given the state of a file")
            adapted = {canonical(name): layer for name, layer in learning_layers(model)}
            held.enter_context(exclusive(list(adapted.values()), "ttt.load", repairs=True))
        return _load(model, adapted, path, processes)


def _load(model: nn.Module, adapted: dict[str, Linear], path: Path, processes: list[SharedSide]) -> nn.Module:
    possible: dict[str, nn.Module] = {**adapted} or {canonical(name): m for name, m in linear_modules(model)}
    with contextlib.ExitStack() as held:
        with together(processes, "ttt.load"):
            file, metadata = held.enter_context(_opened(path, validate.header_allowance(possible)))
            names, config, trials = _checked_header(model, adapted, possible, path, file, metadata)
        require_same(processes, f"the file {path}", sorted(metadata.items()))
        own_hash = base_hash(model, None if adapted else names)
        with together(processes, "ttt.load"):
            if metadata.get("base_sha256") != own_hash:
                raise ValueError(f"{path} belongs to another base model: the hash of the base weights differs")
            states = _by_layer(_tensors_of(path, file, metadata))
    weights = {name: _whole_base(adapted[name]) if adapted else whole(weight_of(possible[name])) for name in states}
    with together(processes, "ttt.load"):
        for name, (state, base) in states.items():
            if adapted and adapted[name].capturable is not None:
                adapted[name].check_pending(int(state["pending"]))
            complete = {_FROM_BASE: weights[name].detach().cpu().contiguous(), **state}
            validate.check_state(f"{path}: layer {name}", trials[name], complete, base)
    if adapted:
        _write(adapted, states)
        return model
    adapt_(model, config, filter_fn=lambda _, name: canonical(name) in states)
    try:
        _write({canonical(name): layer for name, layer in learning_layers(model)}, states)
    except BaseException:
        restore_(model)
        raise
    return model


def _checked_header(
    model: nn.Module,
    adapted: Mapping[str, Linear],
    possible: Mapping[str, nn.Module],
    path: Path,
    file: Any,
    metadata: Mapping[str, str],
) -> tuple[list[str], TTTConfig, dict[str, Linear]]:
    """(names of the layers, configuration, layers without memory) of an open ``file``, which must suit ``model``."""
    stacks = {f"{canonical(n)}.{stack}" for n, m in unwrapped(model).named_modules() if is_stack(m) for stack in STACKS}
    names_here = {canonical(name): name for name, _ in linear_modules(model)}
    names = validate.layer_names(metadata.get("layers"), f"{path} is damaged: layers in its metadata")
    config = validate.config_of(metadata.get("config"), f"{path} is damaged: config in its metadata")
    wanted = set(names)
    if not adapted and any(name.rpartition(".")[0] in stacks for name in names):
        raise ValueError(
            f"{path} holds what experts learnt; adapt the model with the same target_modules first, by ttt.adapt_"
        )
    _check_names(path, names, list(adapted) or [name for name in possible if name in wanted])
    if adapted:
        trials = {name: _trial_layer(layer) for name, layer in adapted.items()}
    else:
        check_fit(unwrapped(model), [(names_here[name], possible[name]) for name in names])
        trials = {name: validate.blank_layer(weight_of(possible[name]), config, name) for name in names}
    _check_layout(path, file, trials)
    return names, config, trials


def refuse_users(model: nn.Module, what: str) -> None:
    """Raise ValueError if ``model`` was adapted for users; ``what`` is what cannot be done with it."""
    if has_pool(model):
        raise ValueError(
            f"model ({type(model).__name__}) was adapted for users, each with weights of their own, and cannot be "
            f"{what}: pool_of(model).export(user) and .load(user, state) handle one user's; ttt.Store keeps all users'"
        )


def read_tensors(path: Path) -> tuple[State, dict[str, str]]:
    """The tensors and the metadata of a file in this format; their names and values are for the caller to check.

    Raises:
        ValueError: if the file is truncated, damaged or of another format or version. OSError: if it cannot be read.
    """
    with _opened(path, _HEADER_BYTES) as (file, metadata):
        return _tensors_of(path, file, metadata), metadata


@contextlib.contextmanager
def _opened(path: Path, header_bytes: int) -> Iterator[tuple[Any, dict[str, str]]]:
    """(open safetensors file, its metadata), of this format and version, with a header of at most ``header_bytes``."""
    validate.check_header_size(path, header_bytes)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found, version = metadata.get("format"), metadata.get("format_version")
            if found != FORMAT:
                raise ValueError(f"{path} was not written by ttt.save: format is {found!r:.80}, not {FORMAT!r}")
            if version != FORMAT_VERSION:
                raise ValueError(
                    f"{path} has format version {version!r:.80}; this release reads version {FORMAT_VERSION!r}"
                )
            yield file, metadata
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated, damaged or no safetensors file ({error})") from None


def _tensors_of(path: Path, file, metadata: Mapping[str, str]) -> State:
    """All tensors of an open file, which must fit the checksum in its metadata."""
    tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    if metadata.get("tensors_sha256") != tensor_hash(tensors):
        raise ValueError(f"{path} is damaged: its checksum does not fit its content")
    return tensors


def _check_names(path: Path, names: list[str], present: list[str]) -> None:
    if sorted(present) != sorted(names):
        raise ValueError(f"{path} is of a model with learning layers {names!r:.500}; this model has {present!r:.500}")


def _check_layout(path: Path, file, layers: Mapping[str, Linear]) -> None:
    """Compare the header of an open file with the tensors that ``layers`` have."""
    found: dict[str, dict[str, validate.Kind]] = {name: {} for name in layers}
    for full in file.keys():  # noqa: SIM118 (not a mapping)
        name, _, key = full.rpartition(":")
        if name not in found:
            raise ValueError(f"{path} is damaged: its tensor {full!r:.200} is of no layer in its metadata")
        part = file.get_slice(full)
        found[name][key] = tuple(part.get_shape()), part.get_dtype()
    for name, layer in layers.items():
        validate.check_layout(f"{path} does not fit layer {name}", layer, found[name])


def _by_layer(tensors: State) -> dict[str, tuple[State, State]]:
    """Layer -> (state, without what is in the base weights; state from before the first consolidation)."""
    found: dict[str, tuple[State, State]] = {}
    for full, t in tensors.items():
        name, _, key = full.rpartition(":")
        state, base = found.setdefault(name, ({}, {}))
        (base if key.startswith("base.") else state)[key.removeprefix("base.")] = t
    return found


def _trial_layer(layer: Linear) -> Linear:
    """A layer without memory, as `validate.check_state` takes it, that learns as ``layer`` does."""
    weight = torch.empty(layer.sharding.shape(layer.weight), dtype=layer.weight.dtype, device="meta")
    trial = validate.blank_layer(weight, layer.config, layer.name)
    trial.strength = layer.strength
    return trial


def _write(layers: Mapping[str, Linear], states: Mapping[str, tuple[State, State]]) -> None:
    """Put ``states``, which were checked, into ``layers``.

    All memory is taken before the first tensor is written, so that a failure leaves every value as it was. Signals are
    handled after the last one.
    """
    before: dict[str, State] = {}
    states = {name: (layers[name].parts(state), layers[name].parts(base)) for name, (state, base) in states.items()}
    for name, (state, base) in states.items():
        layer, base_weight = layers[name], layers[name].base_weight
        if _FROM_BASE not in state:
            state[_FROM_BASE], before[name] = base_weight, {}
        else:
            # Without an earlier base it is the live anchor, which is written below.
            kept = base_weight if layer.base or _FROM_BASE in layer.shared else base_weight.clone()
            before[name] = {_FROM_BASE: kept} | {key: t.to(kept.device, copy=True) for key, t in base.items()}
        for key in layer.shared.intersection(state):
            live = getattr(layer, key)
            if not torch.equal(live, state[key].to(live.device)):
                layer.unshare(key)
        layer.require_writable()
    with whole_write(list(layers.values()), "ttt.load"):
        for name, (state, _) in states.items():
            layers[name].base = before[name]
            layers[name].load_state(state)
            layers[name].loads += 1


def _bytes_of(t: Tensor):
    t = t.detach().cpu().contiguous()
    return t.view(torch.uint8).numpy() if t.numel() else b""


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes of ``tensors``, whatever their order."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        t = tensors[key]
        digest.update(f"{key}|{t.dtype}|{tuple(t.shape)}|".encode())
        digest.update(_bytes_of(t.reshape(-1)))
    return digest.hexdigest()


def base_hash(model: nn.Module, names: list[str] | None = None) -> str:
    """SHA-256 of the weights before any learning.

    Weights that learn enter whole; of every other at most 16384 evenly spaced elements.

    Args:
        names: modules that will learn, of a model that is not adapted; None for one that is.
    """
    layers = {canonical(name): layer for name, layer in learning_layers(model)}
    learn = set(layers) if names is None else set(names)
    digest = hashlib.sha256()
    parameters = {canonical(name): parameter for name, parameter in unwrapped(model).named_parameters()}
    for key, parameter in sorted(parameters.items()):
        owner, _, leaf = key.rpartition(".")
        value = stored_values(whole(parameter))
        if owner in layers and leaf == "weight":
            value = _whole_base(layers[owner])
            if layers[owner].transposed:
                value = value.T
        elif owner in layers and leaf == "bias":
            value = layers[owner].sharding.output.gather(value)
        digest.update(f"{key}|{value.dtype}|{tuple(value.shape)}|".encode())
        if is_subclass(value):
            for name, part in plain_parts(value):
                digest.update(f"{name}|{part.dtype}|{tuple(part.shape)}|".encode())
                digest.update(_bytes_of(_sample(part)))
            continue
        learns = owner in learn and leaf == "weight"
        digest.update(_bytes_of(value.reshape(-1) if learns else _sample(value)))
    return digest.hexdigest()


def _whole_base(layer: Linear) -> Tensor:
    """(m, n): the base weight of ``layer``; of one that is sharded over processes, of the whole layer."""
    return layer.sharding.gather(layer.base_weight)


def _sample(t: Tensor) -> Tensor:
    flat = t.reshape(-1)
    return flat if flat.numel() <= _SAMPLE else flat[:: -(-flat.numel() // _SAMPLE)]
