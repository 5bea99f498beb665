"""`fork` makes a model for another user that shares what learning does not write; `memory_usage` counts bytes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ttt.adapt.convert import kept_originals, learning_layers, require_layers
from ttt.checks import check_model
from ttt.layer_lock import exclusive
from ttt.nn import Linear, LowRankLinear
from ttt.nn.experts import is_stack
from ttt.nn.gaussian import PAST, PRESENT
from ttt.nn.kronecker import MOMENTS
from ttt.nn.quantized import plain_parts
from ttt.nn.state import BASE
from ttt.per_user.pool import has_pool, pool_of

_KINDS = {"weight": "weight", "anchor": "anchor", "importance": "importance", "trace": "trace", "momentum": "trace"}
_MEMORY = ("memory", "recent", "recent_delta", "basis", "output_basis", *MOMENTS, *PAST, *PRESENT)
_KINDS |= dict.fromkeys(_MEMORY, "memory")


def fork(model: nn.Module) -> nn.Module:
    """Make a model for another user, in the same state as ``model``, to the bit.

    The two share the memory of every tensor that learning does not write: frozen parameters, buffers, and in the
    learning layers the anchor, the importance, the replay memory, the basis and the Gaussian of past inputs. Each has
    its own weights, trace, momentum, window, recent rows, Gaussian of present inputs and counters. Whatever one model
    does (learn, calibrate, consolidate, reset, load, roll back, restore) changes no bit of the other: a shared tensor
    is copied before it is first written, and is no longer shared then.

    Forward passes are not learning: a buffer of another module that they write, as those of ``spectral_norm`` and of
    modules that count or keep statistics of their own in training mode, is written for both models. Only batch
    normalisation (torch's) has its own in each.

    Fork a model before anyone has taught it; a later fork starts with everything that ``model`` has learnt.

    The copy of a shared tensor has another address. So a CUDA graph captured over a layer of a fork, or of a model that
    was forked, must be captured again after the first `consolidate`, `calibrate`, `reset`, `load` or `rollback` that
    changes the anchor, the importance or the replay memory.

    An optimizer that trains shared parameters changes both models.

    Returns:
        The new model.

    Raises:
        TypeError, ValueError: if ``model`` is no module, or has no learning layer.
        RuntimeError: if another thread is in a method of the model's learners or in `ttt.learning`, or a write to the
            layers ended half-way.
    """
    with exclusive(require_layers(model), "ttt.fork"):
        return _forked(model, dict(learning_layers(model)))


def _forked(model: nn.Module, layers: dict[str, Linear]) -> nn.Module:
    written = {id(layer.weight) for layer in layers.values()}
    memo: dict[int, object] = {}

    def share(t: Tensor | None) -> None:
        if t is None or id(t) in written:
            return
        # A new Parameter on the same memory, so that each model has its own requires_grad and grad.
        plain = type(t) is nn.Parameter
        memo[id(t)] = nn.Parameter(t.detach(), requires_grad=t.requires_grad) if plain else t

    for module in model.modules():
        for p in module.parameters(recurse=False):
            share(p)
        # The running means of batch normalisation are written by forward passes.
        if not isinstance(module, _NormBase) and module not in layers.values():
            for b in module.buffers(recurse=False):
                share(b)
    for original in kept_originals(model).values():
        for p in [] if is_stack(original) else original.parameters():  # learning writes into the memory of stacks
            share(p)
    for layer in layers.values():
        memo[id(layer.config)] = layer.config
        layer.shared.add("original")  # the replaced module's weight, which of a Conv1D is not the layer's
        for name in BASE:
            if (b := getattr(layer, name)) is not None:
                memo[id(b)] = b
                layer.shared.add(name)
        for b in layer.base.values():
            memo[id(b)] = b
    forked = copy.deepcopy(model, memo)
    for _, layer in learning_layers(forked):
        layer.strength = 1.0  # a guard of ``model`` does not watch the fork
    return forked


@dataclasses.dataclass(frozen=True)
class MemoryUsage:
    """What `memory_usage` returns.

    Attributes:
        parameters: number of adapted parameters, summed over the models; of sharded layers, those of this process.
        bytes: bytes that the learning layers hold, by kind; shared memory counts once. ``weight``, ``anchor``,
            ``importance``, ``trace`` (and momentum), ``window`` (and counters), ``memory`` (replay memory, recent
            rows, basis, Gaussians), ``base`` (what `Learner.reset` goes back to after a consolidation), ``original``
            (weights of ``Conv1D`` modules), ``users`` (the slots of `ttt.LowRank`).
    """

    parameters: int
    bytes: dict[str, int]

    @property
    def per_parameter(self) -> dict[str, float]:
        """Bytes per adapted parameter, by kind, and their ``total``."""
        found = {kind: size / self.parameters for kind, size in self.bytes.items()}
        return found | {"total": sum(found.values())}


def memory_usage(*models: nn.Module) -> MemoryUsage:
    """Count the bytes that the learning layers of ``models`` hold; memory shared by a model and its forks counts once.

    Raises:
        TypeError, ValueError: if there is no model, or one is no module or has no learning layer.
    """
    if not models:
        raise ValueError("memory_usage needs at least one model, got none")
    for model in models:
        if not has_pool(check_model(model)):
            require_layers(model, sharded=True)
    layers = [layer for model in models for _, layer in learning_layers(model)]
    pooled = [layer for model in models if has_pool(model) for layer in pool_of(model).layers.values()]
    originals = [
        (layer, kept_originals(model)[name])
        for model in models
        for name, layer in learning_layers(model)
        if name in kept_originals(model)
    ]
    # Live state is counted first, so that a base that shares the memory of a fork's live state counts 0.
    held = [(_KINDS.get(key, "window"), t) for layer in layers for key, t in layer.state().items() if key != "pending"]
    held += [("base", t) for layer in layers for t in layer.base.values()]
    held += [("original", original.get_parameter("weight")) for layer, original in originals if layer.transposed]
    held += [part for layer in pooled for part in _of_users(layer)]
    kinds = ("weight", "anchor", "importance", "trace", "window", "memory", "base", "original", "users")
    found = dict.fromkeys(kinds, 0)
    counted: set[tuple[torch.device, int]] = set()
    for kind, t in held:
        storage = t.untyped_storage()
        key = (t.device, storage.data_ptr())
        if storage.nbytes() and key not in counted:
            counted.add(key)
            found[kind] += storage.nbytes()
    return MemoryUsage(sum(layer.weight.numel() for layer in [*layers, *pooled]), found)


def _of_users(layer: LowRankLinear) -> Iterator[tuple[str, Tensor]]:
    """(kind, tensor) of what a layer of users' weights holds; of a quantized weight, its parts."""
    yield from (("weight", part) for _, part in plain_parts(layer.weight.detach()))
    for name, t in layer.named_buffers(recurse=False):
        shared = "importance" if name.startswith("importance") else "memory"
        yield "users" if name in layer.slot_buffers else shared, t
