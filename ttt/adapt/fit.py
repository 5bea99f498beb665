"""What cannot learn: modules, weights and wrappers that `adapt_` refuses, each by name."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from ttt.adapt.hooks import accelerate_hooks, own_forward
from ttt.adapt.sharding import HOW_TO_IGNORE, is_replicated, local, sharding_of, shards_fully
from ttt.nn.base import DTYPES, Adapted, absent
from ttt.nn.experts import STACKS, is_stack, why_not_gated
from ttt.nn.parallel import is_sharded
from ttt.nn.quantized import quantized, why_not
from ttt.nn.row_blocks import can_be_cut, is_subclass
from ttt.ops.dtypes import accumulation

_ALONE = "adapt the model without it, and learn in one process"
_PARALLEL = {  # why it is not supported, and what to do
    "DistributedDataParallel": (
        "its replicas would learn from different tokens and drift apart",
        "adapt the model that it wraps, and learn from what all processes read: ttt.Learner(model, "
        "data_parallel=True) of the model that it wraps, or `with ttt.learning(model, data_parallel=True):`",
    ),
    "DataParallel": ("its replicas would learn in copies that are thrown away", _ALONE),
    "FullyShardedDataParallel": ("it holds a part of each weight only", _ALONE),
    "FSDPModule": ("this needs all weights, of which it holds a part (FSDP2)", _ALONE),
}


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is a ``Conv1D`` of transformers, a linear layer with a transposed weight."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer, of torch or of transformers."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def refuse_parallel(model: nn.Module, *, fsdp: bool = False, ddp: bool = False) -> None:
    """Raise ValueError if ``model`` is prepared for several processes, with which learning would not be right.

    Args:
        fsdp: whether FSDP2 is right, as long as it leaves the layers that learn whole.
        ddp: whether it may be wrapped by DistributedDataParallel.
    """
    for name, module in model.named_modules():
        if ddp and is_replicated(module):
            continue
        if isinstance(module, Adapted) and any(map(is_sharded, module._parameters.values())):
            way = "shard a model before ttt.adapt_"
            if shards_fully(model):
                way = f"leave it out of sharding, by {HOW_TO_IGNORE}"
            raise ValueError(
                f"{name or 'model'}, a layer that learns, is a DTensor since it was adapted: {way}, or learn in one "
                "process (with users always)"
            )
        for kind in type(module).__mro__:
            if kind.__name__ == "FSDPModule" and fsdp:
                continue
            if kind.__name__ in _PARALLEL and kind.__module__.startswith("torch."):
                why, way = _PARALLEL[kind.__name__]
                raise ValueError(f"{name or 'model'} is a {kind.__name__}, which is not supported: {why}; {way}")


def unfit_type(name: str, module: Any) -> str:
    """Why a module of this type cannot be replaced; empty if it can."""
    kind = type(module)
    if kind is nn.Linear or is_conv1d(module):
        return ""
    held = Counter(p.ndim for p in module.parameters(recurse=False))
    why = "holds 3-D expert parameters" if held[3] else f"is {kind.__module__}.{kind.__name__}"
    return (
        f"{name} {why}; only torch.nn.Linear, transformers' Conv1D and stacks of gated experts without biases can be "
        "adapted"
    )


def unfit(name: str, module: Any, per_user: bool) -> str:
    """Why ``module`` cannot be replaced, by its type or because of what its weight is; empty if it can."""
    for key in ("weight", "bias"):
        if isinstance(module.__dict__.get(key), Tensor):
            return (
                f"{name}.{key} is computed from other parameters before each forward pass, as by weight_norm, "
                f"spectral_norm or prune of torch.nn.utils: {name} cannot be adapted. Make it a parameter again "
                "(remove_weight_norm, remove_spectral_norm, prune.remove), or leave the layer out"
            )
    if why := own_forward(module):
        return f"{name} {why}"
    if not (by := quantized(module)):
        return unfit_type(name, module)
    if why := why_not(module):
        return (
            f"{name} is quantized ({by}), and {why}: it cannot be adapted. Users' low-rank weights can learn beside "
            "layers of which torchao quantizes the weight only, as Int8WeightOnlyConfig does, and beside those of "
            "bitsandbytes with 4 bits, or with 8 bits and llm_int8_threshold=0.0"
        )
    if per_user:
        return ""
    return (
        f"{name} is quantized ({by}): its weight cannot be rewritten, so it cannot be adapted itself; users' low-rank "
        "weights can learn beside it: TTTConfig(per_user=ttt.LowRank(slots=1)) for a single user"
    )


class Weights:
    """The parameters and buffers of a model, to find those that share memory."""

    def __init__(self, model: nn.Module) -> None:
        self._fully_sharded = shards_fully(model)
        self._names: dict[int, list[str]] = {}
        held: dict[int, tuple[str, Tensor]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), []).append(name)
            held.setdefault(id(parameter), (name, parameter))
        for name, buffer in model.named_buffers():
            held.setdefault(id(buffer), (name, buffer))
        self._by_storage: dict[int, list[tuple[str, Tensor]]] = {}
        for name, t in held.values():
            if _in_memory(t):
                self._by_storage.setdefault(t.untyped_storage().data_ptr(), []).append((name, t))

    def tied(self, name: str, module: Any) -> list[str]:
        """Other names of the weight of ``module``."""
        return self._tied(f"{name}.weight", module.weight)

    def _tied(self, name: str, weight: Tensor) -> list[str]:
        return [other for other in self._names.get(id(weight), []) if other != name]

    def _overlapping(self, weight: Tensor) -> list[str]:
        """Names of other parameters and buffers that share memory with ``weight``."""
        if not _in_memory(weight) or not weight.numel():
            return []
        first, last = _span(weight)
        beside = self._by_storage.get(weight.untyped_storage().data_ptr(), [])
        return [n for n, t in beside if t is not weight and t.numel() and _span(t)[0] <= last and first <= _span(t)[1]]

    def refuse_unfit(self, name: str, module: Any, per_user: bool) -> None:
        """Raise ValueError unless ``module`` can be replaced by what learns."""
        if is_stack(module):
            if per_user:
                raise ValueError(
                    f"{name} is a stack of experts: users cannot learn in it, as the number of tokens that an expert "
                    "gets, and so the rounding of a user's outputs, would depend on other users' text; leave it out"
                )
            for stack in STACKS:
                self._refuse_weight(f"{name}.{stack}", getattr(module, stack))
            if why := why_not_gated(module):
                raise ValueError(
                    f"{name} ({type(module).__name__}) is a stack of experts that {why}, so it cannot be adapted; "
                    "leave it out"
                )
            return
        if why := unfit(name, module, per_user):
            raise ValueError(why)
        if not per_user and not is_conv1d(module) and not self._fully_sharded and sharding_of(name, module):
            self._refuse_weight(f"{name}.weight", local(module.weight), module.weight)
            return
        if is_subclass(module.weight) and not quantized(module) and not absent(module.weight):
            kind = type(module.weight).__name__
            raise ValueError(f"{name}.weight is a {kind}, not a plain tensor; it cannot learn")
        packed = bool(quantized(module)) and not can_be_cut(module)
        self._refuse_weight(f"{name}.weight", module.weight, packed=packed)

    def _refuse_weight(self, name: str, weight: Tensor, whole: Tensor | None = None, *, packed: bool = False) -> None:
        """Raise ValueError unless the parameter ``weight``, of that ``name``, can be the weight of a learning layer.

        ``whole`` is the DTensor of which ``weight`` is a part; ``packed``: it is read by its own layer only.
        """
        if why := absent(weight):
            way = f"Leave it out of sharding, by {HOW_TO_IGNORE}, or load" if self._fully_sharded else "Load"
            raise ValueError(f"{name} {why}; it cannot learn. {way} the whole model first, in one process")
        if tied := self._tied(name, weight if whole is None else whole):
            raise ValueError(f"{name} is tied to {tied}: learning in one would change the other; leave it out")
        if packed:
            return
        if weight.dtype not in DTYPES:
            raise ValueError(f"{name} is {weight.dtype}; it must be one of {[str(d) for d in DTYPES]}")
        if not weight.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {weight.stride()}")
        if shared := self._overlapping(weight):
            raise ValueError(
                f"{name} shares its memory with {shared}: learning in one would change the other; leave it out, or "
                "give it memory of its own"
            )
        if whole is None and (wrong := count_not_finite(weight)):  # of a part, other processes would not hear
            raise ValueError(
                f"{name} must be finite to learn, but {wrong} of its {weight.numel()} numbers are NaN or infinite: "
                "repair the model, or leave it out"
            )


def offloads(module: Any) -> bool:
    """Whether a hook of accelerate keeps the weights of ``module`` elsewhere and puts them in place for each call."""
    return any(getattr(each, "offload", False) for each in accelerate_hooks(module))


def count_not_finite(weight: Tensor) -> int:
    """How many numbers of ``weight`` are NaN or infinite; 0 also for a quantized one."""
    if is_subclass(weight):
        return 0
    weight = weight.detach()
    total = weight.sum(dtype=accumulation(weight.dtype))  # is read once, and holds what is not finite
    if bool(total.isfinite()):
        return 0
    return int(weight.isfinite().logical_not_().sum())


def _in_memory(t: Tensor) -> bool:
    return t.layout is torch.strided and not t.is_meta and type(t) in (Tensor, nn.Parameter)


def _span(t: Tensor) -> tuple[Any, Any]:
    """The first and the last byte of ``t`` in its storage."""
    first = t.storage_offset() * t.element_size()
    reach = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return first, first + (reach + 1) * t.element_size() - 1
