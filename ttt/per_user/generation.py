"""What ``generate`` of transformers must know of users: rows that it repeats, and batches that it packs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

from ttt.nn.low_rank import LowRankLinear
from ttt.nn.routing import Routing

_EXPANDS = "_expand_inputs_for_generation"
_GENERATES = "generate"
_PACKS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
# What gets all tokens of the batch as one row after the other, (B T, n): children of these modules, and of these names.
_FLATTENING = ("OPTDecoderLayer",)
_SHARED = ("shared_expert", "shared_experts", "shared_mlp")


def attach_generation(model: nn.Module, routing: Routing) -> None:
    """Let ``generate`` of ``model`` and of the models inside it follow ``routing``."""
    for module in model.modules():
        if hasattr(type(module), _EXPANDS):
            object.__setattr__(module, _EXPANDS, partial(_expand, module, routing))
        if hasattr(type(module), _GENERATES):
            object.__setattr__(module, _GENERATES, partial(_generate, module, routing))
        for name in _PACKS:
            if hasattr(type(module), name):
                object.__setattr__(module, name, partial(_refuse_packing, module, name))
        if type(module).__name__ in _FLATTENING:
            _flatten(module.children())
        for name, child in module.named_children():
            if name in _SHARED:
                _flatten(child.modules())


def _flatten(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        if isinstance(module, LowRankLinear):
            module.flat = True


def detach_generation(model: nn.Module) -> None:
    """Undo `attach_generation`."""
    for module in model.modules():
        for name in (_EXPANDS, _GENERATES, *_PACKS):
            module.__dict__.pop(name, None)


def _expand(module: Any, routing: Routing, expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
    """Repeat the rows of the input ``expand_size`` times, for beams or returned sequences, and so their users."""
    own = inspect.getattr_static(type(module), _EXPANDS).__get__(module, type(module))  # static in older releases
    found = own(expand_size, *args, **kwargs)
    route = routing.route()
    if route is not None:
        route.repeats = expand_size
    return found


def _generate(module: Any, routing: Routing, *args: Any, **kwargs: Any) -> Any:
    """``generate``; the rows that it repeats are users' for as long as it runs."""
    route = routing.route()
    before = 1 if route is None else route.repeats
    try:
        return getattr(type(module), _GENERATES)(module, *args, **kwargs)
    finally:
        if route is not None:
            route.repeats = before


def _refuse_packing(module: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        f"{name} cannot be called on a model ({type(module).__name__}) that was adapted for users: it packs requests "
        "into one row, in a thread of its own, where nobody can tell whose tokens they are; call generate inside "
        "ttt.users(model, [...]), or serve the model by ttt serve"
    )
