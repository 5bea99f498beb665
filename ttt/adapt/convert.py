"""`adapt_` and `restore_`: replace linear layers of a model by learning ones, in place, and put them back."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ttt.atomic import whole_write
from ttt.checks import check_bool, check_layers, check_model, check_names, check_type, last_blocks
from ttt.config import TTTConfig
from ttt.layer_lock import exclusive
from ttt.nn import Linear, LowRankLinear
from ttt.nn.base import DTYPES
from ttt.per_user.pool import attach, detach, has_pool, pool_of
from ttt.signals import SignalsDeferred

_INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
# Attributes of an adapted model that `restore_` reads: the replaced modules by name, and the parameters with their
# requires_grad from before. They are set past torch's way, so that they are neither modules nor in state_dict.
_ORIGINALS, _FROZEN = "_ttt_originals", "_ttt_requires_grad"

FilterFn = Callable[[nn.Module, str], bool]


def adapt_(model: nn.Module, config: TTTConfig | None = None, filter_fn: FilterFn | None = None) -> nn.Module:
    """Replace linear layers of ``model`` by `ttt.nn.Linear`, in place, and freeze its parameters.

    With ``config.per_user`` they are replaced by `ttt.nn.LowRankLinear`, whose weights never change; see `ttt.users`.

    `nn.Linear` and transformers' ``Conv1D`` can be replaced. The new layers share the parameters of the old ones, and
    hold a copy of the weight, the anchor. Whatever goes wrong, running out of memory included, the model is left as it
    was: modules, parameters and their ``requires_grad``.

    Args:
        config: how the layers learn, and which they are: ``target_modules`` and ``layers``, unless ``filter_fn`` is
            given. None: `TTTConfig`'s defaults, which need ``filter_fn``.
        filter_fn: called with (module, fully qualified name) of every linear layer; True for those to replace.

    Returns:
        ``model``.

    Raises:
        TypeError: if ``model`` is no module, ``config`` no `TTTConfig`, or ``filter_fn`` no function.
        ValueError: if nothing matches (the error lists the nearest names), the model is adapted already, it is a linear
            layer itself, which cannot be replaced in place, or a match cannot learn: tied weights, 3-D expert
            parameters, a dtype or module type without support.
        MemoryError: if there is too little memory for the state of the layers (on a GPU torch.OutOfMemoryError).
    """
    check_model(model)
    if config is not None:
        check_type("config", config, TTTConfig, "a ttt.TTTConfig or None")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be a function of (module, name) or None, got {type(filter_fn).__name__}")
    _refuse_bare(model)
    config = config or TTTConfig()
    if hasattr(model, _ORIGINALS):
        raise ValueError("model is adapted already; ttt.restore_(model) first")
    chosen = _choose(model, config, filter_fn)
    check_adaptable(model, chosen)
    make = _learning_layer if config.per_user is None else _low_rank_layer
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    placed: list[tuple[str, nn.Module]] = []
    try:
        # All layers are made before one is placed: that takes the memory, and is what fails if there is too little.
        layers = {name: _made(make, module, config, name) for name, module in chosen}
        for name, module in chosen:
            layers[name].train(module.training)
            layers[name].share = 1 / len(layers)
            placed.append((name, module))
            _set_module(model, name, layers[name])
        for p in model.parameters():
            p.requires_grad_(False)
        if config.per_user is not None:
            attach(model, {name: layer for name, layer in layers.items() if isinstance(layer, LowRankLinear)})
        object.__setattr__(model, _ORIGINALS, dict(chosen))
        object.__setattr__(model, _FROZEN, frozen)
    except BaseException:
        for name, module in placed:
            _set_module(model, name, module)
        for p, requires_grad in frozen:  # the layers share the parameters and have switched it off
            p.requires_grad_(requires_grad)
        for attribute in (_ORIGINALS, _FROZEN):
            model.__dict__.pop(attribute, None)
        if has_pool(model):
            detach(model)
        raise
    return model


def restore_(model: nn.Module, keep_learned: bool = False) -> nn.Module:
    """Put the modules that `adapt_` replaced back, in place.

    The learning layers are not in use afterwards: their ``released`` is True.

    Args:
        keep_learned: False: the weights are bit-identical to those before `adapt_`. True: they hold what was
            learnt, the window included.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: if ``model`` is no module or not adapted, or ``keep_learned`` no bool or True for a model
            whose users learnt, each something else. Nothing has changed then.
        RuntimeError: if another thread is in a method of the model's learners or in `ttt.learning`; inside of
            `ttt.users` or `ttt.learning`; with ``keep_learned``, if a write to the layers ended half-way.
    """
    originals = _originals(check_model(model))
    check_bool("keep_learned", keep_learned)
    if not has_pool(model):
        layers = [(name, layer) for name, layer in learning_layers(model) if name in originals]
        with exclusive([layer for _, layer in layers], "ttt.restore_", repairs=not keep_learned):
            _originals(model)  # another thread may have restored the model meanwhile
            if any(layer.sink is not None for _, layer in layers):
                raise RuntimeError("ttt.restore_ was called inside ttt.learning or a rule; leave it first")
            if keep_learned:
                with whole_write([layer for _, layer in layers], "ttt.restore_"):
                    for _, layer in layers:
                        layer.flush()
            with SignalsDeferred():
                for name, layer in layers:
                    _put_back(layer, originals[name], keep_learned)
                _take_out(model, dict(layers), originals)
        return model
    if keep_learned:
        raise ValueError("keep_learned must be False for a model of many users; pool_of(model).export(user) keeps one")
    pool = pool_of(model)
    with exclusive(list(pool.layers.values()), "ttt.restore_", repairs=True), pool.one_thread(), SignalsDeferred():
        _originals(model)
        pool.require_idle()
        for name, own in pool.layers.items():  # their weight, shared with the original, never changed
            _follow(originals[name], own)
        _take_out(model, pool.layers, originals)
        detach(model)
    return model


def _put_back(layer: Linear, original: Any, keep_learned: bool) -> None:
    """Give ``original`` the weight that ``layer`` learnt, or the one from before."""
    _follow(original, layer)
    learned = layer.weight.detach() if keep_learned else layer.base_weight
    with torch.no_grad():
        if not layer.transposed:
            layer.weight.copy_(learned)  # the parameter is the original module's
        elif keep_learned:
            if "original" in layer.shared:  # a fork of the model holds the same weight
                original.weight.data = torch.empty_like(original.weight)
            original.weight.copy_(learned.T)


def _take_out(model: nn.Module, layers: Mapping[str, Linear | LowRankLinear], originals: dict[str, Any]) -> None:
    """Replace ``layers`` in ``model`` by the modules ``originals``, and let parameters require grad as before."""
    for name, layer in layers.items():
        originals[name].train(layer.training)
        _set_module(model, name, originals[name])
        layer.released = True
    for p, requires_grad in getattr(model, _FROZEN):
        p.requires_grad_(requires_grad)
    object.__delattr__(model, _ORIGINALS)
    object.__delattr__(model, _FROZEN)


def learning_layers(model: nn.Module) -> list[tuple[str, Linear]]:
    """(fully qualified name, layer) of every `ttt.nn.Linear` in ``model``, in the model's order.

    Raises:
        TypeError: if ``model`` is no module.
    """
    check_model(model)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Linear)]


def require_layers(model: nn.Module) -> list[Linear]:
    """The learning layers of ``model``.

    Raises:
        TypeError: if ``model`` is no module. ValueError: if there is none.
    """
    layers = [layer for _, layer in learning_layers(model)]
    if not layers and has_pool(model):
        raise ValueError(
            f"model ({type(model).__name__}) was adapted for users, each with weights of their own, and has no "
            "learning layer that all share; ttt.pool_of(model) holds its users"
        )
    if not layers:
        raise ValueError(f"model ({type(model).__name__}) has no learning layer; call ttt.adapt_(model, config) first")
    return layers


def kept_originals(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that `adapt_` replaced, by name; empty for a model that was built from learning layers."""
    return getattr(model, _ORIGINALS, {})


