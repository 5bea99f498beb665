"""What the layers that stand in for `nn.Linear` share: how they are made, their buffers, their place in state_dict."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from ttt.config import TTTConfig
from ttt.ops import log8
from ttt.ops.schema import _FLOATS

DTYPES = _FLOATS
"""Of weights that can be adapted."""

Layout = dict[str, "tuple[tuple[int, ...], torch.dtype] | None"]
"""Buffer -> its shape and dtype; None for one that the configuration does without."""

_SEED_MASK = (1 << 63) - 1


class Adapted(torch.nn.Linear):
    """A linear layer made anew or around existing parameters, none of which receives a gradient.

    With ``transposed`` True, ``weight`` (m, n) is saved and loaded as (n, m), as GPT-2's ``Conv1D`` has it. Converted
    to another dtype (``model.to(torch.bfloat16)``, ``.half()``, ...), its weights and what is stored like them are
    rounded to it; sums, steps and counters keep the dtypes that they have beside weights of the new one.
    """

    transposed = False
    torn = ""  # which write to several layers ended half-way at or beside this one; empty where none did
    _binding: Any = None  # its tensors' addresses, for the kernels; made by `ttt.nn.cpu_binding.binding_of`

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        config: TTTConfig | None = None,
        name: str = "",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._build(config or self._default_config(), name)

    @classmethod
    def from_weight(cls, weight: torch.nn.Parameter, bias: torch.nn.Parameter | None, config: TTTConfig, name: str):
        """A layer around existing parameters, which are shared, not copied."""
        layer = cls.__new__(cls)
        torch.nn.Module.__init__(layer)
        layer.out_features, layer.in_features = weight.shape
        layer.weight = weight
        layer.bias = bias  # type: ignore[assignment]
        layer._build(config, name)
        return layer

    @staticmethod
    def _default_config() -> TTTConfig:
        return TTTConfig()

    def _layout(self, dtype: torch.dtype) -> Layout:
        """The buffers beside a weight of ``dtype``."""
        raise NotImplementedError

    def _build(self, config: TTTConfig, name: str) -> None:
        """What a layer needs beside its parameters; buffers are zeros."""
        self.config = config
        self.name = name
        self.seed = ((config.seed << 32) ^ zlib.crc32(name.encode())) & _SEED_MASK
        self.sink: list[tuple[Tensor, Tensor]] | None = None  # where backward passes leave (x, delta)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        # Requires grad, so that autograd's graph begins at this layer; never receives one.
        self._root = torch.zeros((), requires_grad=True, device=self.weight.device)
        for held, kind in self._layout(self.weight.dtype).items():
            empty = None if kind is None else torch.zeros(kind[0], dtype=kind[1], device=self.weight.device)
            self.register_buffer(held, empty, persistent=False)

    def _bind(self) -> Any:
        """A new binding."""
        raise NotImplementedError

    def __setattr__(self, name, value):
        if isinstance(value, Tensor) or name in ("config", "strength"):  # what a binding holds may have been replaced
            self.__dict__["_binding"] = None
        super().__setattr__(name, value)

    def __getstate__(self):
        return {**self.__dict__, "_binding": None}  # addresses are of no use to a copy

    def own(self, *names: str, copy: bool = True) -> None:
        """Make buffers ready to be written, which other models may hold, too."""

    def _apply(self, fn, recurse=True):
        dtype = fn(self.weight.detach().new_empty(0)).dtype
        if dtype not in DTYPES:
            raise TypeError(f"{self.name or 'the layer'} must be one of {[str(d) for d in DTYPES]}, got {dtype}")
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        self._binding = None
        for name, held in before.items():
            if held is not None:
                self._buffers[name] = self._as_beside(name, held, getattr(self, name))
        return self

    def _as_beside(self, name: str, before: Tensor, after: Tensor) -> Tensor:
        """What buffer ``name`` is beside the present weight, if a conversion made ``after`` of ``before``."""
        kind = self._layout(self.weight.dtype)[name]
        if kind is None or after.dtype == kind[1]:
            return after
        # From the tensor before: ``after`` may hold less.
        held, dtype = before.to(after.device), kind[1]
        if held.dtype == dtype:
            return held
        held = log8.decode(held, self.in_features) if log8.is_packed(held) else held
        return log8.encode(held) if dtype == torch.uint8 else held.to(dtype)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.transposed:
            key = prefix + "weight"
            destination[key] = destination[key].T.contiguous()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        key = prefix + "weight"
        if self.transposed and key in state_dict:
            state_dict = {**state_dict, key: state_dict[key].T}
        super()._load_from_state_dict(state_dict, prefix, *args)
