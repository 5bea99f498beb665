"""Random layers to rotate among, how importance and trace are stored, and the comparison with a reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ttt.config import TTTConfig
from ttt.defences import EWC, LayerReplay
from ttt.nn import Linear
from ttt.ops import log8

POOL = 1_600_000_000
"""Bytes of weights that a contender rotates through, so that they come from memory, as in a large model."""

LEARNS = TTTConfig(rate="constant", lr=5e-3, clip=None, protect=[EWC(0.01), LayerReplay(rows=4, strength=0.3)])
"""Options of the learning layers, unless a suite sets its own: EWC and layer replay at a constant rate. They are fixed
here so that results stay comparable when the defaults of `ttt.TTTConfig` change."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """A format in which importance and trace are stored.

    Attributes:
        bytes: per element.
        tolerance: relative error (root mean square) of a trace that was rounded to this format once.
        encode: (m, n) float32 -> the tensor that the op takes.
        decode: (that tensor, n) -> (m, n).
    """

    bytes: float
    tolerance: float
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor, int], Tensor]


STORAGE = {
    "float32": Storage(4, 1e-5, Tensor.float, lambda t, n: t),
    "bfloat16": Storage(2, 2**-7, Tensor.bfloat16, lambda t, n: t),
    "8bit": Storage(33 / 32, 2**-5, log8.encode, log8.decode),
}
"""`Storage` by the name in `ttt.TTTConfig.state_dtype`. The entries for float32 and bfloat16 also describe weights."""


def size_of(dtype: str) -> int:
    """Bytes of one element of ``dtype``."""
    return getattr(torch, dtype).itemsize


def layer_count(bytes_per_layer: int) -> int:
    """Number of layers that fill `POOL`: at least 3, and odd (see `bench.kernels.suites.decode.Decode.pending`)."""
    return max(3, -(-POOL // bytes_per_layer) | 1)


def random_layer(m: int, n: int, dtype: str, state: str, device: str) -> dict[str, Tensor]:
    """Weight, anchor, importance and trace of one layer, as `ttt.ops.commit` takes them."""
    kind = getattr(torch, dtype)
    w = torch.randn(m, n, device=device) * 0.02
    encode = STORAGE[state].encode
    return {
        "weight": w.to(kind),
        "anchor": (w + 1e-2 * torch.randn(m, n, device=device)).to(kind),
        "importance": encode(torch.rand(m, n, device=device) * 2),
        "trace": encode(torch.rand(m, n, device=device)),
    }


def copies(layer: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """``count`` copies of a layer's tensors."""
    return [{name: t.clone() for name, t in layer.items()} for _ in range(count)]


def learning_layer(weight: Tensor, state: dict[str, Tensor] | None = None, **config) -> Linear:
    """A `ttt.nn.Linear` with ``weight``, which shares anchor, importance and trace with the layers given ``state``.

    Sharing them needs a quarter of the memory. They are still read from memory, not from the cache: a layer uses them
    once per window, and gigabytes of weights are read in between.
    """
    layer = Linear.from_weight(
        torch.nn.Parameter(weight, requires_grad=False), None, LEARNS.with_flat(**config), name="bench"
    )
    for name, tensor in (state or {}).items():
        if name != "weight" and getattr(layer, name) is not None:
            layer._buffers[name] = tensor
    return layer


def some_rows(m: int, count: int = 256, device: str = "cpu") -> Tensor:
    """Up to ``count`` evenly spaced indices of m rows, the first and last included: the rows that a check compares."""
    return torch.linspace(0, m - 1, min(m, count), dtype=torch.float64, device=device).round().long().unique()


def assert_change(what: str, got: Tensor, exact: Tensor, start: Tensor, allowed: float) -> None:
    """Compare the change from ``start`` to ``got`` with the exact change from ``start`` to ``exact``.

    The root mean square of the error is compared with that of the change: relative to the weights themselves, a wrong
    update would not be noticed. Single elements are compared as well, because a mean hides errors of few elements.

    Raises:
        AssertionError: if the root mean square of ``got - exact`` is more than ``allowed`` times that of
            ``exact - start``, or if an element is off by more than 4 ``allowed`` times (its own size + the root mean
            square of the change).
    """
    got, exact, start = (t.detach().double() for t in (got, exact, start))
    change = (exact - start).square().mean().sqrt()
    error = float((got - exact).square().mean().sqrt() / change)
    if not error <= allowed:  # written so that NaN fails
        raise AssertionError(f"{what} is off by {error:.2e} of its change, allowed {allowed:.2e}")
    worst = float(((got - exact).abs() / (exact.abs() + change)).max())
    if not worst <= 4 * allowed:
        raise AssertionError(f"an element of {what} is off by {worst:.2e} of its size, allowed {4 * allowed:.2e}")
