"""Which layers of a model `adapt_` replaces, which it leaves out and why. Nothing is changed here."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ttt.adapt.fit import Weights, is_linear, offloads, refuse_parallel, unfit, unfit_type
from ttt.adapt.names import canonical
from ttt.adapt.sharding import refuse_config
from ttt.adapt.stacks import in_layers, outside_language
from ttt.checks import check_layers, check_names
from ttt.config import TTTConfig
from ttt.nn.base import Adapted
from ttt.nn.bnb import mixes_rows
from ttt.nn.experts import is_stack, why_not_gated
from ttt.nn.parallel import is_sharded
from ttt.nn.quantized import quantized, why_blocked

FilterFn = Callable[[nn.Module, str], bool]

_ROUTERS = ("gate", "shared_expert_gate", "router", "classifier", "wg", "gating")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `adapt_` is going to do.

    Attributes:
        chosen: (name, module) of the layers that will learn.
        left_out: what "all-linear" does not take -> why.
        mended: quantized layers that do not learn, through which the library that quantized them passes no gradient, or
            a wrong one: the right one is computed here.
    """

    chosen: list[tuple[str, nn.Module]]
    left_out: dict[str, str]
    mended: list[nn.Module]


def make_plan(model: nn.Module, config: TTTConfig, filter_fn: FilterFn | None) -> Plan:
    """Choose the layers of ``model`` that ``config`` or ``filter_fn`` ask for.

    Raises:
        ValueError: as `adapt_`.
    """
    refuse_parallel(model, fsdp=True)
    refuse_bare(model)
    refuse_adapted(model)
    check_names("target_modules", config.target_modules)
    check_layers("layers", config.layers)
    candidates = [(name, module) for name, module in model.named_modules() if is_linear(module)]
    stacks = [(name, module) for name, module in model.named_modules() if is_stack(module)]
    left_out: dict[str, str] = {}
    per_user = config.per_user is not None
    targets = config.target_modules
    if filter_fn is not None:
        chosen = [(name, module) for name, module in candidates if filter_fn(module, name)]
        if not chosen:
            raise ValueError(f"filter_fn accepted none of {[name for name, _ in candidates]}")
    elif targets is None:
        raise ValueError(
            'target_modules must name the layers to adapt (as ["down_proj"], a regular expression, or "all-linear"), '
            "or filter_fn be given; got None"
        )
    else:
        if targets == "all-linear":
            left_out = _left_out(model, candidates, per_user)
            matched = [(name, module) for name, module in candidates if name not in left_out]
            if not matched:
                raise ValueError(f"target_modules = 'all-linear' leaves no layer to adapt: {left_out}")
        else:
            matched = _matched(model, [*candidates, *stacks], targets)
        names = in_layers([name for name, _ in matched], model, config.layers)
        chosen = [(name, module) for name, module in matched if name in names]
        if not chosen:
            raise ValueError(f"layers = {config.layers!r} leaves none of the matched modules {[n for n, _ in matched]}")
    mended = check_fit(model, chosen, per_user)
    for name, module in chosen:
        if is_sharded(getattr(module, "weight", None)):
            refuse_config(name, config)
    return Plan(chosen, left_out, mended)


def active_matrices(model: nn.Module, name: str, module: nn.Module) -> int:
    """How many matrices of ``module`` a token passes through: of experts, two for each of those it is routed to."""
    if not is_stack(module):
        return 1
    block: Any = model.get_submodule(name.rpartition(".")[0])
    for holder, key in ((block, "top_k"), (getattr(block, "gate", None), "top_k"), (model, "config")):
        found = getattr(holder, key, None)
        found = getattr(found, "num_experts_per_tok", None) if key == "config" else found
        if isinstance(found, int) and found > 0:
            return 2 * found
    return 2


def check_fit(model: nn.Module, chosen: Sequence[tuple[str, nn.Module]], per_user: bool = False) -> list[nn.Module]:
    """Raise ValueError unless all of the ``chosen`` modules of ``model`` can be replaced by learning layers.

    ``per_user``: by those whose own weight is never written.

    Returns:
        See `Plan.mended`.
    """
    refuse_bare(model)
    weights, names = Weights(model), dict[str, str]()
    for name, module in chosen:
        if offloads(module):
            raise ValueError(
                f"{name} has a hook that keeps its weight elsewhere (accelerate's offloading): what it would learn "
                "would be lost; load the model without device_map, or with devices that hold all of it"
            )
        weights.refuse_unfit(name, module, per_user)
        if (other := names.setdefault(canonical(name), name)) != name:
            raise ValueError(f"{name} and {other} would have one name, {canonical(name)}, in files; leave one out")
    return _mended(model, {name for name, _ in chosen}, per_user)


