"""Collecting the inputs and output gradients that backward passes leave at the learning layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ttt.nn.base import Sink, absent
from ttt.nn.linear import Linear
from ttt.nn.low_rank import LowRankLinear


class Capturing:
    """A context manager within which backward passes leave (x, delta) of every layer, to be taken by `renew`.

    ``x`` (T, n) are the layer's inputs and ``delta`` (T, m) the gradients at its output. On leaving, also by an
    exception, what was not taken is dropped.

    Args:
        joins: whether it is going to be joined with what other processes have found. If not, a forward pass inside of
            DistributedDataParallel raises an error.
    """

    def __init__(self, layers: Sequence[Linear | LowRankLinear], joins: bool = False) -> None:
        self.layers, self.joins = layers, joins

    def __enter__(self) -> Capturing:
        for layer in self.layers:
            if why := absent(layer.weight):
                raise RuntimeError(
                    f"{layer.name or 'a layer'} cannot learn: its weight {why}; what it would learn would be lost. "
                    "Keep whole weights in memory, or compute without learning"
                )
        for layer in self.layers:
            layer.sink = Sink(self.joins)
        return self

    def renew(self) -> list[list[tuple[Tensor, Tensor]]]:
        """Take what was captured so far, a list of (x, delta) for each layer, and begin collecting anew."""
        captured: list[list[tuple[Tensor, Tensor]]] = []
        for layer in self.layers:
            sink = layer.sink
            captured.append(sink or [])
            if sink is None or sink:  # an empty one can go on collecting
                layer.sink = Sink(self.joins)
        return captured

    def __exit__(self, *exc) -> None:
        for layer in self.layers:
            layer.sink = None
