"""Collecting what backward passes leave at the learning layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ttt.nn.linear import Linear
from ttt.nn.low_rank import LowRankLinear


class Capturing:
    """Collects (x, delta) of every layer while it is entered; leaves nothing behind, whatever happens."""

    def __init__(self, layers: Sequence[Linear | LowRankLinear]) -> None:
        self.layers = layers

    def __enter__(self) -> Capturing:
        self.renew()
        return self

    def renew(self) -> list[list[tuple[Tensor, Tensor]]]:
        """What was captured so far, by layer; collecting starts anew."""
        captured = [layer.sink or [] for layer in self.layers]
        for layer in self.layers:
            layer.sink = []
        return captured

    def __exit__(self, *exc) -> None:
        for layer in self.layers:
            layer.sink = None
