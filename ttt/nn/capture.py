"""Collecting the inputs and output gradients that backward passes leave at the learning layers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor

from ttt.nn.base import Sink, absent
from ttt.nn.linear import Linear
from ttt.nn.low_rank import LowRankLinear


class Capturing:
    """A context manager within which backward passes leave (x, delta) of every layer, to be taken by `renew`.

    ``x`` (T, n) are the layer's inputs and ``delta`` (T, m) the gradients at its output. On leaving, also by an
    exception, what was not taken is dropped.

    Entering raises RuntimeError, and changes nothing, if one of the layers cannot learn, or learns already.

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
            if layer.sink is not None and layer.lock.depth:  # without the lock it may be left from an interrupted block
                raise RuntimeError(
                    f"{layer.name or 'a layer'} learns already in this thread, in ttt.learning or in a method of a "
                    "ttt.Learner that has not ended, whose rows would be lost: leave it first. Tasks of one event loop "
                    "take turns: let no other one learn, or read, before it has ended"
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


def refuse_or_warn_of_unreached(layers: Sequence[Linear | LowRankLinear], rows: Sequence[int]) -> None:
    """Say which of ``layers`` a calibration got no gradient of; ``rows`` is how many it got of each.

    Such are layers that the text does not reach, as those of cross attention without an encoder, or whose weight the
    model reads without calling them. An expert may be chosen by no token.

    Raises:
        ValueError: if there are none of any layer.
    """
    if not any(rows):
        raise ValueError(
            "calibration got no gradient at any layer that learns: the loss does not depend on their outputs"
        )
    missing = [
        layer.name or "a layer"
        for layer, count in zip(layers, rows, strict=True)
        if not count and not getattr(layer, "routed", False)
    ]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        warnings.warn(
            f"calibration got no gradient at {shown}: the text does not reach them, or the model reads their weight "
            "without calling them, as fused kernels do. What they learn, if anything, is unprotected; leave them out "
            "of target_modules",
            stacklevel=4,
        )
