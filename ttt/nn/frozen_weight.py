"""`FrozenWeight`: the weight of a frozen quantized layer as plain numbers, whichever library has quantized it.

The gradient at the inputs of such a layer is then computed here, from these numbers, and is right whatever the
library's own backward pass does. Some kernels for packed weights have no derivative, and those of bitsandbytes for
processors with AVX512-BF16 silently give a wrong one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ttt.nn.bnb import blocks_of_4_bits, is_packed, scaled
from ttt.nn.row_blocks import can_be_cut, dequantized_blocks, row_slices, transposed_product

_IDENTITY = 256  # rows of the identity that are passed through a layer at a time


class FrozenWeight:
    """The weight (m, n) that a frozen quantized linear layer computes with.

    That of bitsandbytes' 4-bit and 8-bit layers, and of torchao's that can be dequantized, is dequantized a block of
    rows at a time. That of any other layer, and of 4 bits where the runs of elements with one scale do not end with the
    rows, is found by passing the identity through the layer, at the first gradient, and then kept as a plain tensor.

    Args:
        module: the layer.
        dtype: of its inputs, where the layer does not say.

    Attributes:
        shape: (m, n).
        dtype: of what `blocks` gives.
    """

    def __init__(self, module: Any, dtype: torch.dtype = torch.float32) -> None:
        self.module, weight = module, module.weight
        self.shape = torch.Size((module.out_features, module.in_features))
        state = getattr(weight, "quant_state", None)
        if state is not None:
            dtype = state.original_dtype if is_packed(state) else state.dtype
        elif weight.is_floating_point():
            dtype = weight.dtype
        self.dtype: torch.dtype = dtype
        self.found: Tensor | None = None
        self._found_in: Any = (None, None)

    @torch.no_grad()
    def product(self, x: Tensor) -> Tensor:
        """W x + bias for ``x`` (..., n), computed by the library.

        On processors with AVX512-BF16 a 4-bit layer of bitsandbytes packs its weight anew, with scales of 16 bits, as
        soon as it sees inputs that do not require grad. What it computes would change from then on; so these do.
        """
        made_elsewhere = x.is_inference() and not torch.is_inference_mode_enabled()  # then only a copy can require grad
        return self.module((x.clone() if made_elsewhere else x.detach()).requires_grad_())

    @torch.no_grad()
    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """`Blocks` of the weight."""
        weight = self.module.weight
        state = getattr(weight, "quant_state", None)
        if state is not None and self.shape[1] % state.blocksize == 0:
            yield from blocks_of_4_bits(weight.data, state)
        elif (in_8_bits := scaled(self.module)) is not None:
            values, scales = in_8_bits
            for rows in row_slices(*self.shape):
                yield rows, values[rows].to(self.dtype) * (scales[rows].unsqueeze(1) / 127).to(self.dtype)
        elif can_be_cut(self.module):
            yield from dequantized_blocks(weight)
        else:
            held = weight.device, weight._version  # it may be moved, loaded anew, or replaced
            if self.found is None or self._found_in[0] is not weight or self._found_in[1] != held:
                self.found, self._found_in = self._find(), (weight, held)
            for rows in row_slices(*self.shape):
                yield rows, self.found[rows]

    def transposed_product(self, delta: Tensor) -> Tensor:
        """delta W (..., n) for ``delta`` (..., m)."""
        return transposed_product(delta, self.blocks(), self.shape[1])

    def dense(self) -> Tensor:
        """(m, n): all of the weight, as a plain tensor."""
        return torch.cat([block for _, block in self.blocks()])

    def parts(self) -> dict[str, Tensor]:
        """The tensors that hold the weight, by name."""
        weight = self.module.weight
        state = getattr(weight, "quant_state", None)
        found = {"stored": weight.data.as_subclass(Tensor)}
        if state is not None:
            found["scales"] = state.absmax
        elif (in_8_bits := scaled(self.module)) is not None:
            found["scales"] = in_8_bits[1]
        return found if self.found is None else found | {"found": self.found}

    def _find(self) -> Tensor:
        m, n = self.shape
        alone = copy.copy(self.module)
        alone._parameters = {**self.module._parameters, "bias": None}  # the weight would be rounded with it
        weight, device = FrozenWeight(alone, self.dtype), self.module.weight.device
        found = torch.empty(m, n, dtype=self.dtype, device=device)
        for start in range(0, n, _IDENTITY):
            columns = torch.arange(start, min(start + _IDENTITY, n), device=device)
            rows = nn.functional.one_hot(columns, n).to(self.dtype)
            found[:, columns] = weight.product(rows).T
        return found
