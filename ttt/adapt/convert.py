"""`adapt_` and `restore_`: replace linear layers of a model by learning ones, in place, and put them back."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ttt.adapt.fast_path import switch_off_fast_paths, switch_on_fast_paths
from ttt.adapt.fit import is_conv1d, is_linear, refuse_parallel
from ttt.adapt.hooks import move_hooks
from ttt.adapt.names import canonical, unwrapped
from ttt.adapt.plan import FilterFn, active_matrices, make_plan
from ttt.adapt.sharding import local, processes_of, sharding_of, shards_fully
from ttt.adapt.training import refuse_no_more, refuse_when_frozen
from ttt.atomic import whole_write
from ttt.checks import check_bool, check_model, check_type
from ttt.config import TTTConfig
from ttt.layer_lock import exclusive
from ttt.nn import Linear, LowRankLinear
from ttt.nn.experts import STACKS, LearningExperts, is_stack
from ttt.nn.own_gradient import give_own_gradient, take_own_gradients
from ttt.nn.parallel import together
from ttt.nn.quantized import QuantizedLowRankLinear, quantized
from ttt.nn.sharded import ShardedLinear
from ttt.per_user.pool import attach, detach, has_pool, pool_of
from ttt.signals import SignalsDeferred

# Attributes of an adapted model that `restore_` reads: the replaced modules by name, and the parameters with their
# requires_grad from before. They are set past torch's way, so that they are neither modules nor in state_dict.
_ORIGINALS, _FROZEN, _LEFT_OUT = "_ttt_originals", "_ttt_requires_grad", "_ttt_left_out"
_CALLS = itertools.count(1)  # of `adapt_`


def adapt_(model: nn.Module, config: TTTConfig | None = None, filter_fn: FilterFn | None = None) -> nn.Module:
    """Replace linear layers of ``model`` by `ttt.nn.Linear`, in place, and freeze its parameters.

    With ``config.per_user`` they are replaced by `ttt.nn.LowRankLinear`, whose weights never change and may be those of
    torchao's weight-only quantization; see `ttt.users`.

    `nn.Linear`, transformers' ``Conv1D`` and stacks of gated experts can be replaced, these as a whole where
    ``target_modules`` names them (`ttt.nn.experts`). The new layers share the parameters of the old ones, and
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
        ValueError: if nothing matches (the error lists the nearest names), the model, a part of it or a larger one that
            holds it is adapted already, it is a linear layer itself, which cannot be replaced in place, or a match
            cannot learn: tied weights, 3-D expert parameters, a quantized weight without ``config.per_user``, a dtype
            or module type without support, a weight with NaN or infinity.
        MemoryError: if there is too little memory for the state of the layers (on a GPU torch.OutOfMemoryError).
    """
    check_model(model)
    if config is not None:
        check_type("config", config, TTTConfig, "a ttt.TTTConfig or None")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be a function of (module, name) or None, got {type(filter_fn).__name__}")
    whole, model, config = model, unwrapped(model), config or TTTConfig()
    if hasattr(model, _ORIGINALS):
        raise ValueError("model is adapted already; ttt.restore_(model) first")
    plan = make_plan(model, config, filter_fn)
    chosen = plan.chosen
    _warn_of_left_out(plan.left_out)
    make: Callable[[Any, TTTConfig, str], Any] = _learning_layer
    if config.per_user is not None:
        make = functools.partial(_low_rank_layer, dtype=_floating_dtype(model))
    number = next(_CALLS)
    share = 1 / sum(active_matrices(model, name, module) for name, module in chosen)
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    placed: list[tuple[str, nn.Module]] = []
    try:
        # All layers are made before one is placed: that takes the memory, and is what fails if there is too little.
        layers = {name: _made(make, module, config, canonical(name)) for name, module in chosen}
        for name, module in chosen:
            layers[name].train(module.training)
            for layer in getattr(layers[name], "layers", [layers[name]]):  # of experts, each of their matrices
                layer.share, layer.placed = share, number
            placed.append((name, module))
            move_hooks(module, layers[name])
            _set_module(model, name, layers[name])
        for p in model.parameters():
            p.requires_grad_(False)
        if config.per_user is not None:
            pooled = {canonical(n): layer for n, layer in layers.items() if isinstance(layer, LowRankLinear)}
            attach(model, pooled)
        switch_off_fast_paths(model, layers)
        for module in plan.mended:
            give_own_gradient(module)
        object.__setattr__(model, _ORIGINALS, dict(chosen))
        object.__setattr__(model, _LEFT_OUT, plan.left_out)
        object.__setattr__(model, _FROZEN, frozen)
        refuse_when_frozen(model)
    except BaseException:
        for name, module in placed:
            move_hooks(layers[name], module)
            _set_module(model, name, module)
        for p, requires_grad in frozen:  # the layers share the parameters and have switched it off
            p.requires_grad_(requires_grad)
        for attribute in (_ORIGINALS, _FROZEN, _LEFT_OUT):
            model.__dict__.pop(attribute, None)
        refuse_no_more(model)
        switch_on_fast_paths(model)
        take_own_gradients(model)
        if has_pool(model):
            detach(model)
        raise
    return whole


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
    whole, model = model, unwrapped(check_model(model))
    originals = _originals(model)
    check_bool("keep_learned", keep_learned)
    if not has_pool(model):
        placed: dict[str, Any] = {name: model.get_submodule(name) for name in originals}
        layers = [layer for module in placed.values() for layer in getattr(module, "layers", [module])]
        with contextlib.ExitStack() as held:
            with together(processes_of(model), "ttt.restore_"):
                held.enter_context(exclusive(layers, "ttt.restore_", repairs=not keep_learned))
                _originals(model)  # another thread may have restored the model meanwhile
                if any(layer.sink is not None for layer in layers):
                    raise RuntimeError("ttt.restore_ was called inside ttt.learning or a rule; leave it first")
            if keep_learned:
                with whole_write(layers, "ttt.restore_"):
                    for layer in layers:
                        layer.flush()
            with SignalsDeferred():
                for name, module in placed.items():
                    if isinstance(module, LearningExperts):
                        _put_back_experts(module, originals[name], keep_learned)
                    else:
                        _put_back(module, originals[name], keep_learned)
                _take_out(model, placed, originals)
        return whole
    if keep_learned:
        raise ValueError("keep_learned must be False for a model of many users; pool_of(model).export(user) keeps one")
    pool = pool_of(model)
    with exclusive(list(pool.layers.values()), "ttt.restore_", repairs=True), pool.one_thread(), SignalsDeferred():
        _originals(model)
        pool.require_idle()
        own = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
        for name in originals:  # the weight, shared with the original, never changed
            _follow(originals[name], own[name])
        _take_out(model, {name: own[name] for name in originals}, originals)
        detach(model)
    return whole


def _put_back(layer: Linear, original: Any, keep_learned: bool) -> None:
    """Give ``original`` the weight that ``layer`` learnt, or the one from before."""
    _follow(original, layer)
    learned = layer.weight.detach() if keep_learned else layer.base_weight
    with torch.no_grad():
        if not layer.transposed:
            layer.weight.copy_(learned)  # the parameter is the original module's
        elif keep_learned or not torch.equal(learned.T, original.weight):  # another weight was loaded since
            if "original" in layer.shared:  # a fork of the model holds the same weight
                original.weight.data = torch.empty_like(original.weight)
            original.weight.copy_(learned.T)


def _put_back_experts(experts: LearningExperts, original: Any, keep_learned: bool) -> None:
    """Give the stacks of ``original`` the weights that ``experts`` learnt, or those from before."""
    first = experts.layers[0].weight
    original.to(first.device, first.dtype)  # the model may have been moved or converted since `adapt_`
    with torch.no_grad():
        for stack in STACKS:
            for layer, weight in zip(getattr(experts, stack), getattr(original, stack), strict=True):
                weight.copy_(layer.weight if keep_learned else layer.base_weight)


def _take_out(model: nn.Module, layers: Mapping[str, Any], originals: dict[str, Any]) -> None:
    """Replace ``layers`` in ``model`` by the modules ``originals``, and let parameters require grad as before."""
    for name, layer in layers.items():
        originals[name].train(layer.training)
        move_hooks(layer, originals[name])
        _set_module(model, name, originals[name])
        for each in getattr(layer, "layers", [layer]):
            each.released = True
    for p, requires_grad in getattr(model, _FROZEN):
        p.requires_grad_(requires_grad)
    object.__delattr__(model, _ORIGINALS)
    object.__delattr__(model, _FROZEN)
    object.__delattr__(model, _LEFT_OUT)
    refuse_no_more(model)
    switch_on_fast_paths(model)
    take_own_gradients(model)


def learning_layers(model: nn.Module) -> list[tuple[str, Linear]]:
    """(fully qualified name, layer) of every `ttt.nn.Linear` in ``model``, in the model's order.

    Raises:
        TypeError: if ``model`` is no module.
    """
    modules = unwrapped(check_model(model)).named_modules()
    return [(name, module) for name, module in modules if isinstance(module, Linear)]


def refuse_apart(layers: Sequence[Linear | LowRankLinear]) -> None:
    """Raise ValueError if ``layers`` were adapted in several calls, as with parts of a model.

    They may have several configurations, of which a learner takes one, and each call's would take a whole step.
    """
    calls = len({layer.placed for layer in layers if layer.placed})
    if calls > 1:
        raise ValueError(
            f"model has layers that were adapted in {calls} calls of ttt.adapt_, each with a part of it: call "
            "ttt.restore_ on these parts, and adapt all layers that are to learn in one call"
        )


def require_layers(model: nn.Module, *, sharded: bool = False, replicated: bool = False) -> list[Linear]:
    """The learning layers of ``model``.

    Args:
        sharded: whether layers that are sharded over processes (`ttt.nn.parallel`) will do, or whole ones in a model
            that FSDP2 shards.
        replicated: whether those of a model in DistributedDataParallel will do.

    Raises:
        TypeError: if ``model`` is no module. ValueError: if there is none, the model is wrapped for data parallelism
            and that will not do, or a layer is sharded and that will not do.
    """
    refuse_parallel(check_model(model), fsdp=sharded, ddp=replicated)
    layers = [layer for _, layer in learning_layers(model)]
    if not sharded:
        refuse_sharded(model, "this call")
    if not layers and has_pool(model):
        raise ValueError(
            f"model ({type(model).__name__}) was adapted for users, each with weights of their own, and has no "
            "learning layer that all share: ttt.Learner(model).observe(ids, users=[...]) teaches them, and "
            "pool_of(model).export(user) and .load(user, state) copy what one of them has learnt"
        )
    if not layers:
        raise ValueError(f"model ({type(model).__name__}) has no learning layer; call ttt.adapt_(model, config) first")
    return layers


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Raise ValueError if ``model`` or one of its layers is sharded over processes, with which ``what`` cannot work."""
    sharded = [layer.name or "a layer" for _, layer in learning_layers(model) if layer.sharding]
    if sharded or shards_fully(model):
        which = (
            f"{sharded[0]} is sharded over processes (tensor parallelism)" if sharded else "model is sharded by FSDP2"
        )
        raise ValueError(
            f"{which}, with which {what} does not work; ttt.save(model, path) writes what was learnt so that a model "
            "in one process can load it"
        )