def _originals(model: nn.Module) -> dict[str, Any]:
    if not hasattr(model, _ORIGINALS):
        raise ValueError(f"model ({type(model).__name__}) is not adapted; there is nothing to restore")
    return getattr(model, _ORIGINALS)


def _is_conv1d(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def linear_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(fully qualified name, module) of every linear layer in ``model``, a transformers ``Conv1D`` included."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or _is_conv1d(module):
            yield name, module


def weight_of(module: Any) -> Tensor:
    """The weight (m, n) of a linear module: of a ``Conv1D``, which keeps (n, m), a transposed view."""
    return module.weight.detach().T if _is_conv1d(module) else module.weight


def check_adaptable(model: nn.Module, chosen: list[tuple[str, nn.Module]]) -> None:
    """Raise ValueError unless all of the ``chosen`` modules of ``model`` can be replaced by learning layers."""
    _refuse_bare(model)
    tied = _tied_weights(model)
    for name, module in chosen:
        _refuse_unfit(name, module, tied)


def _refuse_bare(model: nn.Module) -> None:
    """Raise ValueError if ``model`` is a linear layer: a module can be replaced in the one that holds it only."""
    if any(name == "" for name, _ in linear_modules(model)):
        raise ValueError(
            f"model must hold the linear layers that are to learn, but it is one itself ({type(model).__name__}), "
            "which cannot be replaced in place; wrap it, as torch.nn.Sequential(model), or make a ttt.nn.Linear"
        )


def _choose(model: nn.Module, config: TTTConfig, filter_fn: FilterFn | None) -> list[tuple[str, nn.Module]]:
    check_names("target_modules", config.target_modules)
    check_layers("layers", config.layers)
    candidates = list(linear_modules(model))
    if filter_fn is not None:
        chosen = [(name, module) for name, module in candidates if filter_fn(module, name)]
        if not chosen:
            raise ValueError(f"filter_fn accepted none of {[name for name, _ in candidates]}")
        return chosen
    targets = config.target_modules
    if targets is None:
        raise ValueError(
            'target_modules must name the layers to adapt (as ["down_proj"], a regular expression, or "all-linear"), '
            "or filter_fn be given; got None"
        )
    matched = [(n, m) for n, m in candidates if targets == "all-linear" or _matches(n, targets)]
    if not matched:
        _refuse_no_match(model, candidates, targets)
    chosen = [(n, m) for n, m in matched if n in _names_in_layers([n for n, _ in matched], model, config.layers)]
    if not chosen:
        raise ValueError(f"layers = {config.layers!r} leaves none of the matched modules {[n for n, _ in matched]}")
    return chosen


def _matches(name: str, targets) -> bool:
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, name) is not None
        except re.error as error:
            raise ValueError(f"target_modules = {targets!r} is no regular expression: {error}") from None
    return any(name == target or name.endswith("." + target) for target in targets)


