"""How bitsandbytes keeps the weights of its layers with 4 and 8 bits."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ttt.nn.row_blocks import Blocks, row_slices


def mixes_rows(module: Any) -> bool:
    """Whether ``module`` is a layer of bitsandbytes that rounds a row otherwise where another one has an outlier."""
    state = getattr(module, "state", None)
    return type(module).__module__.startswith("bitsandbytes.") and float(getattr(state, "threshold", 0.0) or 0.0) > 0


def is_packed(state: Any) -> bool:
    """Whether bitsandbytes has changed the layout of a weight with the ``QuantState`` ``state`` for faster reading."""
    return bool(getattr(state, "packing_format_for_cpu", False))


def unpacked(data: Tensor, state: Any) -> Tensor:
    """The packed ``data`` of a 4-bit weight in the order in which they were quantized."""
    from bitsandbytes import functional

    state = copy.copy(state)
    state.original_nested = False  # its scales are wanted neither changed nor rounded again
    return functional._convert_weight_packed_for_cpu_inverse(data, state)[0]


@torch.no_grad()
def stored_values(parameter: Tensor) -> Tensor:
    """``parameter`` detached; of a 4-bit weight the same whether bitsandbytes has packed it since it was quantized."""
    state = getattr(parameter, "quant_state", None)
    if state is None or not is_packed(state):
        return parameter.detach()
    return unpacked(parameter.data, state)


def scaled(module: Any) -> tuple[Tensor, Tensor] | None:
    """(values (m, n) int8, scales (m,)) of an 8-bit layer of bitsandbytes; None of any other."""
    state, weight = getattr(module, "state", None), module.weight
    if state is None or getattr(state, "has_fp16_weights", True):
        return None
    values = weight.data.as_subclass(Tensor) if state.CB is None else state.CB
    scales = getattr(weight, "SCB", None) if state.SCB is None else state.SCB
    return None if scales is None or values.dtype != torch.int8 else (values, scales)


def blocks_of_4_bits(data: Tensor, state: Any) -> Blocks:
    """The rows of a weight with a ``QuantState`` of bitsandbytes, whose scales are each of ``blocksize`` elements.

    The rows must consist of whole such runs: where they do not, version 0.50.2 computes with other scales on CPUs.
    """
    from bitsandbytes import functional

    (m, n), each = state.shape, state.shape[1] // state.blocksize  # scales of a row
    dtype, scales = state.dtype, state.absmax
    if is_packed(state):
        dtype, scales, data = state.original_dtype, scales.T.reshape(-1).float(), unpacked(data, state)
    elif state.nested:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
    data, scales = data.as_subclass(Tensor).reshape(-1).view(torch.uint8).view(m, n // 2), scales.view(m, each)
    for rows in row_slices(m, n):
        own = functional.QuantState(
            absmax=scales[rows].reshape(-1), shape=torch.Size((rows.stop - rows.start, n)), code=state.code,
            blocksize=state.blocksize, quant_type=state.quant_type, dtype=dtype,
        )  # fmt: skip
        yield rows, functional.dequantize_4bit(data[rows].reshape(-1, 1), own)
