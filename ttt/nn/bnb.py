"""How bitsandbytes keeps the weights of its layers with 4 and 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ttt.nn.row_blocks import Blocks, row_slices

_GROUP = 32  # rows that are packed together for processors with AVX512-BF16


def mixes_rows(module: Any) -> bool:
    """Whether ``module`` is a layer of bitsandbytes that rounds a row otherwise where another one has an outlier."""
    state = getattr(module, "state", None)
    return type(module).__module__.startswith("bitsandbytes.") and float(getattr(state, "threshold", 0.0) or 0.0) > 0


def is_packed(state: Any) -> bool:
    """Whether bitsandbytes has changed the layout of a weight with the ``QuantState`` ``state`` for faster reading."""
    return bool(getattr(state, "packing_format_for_cpu", False))


def unpacked(data: Tensor) -> Tensor:
    """Rows of a packed 4-bit weight, whole groups of 32 (R, n / 2) uint8, in the order in which they were quantized.

    Of each group, byte p of every 32 holds for one pair of columns: in its low half the value of row p // 2, and in its
    high half that of row 16 + p // 2, in the first of the columns if p is even, otherwise in the second.
    """
    groups = data.reshape(-1, data.shape[1], 16, 2)  # (group, pair of columns, row, column of the pair)
    halves = torch.stack([groups & 15, groups >> 4], 1)
    values = halves.movedim(2, 3)  # (group, half, row, pair of columns, column of the pair)
    return ((values[..., 0] << 4) | values[..., 1]).reshape(data.shape)


@torch.no_grad()
def stored_values(parameter: Tensor) -> Tensor:
    """``parameter`` detached; of a 4-bit weight the same whether bitsandbytes has packed it since it was quantized."""
    state = getattr(parameter, "quant_state", None)
    if state is None or not is_packed(state):
        return parameter.detach()
    data = unpacked(parameter.data.as_subclass(Tensor)).reshape(state.original_qshape)
    return data.view(getattr(state, "original_storage_type", None) or data.dtype)


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

    m, n = state.shape
    packed, dtype, scales = is_packed(state), state.dtype, state.absmax
    if packed:
        dtype, scales = state.original_dtype, scales.T.float()
    elif state.nested:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
    scales = scales.reshape(m, n // state.blocksize)
    data = data.as_subclass(Tensor).reshape(-1).view(torch.uint8).view(m, n // 2)
    for rows in row_slices(m, n, _GROUP if packed else 1):
        own = functional.QuantState(
            absmax=scales[rows].reshape(-1), shape=torch.Size((rows.stop - rows.start, n)), code=state.code,
            blocksize=state.blocksize, quant_type=state.quant_type, dtype=dtype,
        )  # fmt: skip
        block = unpacked(data[rows]) if packed else data[rows]
        yield rows, functional.dequantize_4bit(block.reshape(-1, 1), own)