def kept_originals(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that `adapt_` replaced, by name; empty for a model that was built from learning layers."""
    return getattr(model, _ORIGINALS, {})


def left_out(model: nn.Module) -> dict[str, str]:
    """What "all-linear" did not take of an adapted model -> why; empty for other targets."""
    return dict(getattr(model, _LEFT_OUT, {}))


def _warn_of_left_out(found: dict[str, str]) -> None:
    """Warn of what was left out because it is not supported, and not because nobody adapts it."""
    lacking = [f"{name} ({why})" for name, why in found.items() if "adapted" in why]
    if lacking:
        shown = "; ".join(lacking[:4]) + (f"; and {len(lacking) - 4} more" if len(lacking) > 4 else "")
        warnings.warn(
            f"target_modules='all-linear' leaves out {shown}; ttt.info(model=model)['left_out'] lists all",
            stacklevel=3,
        )


def _originals(model: nn.Module) -> dict[str, Any]:
    if not hasattr(model, _ORIGINALS):
        raise ValueError(f"model ({type(model).__name__}) is not adapted; there is nothing to restore")
    return getattr(model, _ORIGINALS)


def linear_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(fully qualified name, module) of every linear layer in ``model``, a transformers ``Conv1D`` included."""
    for name, module in unwrapped(model).named_modules():
        if is_linear(module):
            yield name, module


def weight_of(module: Any) -> Tensor:
    """The weight (m, n) of a linear module: of a ``Conv1D``, which keeps (n, m), a transposed view."""
    return module.weight.detach().T if is_conv1d(module) else module.weight


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


def _learning_layer(module: Any, config: TTTConfig, name: str) -> Linear | LearningExperts:
    if is_stack(module):
        return LearningExperts(module, config, name)
    if sharding := sharding_of(name, module):
        return ShardedLinear.from_weight(local(module.weight), local(module.bias), config, name, sharding)
    if not is_conv1d(module):
        return Linear.from_weight(module.weight, module.bias, config, name)
    # A Conv1D keeps (n, m). The learning layer gets a transposed copy, and the original stays as it is.
    layer = Linear.from_weight(nn.Parameter(module.weight.detach().T.contiguous()), module.bias, config, name)
    layer.transposed = True
    return layer


def _low_rank_layer(module: Any, config: TTTConfig, name: str, dtype: torch.dtype) -> LowRankLinear:
    if not is_conv1d(module):
        if quantized(module):
            return QuantizedLowRankLinear.beside(module, config, name, dtype)
        return LowRankLinear.from_weight(module.weight, module.bias, config, name)
    # A view (m, n) of the Conv1D's weight, which is never written.
    layer = LowRankLinear.from_weight(nn.Parameter(module.weight.detach().T), module.bias, config, name)
    layer.transposed = True
    return layer


def _follow(original: nn.Module, layer: Linear | LowRankLinear) -> None:
    """Give ``original`` the device and dtype of ``layer``, which may have changed since `adapt_`.

    Only modules whose parameters are not the layer's need it: a ``Conv1D``, and one that holds DTensors.
    """
    if layer.transposed:
        original.to(layer.weight.device, layer.weight.dtype)
    if layer.sharding:
        for name, own in layer.named_parameters(recurse=False):
            before = original.get_parameter(name)
            if local(before).data_ptr() != own.data_ptr():
                spread = layer.sharding.dtensor(own.detach())
                setattr(original, name, nn.Parameter(spread, requires_grad=before.requires_grad))


def _floating_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the first parameter of ``model`` that holds floating-point numbers."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
