"""`ModuleWeight`: a weight that only another library's layer can compute with, as that of a layer that learns."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ttt.nn.frozen_weight import FrozenWeight


class ModuleWeight(Tensor):
    """A `FrozenWeight` as the ``weight`` of a layer: it has shape, dtype and device, and computes nothing itself."""

    frozen: FrozenWeight

    @staticmethod
    def __new__(cls, frozen: FrozenWeight, dtype: torch.dtype | None = None) -> ModuleWeight:
        device = frozen.module.weight.device
        made = Tensor._make_wrapper_subclass(cls, frozen.shape, dtype=dtype or frozen.dtype, device=device)
        made.frozen = frozen
        return made

    def __init__(self, frozen: FrozenWeight, dtype: torch.dtype | None = None) -> None:
        pass

    def dequantize(self) -> Tensor:
        """(m, n): all of the weight, as a plain tensor."""
        return self.frozen.dense().to(self.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return list(self.frozen.parts()), None

    def __getattr__(self, name: str) -> Tensor:
        if name in ("stored", "scales", "found"):
            return self.frozen.parts()[name]
        raise AttributeError(name)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ModuleWeight({type(self.frozen.module).__name__}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: dict) -> Any:
        if id(self) not in memo:
            made = ModuleWeight(copy.deepcopy(self.frozen, memo), self.dtype)
            memo[id(self)] = nn.Parameter(made, requires_grad=self.requires_grad)
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs = kwargs or {}
        own = next(each for each in tree_leaves((args, kwargs)) if isinstance(each, ModuleWeight))
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.clone.default):
            return ModuleWeight(own.frozen, own.dtype)
        if func is torch.ops.aten._to_copy.default:
            return ModuleWeight(_on(own.frozen, kwargs.get("device")), kwargs.get("dtype") or own.dtype)
        raise NotImplementedError(
            f"{func} of the weight of a {type(own.frozen.module).__name__}, which is quantized, is not supported; "
            "weight.dequantize() gives a plain tensor"
        )


def _on(frozen: FrozenWeight, device: torch.device | None) -> FrozenWeight:
    """The same weight on ``device``. Of a layer that is on another one it is a copy, and the layer stays there."""
    if device is None or torch.empty(0, device=device).device == frozen.module.weight.device:  # "cuda" is "cuda:0"
        return frozen
    return FrozenWeight(copy.deepcopy(frozen.module).to(device), frozen.dtype)