def _refuse_no_match(model: nn.Module, candidates: list[tuple[str, nn.Module]], targets) -> None:
    for name, module in model.named_modules():
        if name and _matches(name, targets):
            _refuse_unfit(name, module, {})
    for name, parameter in model.named_parameters():
        if _matches(name, targets) or _matches(name.removesuffix(".weight"), targets):
            shape = tuple(parameter.shape)
            kind = "a stack of experts" if parameter.ndim == 3 else "a bare parameter"
            raise ValueError(f"{name} is {kind} of shape {shape}, not a linear layer: it cannot be adapted")
    names = sorted({suffix for name, _ in candidates for suffix in (name, name.rsplit(".", 1)[-1])})
    wanted = [targets] if isinstance(targets, str) else list(targets)
    near = [n for want in wanted for n in difflib.get_close_matches(want, names, n=5, cutoff=0.3)]
    near = list(dict.fromkeys(near)) or names[:10]
    raise ValueError(f"target_modules = {targets!r} matches no linear layer; the nearest names are {near}")


def _names_in_layers(names: list[str], model: nn.Module, layers) -> set[str]:
    if layers == "all":
        return set(names)
    index = {name: int(found.group(1)) for name in names if (found := _INDEX.search(name))}
    if not index:
        raise ValueError(f"layers = {layers!r} needs numbered modules; none of {names} has a number in its name")
    prefixes = {name[: _INDEX.search(name).start(1)] for name in index}  # type: ignore[union-attr]
    count = 1 + max(
        int(found.group(1))
        for name, _ in model.named_modules()
        if (found := _INDEX.search(name)) and name[: found.start(1)] in prefixes
    )
    if isinstance(layers, str):
        last = last_blocks(layers)
        assert last is not None  # `TTTConfig` checked it
        if isinstance(last, float):
            last = math.ceil(last * count)
        if last > count:
            raise ValueError(f"layers = {layers!r} asks for more than the model's {count} blocks; last:{count} is all")
        wanted = set(range(count - last, count))
    else:
        wanted = set()
        for i in layers:
            if not -count <= i < count:
                raise ValueError(
                    f"layers holds {i}; the model has {count} blocks, so it must be in [{-count}, {count})"
                )
            wanted.add(i % count)
    return {name for name, i in index.items() if i in wanted}