def _mended(model: nn.Module, chosen: set[str], per_user: bool) -> list[nn.Module]:
    """The quantized layers, beside the ``chosen``, whose gradient must be computed here.

    Raises:
        ValueError: if that cannot be done for one of them, or for one of the ``chosen``; or if ``per_user`` and the
            outputs for one user depend on the inputs of another.
    """
    after, known, mended = False, dict[Any, tuple[str, str]](), list[nn.Module]()
    module: Any
    for name, module in model.named_modules():
        after = after or name in chosen
        if not isinstance(module, nn.Linear) or not (by := quantized(module)):
            continue
        if per_user and mixes_rows(module):
            raise ValueError(
                f"{name} ({by}) computes columns with outliers in another way for all rows, so that one user's text "
                "would change another's outputs; quantize with llm_int8_threshold=0.0"
            )
        if not after:
            continue
        weight = module.weight
        packing = getattr(weight, "quant_type", None), getattr(weight, "quant_storage", None)
        size = module.out_features, module.in_features
        learns = name in chosen
        kind = learns, type(module), type(weight), size, weight.device, packing
        if kind not in known:
            why = "" if learns else why_blocked(module)
            known[kind] = why, why_blocked(module, own=True) if why or learns else ""
        why, why_own = known[kind]
        if why_own:
            raise ValueError(
                f"{name} is quantized ({by}) and {why or why_own}: layers before it would learn something wrong; "
                "quantize its weight only, in a way that has gradients (as torchao's Int8WeightOnlyConfig does)"
            )
        if why:
            mended.append(module)
    return mended


def refuse_bare(model: nn.Module) -> None:
    """Raise ValueError if ``model`` is a linear layer: a module can be replaced in the one that holds it only."""
    if is_linear(model):
        raise ValueError(
            f"model must hold the linear layers that are to learn, but it is one itself ({type(model).__name__}), "
            "which cannot be replaced in place; wrap it, as torch.nn.Sequential(model), or make a ttt.nn.Linear"
        )


def refuse_adapted(model: nn.Module) -> None:
    """Raise ValueError if a part of ``model`` is adapted, or a larger model of which it is a part.

    Its layers would have two configurations, of which a learner and a file take one, and two shares of a step.
    """
    placed = [name for name, module in model.named_modules() if isinstance(module, Adapted) and module.placed]
    if placed:
        raise ValueError(
            f"{placed[0]} was adapted before, with a part of this model or with a larger model that holds this one; "
            "adapt all layers that are to learn in one call, after ttt.restore_ of what was adapted"
        )


# -- names --------------------------------------------------------------------------------------------------------


def _matched(
    model: nn.Module, candidates: list[tuple[str, nn.Module]], targets: str | Sequence[str]
) -> list[tuple[str, nn.Module]]:
    """Those of ``candidates`` that ``targets`` name, each of which must name one."""
    for target in [targets] if isinstance(targets, str) else targets:
        wanted = target if isinstance(targets, str) else [target]
        if not any(_matches(name, wanted) for name, _ in candidates):
            _refuse_no_match(model, candidates, wanted)
    if not targets:
        _refuse_no_match(model, candidates, targets)
    return [(name, module) for name, module in candidates if _matches(name, targets)]


def _matches(name: str, targets: str | Sequence[str]) -> bool:
    name = canonical(name)
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, name) is not None
        except re.error as error:
            raise ValueError(f"target_modules = {targets!r} is no regular expression: {error}") from None
    return any(name == target or name.endswith("." + target) for target in targets)


