"""Layers whose weight is spread over processes before they are adapted: how it is, and what of it is supported."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ttt.config import TTTConfig
from ttt.nn.base import Adapted
from ttt.nn.low_rank import LowRankLinear
from ttt.nn.parallel import UNSHARDED, Sharding, SharedSide, groups_of, is_sharded

HOW_TO_IGNORE = "fully_shard(module, ignored_params={parameters of the layers that learn})"
"""The call, for error messages, that leaves the layers that learn out of sharding by FSDP2."""


def is_fully_sharded(kind: type) -> bool:
    """Whether ``kind`` is a class that FSDP2 (``fully_shard``) gives to a module."""
    return any(base.__name__ == "FSDPModule" and base.__module__.startswith("torch.") for base in kind.__mro__)


def shards_fully(model: nn.Module) -> bool:
    """Whether FSDP2 shards a part of ``model``."""
    return any(map(is_fully_sharded, set(map(type, model.modules()))))


def is_distributed() -> bool:
    """Whether this process belongs to a group, so that a model may be sharded."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_replicated(model: Any) -> bool:
    """Whether ``model`` is wrapped by torch's DistributedDataParallel."""
    return is_distributed() and isinstance(model, nn.parallel.DistributedDataParallel)


def refuse_unjoined(model: nn.Module) -> None:
    """Raise ValueError unless ``model`` can learn with ``data_parallel=True``: each process from a text of its own."""
    if not is_distributed():
        raise ValueError(
            "data_parallel must be False in a process that belongs to no group: nothing says which processes share the "
            "model; call torch.distributed.init_process_group in each of them first"
        )
    if not shards_fully(model) and any(map(is_sharded, model.parameters())):
        raise ValueError(
            "data_parallel must be False for a model of which a part is sharded, but not by FSDP2 (tensor "
            "parallelism): all processes that share it must read the same text"
        )
    if any(isinstance(module, LowRankLinear) for module in model.modules()):
        raise ValueError(
            "data_parallel must be False for a model whose users have weights of their own, whose slots all processes "
            "keep the same"
        )
    if sharded := [module.name for module in model.modules() if isinstance(module, Adapted) and module.sharding]:
        raise ValueError(
            f"data_parallel must be False where a layer that learns is sharded (tensor parallelism), as {sharded[0]}: "
            "all processes that share it must read the same text"
        )


def processes_of(model: nn.Module, joins: bool = False) -> list[SharedSide]:
    """A side for each group of processes over which ``model`` is sharded, in which all must do the same.

    They are those of its learning layers, and of all other parameters that are sharded. Empty for one process.

    Args:
        joins: whether each process learns from what all have read (``data_parallel``). If nothing is sharded, the
            processes are then those of DistributedDataParallel, which may wrap the model, or of the default group.
    """
    if not is_distributed():
        return []
    each: Any
    for each in model.modules():
        if hasattr(each, "reshard"):  # after a forward pass, FSDP2 may have parameters that are whole, and no DTensors
            each.reshard()
    sides = groups_of(module.sharding for module in model.modules() if isinstance(module, Adapted))
    found = {id(side.group): side for side in sides}
    for each in model.parameters():
        if is_sharded(each):
            mesh = each.device_mesh
            for dim in range(mesh.ndim):
                group = mesh.get_group(dim)
                found.setdefault(id(group), SharedSide(group, (1,) * mesh.size(dim), each.to_local().device))
    if joins and not found:
        each = model
        default = torch.distributed.group.WORLD
        replicas: Any = each.process_group if is_replicated(model) else default
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        return [SharedSide(replicas, (1,) * torch.distributed.get_world_size(replicas), device)]
    return list(found.values())


def local(parameter: Any) -> Any:
    """This process's part of ``parameter``, a parameter on the same memory; one that is no DTensor is returned."""
    if not is_sharded(parameter):
        return parameter
    return nn.Parameter(parameter.detach().to_local(), requires_grad=parameter.requires_grad)


def sharding_of(name: str, module: Any) -> Sharding:
    """How the weight of ``module``, a linear layer, is spread over processes.

    Raises:
        ValueError: if it is in a way in which it cannot learn.
    """
    weight: Any = module.weight
    bias: Any = getattr(module, "bias", None)
    if not is_sharded(weight):
        return UNSHARDED
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = weight.device_mesh, tuple(weight.placements)
    if mesh.ndim != 1 or type(placements[0]) is not Shard:
        raise ValueError(
            f"{name}.weight is a DTensor with placements {placements} on a mesh of {mesh.ndim} dimensions; only "
            "tensor parallelism over one dimension can learn, with a weight that is Shard(0) (ColwiseParallel) or "
            "Shard(1) (RowwiseParallel)"
        )
    dim, group = placements[0].dim % 2, mesh.get_group()
    sizes = _sizes(weight.shape[dim], mesh.size())
    part = weight.detach().to_local()
    if 0 in sizes or part.shape[dim] != sizes[mesh.get_local_rank()]:
        raise ValueError(
            f"{name}.weight of shape {tuple(weight.shape)} is sharded unevenly over {mesh.size()} processes, and this "
            f"one holds {tuple(part.shape)}; each must hold a part of equal size, but the last, and none may be empty"
        )
    wanted: Any = Shard(0) if dim == 0 else Replicate()
    held = tuple(bias.placements) if is_sharded(bias) else (Replicate(),)
    if bias is not None and held != (wanted,):
        raise ValueError(f"{name}.bias has placements {held} beside a weight of {placements}; it must have {wanted}")
    _refuse_layouts(name, module, dim)
    side = SharedSide(group, sizes, part.device)
    return Sharding(output=side, mesh=mesh) if dim == 0 else Sharding(input=side, mesh=mesh)


def _sizes(size: int, processes: int) -> tuple[int, ...]:
    """How many of ``size`` rows or columns each process holds; as `torch.chunk` cuts them."""
    each = -(-size // processes)
    return tuple(max(0, min(each, size - rank * each)) for rank in range(processes))


def _refuse_layouts(name: str, module: Any, dim: int) -> None:
    """Raise ValueError if transformers has wrapped the forward pass of ``module`` in an unsupported way.

    What torch's ``parallelize_module`` does to inputs and outputs is in hooks, which the learning layer takes over.
    """
    wrapper = vars(module).get("forward")
    if wrapper is None:
        return
    from torch.distributed.tensor import Replicate, Shard

    style = inspect.getclosurevars(wrapper).nonlocals.get("self") if inspect.isfunction(wrapper) else None
    wanted = (Replicate(), Shard(-1), True) if dim == 0 else (Shard(-1), Replicate(), True)
    found = tuple(getattr(style, key, None) for key in ("input_layouts", "output_layouts", "use_local_output"))
    kind = "ColwiseParallel" if dim == 0 else "RowwiseParallel"
    if type(style).__name__ != kind or found != wanted:
        raise ValueError(
            f"{name} has a forward pass wrapped by {type(style).__name__} with layouts {found}, which is not "
            "supported; of transformers' tp_plan, layers that are 'colwise' or 'rowwise' can learn"
        )


def refuse_config(name: str, config: TTTConfig) -> None:
    """Raise ValueError if a sharded layer cannot learn with ``config``."""
    if config.state_dtype == "8bit":
        raise ValueError(
            f"state_dtype must be 'float32' or 'bfloat16' for {name}, which is sharded over processes, got '8bit'"
        )