def _tied_weights(model: nn.Module) -> dict[int, list[str]]:
    """id of each parameter that has several names -> the names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {key: found for key, found in names.items() if len(found) > 1}


def _refuse_unfit(name: str, module: Any, tied: dict[int, list[str]]) -> None:
    kind = type(module)
    if kind is not nn.Linear and not _is_conv1d(module):
        held = Counter(p.ndim for p in module.parameters(recurse=False))
        why = "holds 3-D expert parameters" if held[3] else f"is {kind.__module__}.{kind.__name__}"
        raise ValueError(f"{name} {why}; only torch.nn.Linear and transformers' Conv1D can be adapted")
    weight = module.weight
    if id(weight) in tied:
        others = [other for other in tied[id(weight)] if other != f"{name}.weight"]
        raise ValueError(f"{name}.weight is tied to {others}: learning in one would change the other; leave it out")
    if weight.dtype not in DTYPES:
        raise ValueError(f"{name}.weight is {weight.dtype}; it must be one of {[str(d) for d in DTYPES]}")
    if weight.is_meta:
        raise ValueError(f"{name}.weight is on the meta device; load the model's weights first")


def _made(make: Callable[[Any, TTTConfig, str], Any], module: Any, config: TTTConfig, name: str) -> Any:
    """The layer that ``make`` makes, whose failure for want of memory says what sets how much it takes."""
    try:
        return make(module, config, name)
    except RuntimeError as error:
        if type(error) is not RuntimeError or "allocate memory" not in str(error):
            raise
        sizes = {"window": config.window, "replay_capacity": config.replay_capacity}
        if config.per_user is not None:
            sizes = {f"per_user.{key}": value for key, value in dataclasses.asdict(config.per_user).items()} | sizes
        given = ", ".join(f"{key} = {value}" for key, value in sizes.items())
        raise MemoryError(f"there is too little memory for the state of layer {name} with {given} ({error})") from None


def _learning_layer(module: Any, config: TTTConfig, name: str) -> Linear:
    if not _is_conv1d(module):
        if not module.weight.is_contiguous():
            raise ValueError(f"{name}.weight must be contiguous, got strides {module.weight.stride()}")
        return Linear.from_weight(module.weight, module.bias, config, name)
    # A Conv1D keeps (n, m). The learning layer gets a transposed copy, and the original stays as it is.
    layer = Linear.from_weight(nn.Parameter(module.weight.detach().T.contiguous()), module.bias, config, name)
    layer.transposed = True
    return layer


def _low_rank_layer(module: Any, config: TTTConfig, name: str) -> LowRankLinear:
    if not _is_conv1d(module):
        return LowRankLinear.from_weight(module.weight, module.bias, config, name)
    # A view (m, n) of the Conv1D's weight, which is never written.
    layer = LowRankLinear.from_weight(nn.Parameter(module.weight.detach().T), module.bias, config, name)
    layer.transposed = True
    return layer


def _follow(original: nn.Module, layer: Linear | LowRankLinear) -> None:
    """Give ``original`` the device and dtype of ``layer``, which may have changed since `adapt_`.

    Only a ``Conv1D``, whose weight is not the layer's, needs it.
    """
    original.to(layer.weight.device, layer.weight.dtype)


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
