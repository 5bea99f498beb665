"""Layers to rotate among, and how importance and trace are stored."""

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
"""Bytes that a contender rotates through, so that weights come from memory, as they do in a model."""


LEARNS = TTTConfig(rate="constant", lr=5e-3, clip=None, protect=[EWC(0.01), LayerReplay(rows=4, strength=0.3)])
"""How layers learn where a suite says nothing else: EWC and layer replay at a constant rate. Results are of these, not
of `ttt.TTTConfig`'s defaults, which may change."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """How importance and trace are stored.

    ``bytes`` an element, ``tolerance`` of a trace that was rounded to it once (relative, root mean square),
    ``encode`` (m, n) float32 -> what the op takes; ``decode`` (that, n) -> (m, n).
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
"""By the name that `ttt.TTTConfig.state_dtype` gives it. The entries for float32 and bfloat16 serve weights, too."""


def size_of(dtype: str) -> int:
    """Bytes of one weight."""
    return getattr(torch, dtype).itemsize


def layer_count(bytes_per_layer: int) -> int:
    """How many layers fill the pool: at least 3, and odd (see `bench.kernels.suites.decode`)."""
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
    """``count`` copies in memory of their own."""
    return [{name: t.clone() for name, t in layer.items()} for _ in range(count)]


def learning_layer(weight: Tensor, state: dict[str, Tensor] | None = None, **config) -> Linear:
    """A `ttt.nn.Linear` around ``weight``; ``state`` gives it anchor, importance and trace of another layer.

    Those are touched once a window only, between which gigabytes of weights pass by: shared, they are still cold,
    and the pool is a quarter as large.
    """
    layer = Linear.from_weight(
        torch.nn.Parameter(weight, requires_grad=False), None, LEARNS.with_flat(**config), name="bench"
    )
    for name, tensor in (state or {}).items():
        if name != "weight" and getattr(layer, name) is not None:
            layer._buffers[name] = tensor
    return layer


def some_rows(m: int, count: int = 256, device: str = "cpu") -> Tensor:
    """Up to ``count`` of m row indices, spread evenly, the first and last among them: those a check looks at."""
    return torch.linspace(0, m - 1, min(m, count), dtype=torch.float64, device=device).round().long().unique()


def assert_change(what: str, got: Tensor, exact: Tensor, start: Tensor, allowed: float) -> None:
    """Raise AssertionError unless ``got`` is ``exact`` to ``allowed`` of the change since ``start``.

    Compared as changes (root mean square), or the weights themselves would hide a wrong update. No element may be off
    by more than four times ``allowed`` of its own size and the mean change, or the mean would hide a wrong tail.
    """
    got, exact, start = (t.detach().double() for t in (got, exact, start))
    change = (exact - start).square().mean().sqrt()
    error = float((got - exact).square().mean().sqrt() / change)
    if not error <= allowed:  # NaN fails, too
        raise AssertionError(f"{what} is off by {error:.2e} of its change, allowed {allowed:.2e}")
    worst = float(((got - exact).abs() / (exact.abs() + change)).max())
    if not worst <= 4 * allowed:
        raise AssertionError(f"an element of {what} is off by {worst:.2e} of its size, allowed {4 * allowed:.2e}")