def _refuse_no_match(model: nn.Module, candidates: list[tuple[str, nn.Module]], targets: str | Sequence[str]) -> None:
    for name, module in model.named_modules():
        if name and _matches(name, targets) and (why := unfit_type(name, module)):
            raise ValueError(why)
    for name, parameter in model.named_parameters():
        if _matches(name, targets) or _matches(name.removesuffix(".weight"), targets):
            shape = tuple(parameter.shape)
            holder = name.rpartition(".")[0]
            if parameter.ndim == 3 and is_stack(model.get_submodule(holder)):
                raise ValueError(
                    f"{name} is a stack of experts of shape {shape}, not a linear layer; name {holder!r} or its last "
                    "part in target_modules to adapt all of its matrices"
                )
            kind = "a stack of experts" if parameter.ndim == 3 else "a bare parameter"
            raise ValueError(f"{name} is {kind} of shape {shape}, not a linear layer: it cannot be adapted")
    names = sorted({suffix for name, _ in candidates for suffix in (name, name.rsplit(".", 1)[-1])})
    wanted = [targets] if isinstance(targets, str) else list(targets)
    near = [n for want in wanted for n in difflib.get_close_matches(want, names, n=5, cutoff=0.3)]
    near = list(dict.fromkeys(near)) or names[:10]
    shown = targets if isinstance(targets, str) or len(targets) != 1 else targets[0]
    way = ""
    if isinstance(targets, str) and targets in names:
        way = f"; a string is a regular expression for a layer's whole name: [{targets!r}] means all that end so"
    raise ValueError(f"target_modules: {shown!r} matches no linear layer; the nearest names are {near}{way}")


# -- "all-linear" -------------------------------------------------------------------------------------------------


def _left_out(model: nn.Module, candidates: list[tuple[str, nn.Module]], per_user: bool) -> dict[str, str]:
    """What "all-linear" leaves out -> why: as PEFT the output head, classifiers, and LoRA's own layers; and more."""
    heads, bodies, tuners = _heads(model), _bodies(model), _tuners(model)
    towers = outside_language(model, [name for name, _ in candidates])
    weights, found = Weights(model), dict[str, str]()
    for name, module in candidates:
        if id(module) in heads:
            found[name] = "output head"
        elif any(name.startswith(tuner) and not name.endswith(".base_layer") for tuner in tuners):
            found[name] = "part of an adapter"
        elif any(_within(name, outer) and not _within(name, body) for outer, body in bodies):
            found[name] = "head outside of the model's body, as a classifier"
        elif _is_router(model, name):
            found[name] = "router of experts"
        elif name in towers:
            found[name] = "outside of the language model; name it in target_modules to adapt it"
        elif why := unfit(name, module, per_user):
            found[name] = why
        elif tied := weights.tied(name, module):
            found[name] = f"tied to {tied}"
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and "expert" in name.lower():
            holder, shape = name.rpartition(".")[0], tuple(parameter.shape)
            stack = model.get_submodule(holder)
            can = not per_user and is_stack(stack) and not why_not_gated(stack)
            found[name] = f"a stack of experts of shape {shape}, which " + (
                f"is adapted if target_modules names {holder.rpartition('.')[2]!r}" if can else "cannot be adapted"
            )
    return found


def _heads(model: nn.Module) -> set[int]:
    """ids of the output heads that transformers models name."""
    found = set()
    each: Any
    for each in model.modules():
        if hasattr(each, "get_output_embeddings"):
            try:
                head: Any = each.get_output_embeddings()
            except (AttributeError, NotImplementedError):  # models without one
                continue
            if head is not None:
                found.add(id(head))
    return found


def _bodies(model: nn.Module) -> list[tuple[str, str]]:
    """(name of a transformers model, name of its body), where it has a head beside the body."""
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for name, module in model.named_modules():
        body: Any = getattr(module, "base_model", None) if hasattr(module, "base_model_prefix") else None
        if isinstance(body, nn.Module) and body is not module and id(body) in names:
            found.append((name, names[id(body)]))
    return found


def _tuners(model: nn.Module) -> list[str]:
    """Prefixes of the names inside of PEFT's layers, which hold adapters beside the layer that they wrap."""
    return [
        f"{name}."
        for name, module in model.named_modules()
        if any(kind.__name__ == "BaseTunerLayer" for kind in type(module).__mro__)
    ]


def _within(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def _is_router(model: nn.Module, name: str) -> bool:
    """Whether the layer chooses experts: by its name, beside the experts, or by the names around it."""
    parent, _, leaf = name.rpartition(".")
    if "router" in name.lower():
        return True
    holder = model.get_submodule(parent)
    kind = type(holder).__name__.lower()
    return leaf in _ROUTERS and (hasattr(holder, "experts") or "router" in kind or kind.endswith("gate"))
