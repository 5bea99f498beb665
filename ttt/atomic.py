"""Writes to several layers that must not end half-way: signals wait, and a failure is remembered.

A learning step writes layer after layer. Copying all weights before each step, to be able to go back, would cost as
much as the step. So `whole_write` makes the two things that can stop it half-way harmless in other ways:

* An interrupt (Ctrl-C, or any other signal with a handler in Python) is handled when the last layer is written.
* An exception from a layer (a kernel that fails, memory that runs out) marks the layers as torn: until a complete
  state is put in its place, nothing uses them (`refuse_torn`). Layers that are reset or given a state are whole again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ttt.signals import SignalsDeferred


@contextlib.contextmanager
def whole_write(layers: Sequence[Any], what: str) -> Iterator[None]:
    """Inside, ``layers`` are written for ``what``; no signal interrupts it, and an exception marks all of them as torn.

    Check everything that can be refused before entering it.
    """
    with SignalsDeferred():
        try:
            yield
        except BaseException as error:
            for layer in layers:
                layer.torn = f"{what} ended half-way ({type(error).__name__}: {error})"
            raise


def refuse_torn(layers: Iterable[Any], what: str) -> None:
    """Raise RuntimeError if a write to one of ``layers`` ended half-way; ``what`` is what needs them."""
    for layer in layers:
        if layer.torn:
            raise RuntimeError(
                f"{what} needs layers that belong together, but {layer.torn}: some have learnt and others have not. "
                "Learner.rollback(snapshot), Learner.reset() or ttt.load(model, path) puts a complete state in place"
            )
