"""`stand_in`: other weights in place of the learnt ones for a while, to measure with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from ttt.atomic import whole_write
from ttt.nn.state_access import temporary_weights
from ttt.signals import SignalsDeferred


@contextlib.contextmanager
def stand_in(layers: Sequence[Any], deltas: Sequence[Tensor | None]) -> Iterator[None]:
    """Inside, the weights are W* + delta, as by `temporary_weights`; no signal interrupts the exchange."""
    exchange = temporary_weights(layers, deltas)

    def leave() -> None:
        with whole_write(layers, "putting weights back"):
            exchange.__exit__(None, None, None)

    with contextlib.ExitStack() as stack:
        with SignalsDeferred():
            exchange.__enter__()
            stack.callback(leave)
        yield
