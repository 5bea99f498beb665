"""`exclusive`: one thread at a time in what reads or writes the state of learning layers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ttt.atomic import refuse_torn
from ttt.signals import SignalsDeferred


class LayerLock:
    """A lock of one layer that the thread holding it may take again. A copy of the layer has a lock of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self.holder = ""  # what holds it, for error messages

    def acquire(self, what: str) -> bool:
        """Take the lock for ``what``; False if another thread has it."""
        if not self._lock.acquire(blocking=False):
            return False
        self.holder = self.holder if self._depth else what
        self._depth += 1
        return True

    @property
    def depth(self) -> int:
        """How many blocks of the thread that holds it are inside of one another; for this thread only."""
        return self._depth

    def release(self) -> None:
        self._depth -= 1
        self._lock.release()

    def __deepcopy__(self, memo: dict) -> LayerLock:
        return LayerLock()

    def __reduce__(self):
        return LayerLock, ()


@contextlib.contextmanager
def exclusive(layers: Sequence[Any], what: str, *, repairs: bool = False) -> Iterator[None]:
    """Inside, no other thread enters with one of ``layers``, and tensors are ordinary ones in inference mode, too.

    Layers keep what a backward pass leaves and the rows of the present window: two threads would mix them, and a thread
    that saves or copies layers while another one learns would get some from before a step and some from after it. A
    second thread is refused, not made to wait: it would not know for how long.

    Args:
        layers: `ttt.nn.Linear` or `ttt.nn.LowRankLinear`.
        what: the name of the caller, for messages.
        repairs: whether the block puts a complete state in place, so that torn layers are allowed.

    Raises:
        RuntimeError: if another thread is inside, or a write to one of the layers ended half-way (`ttt.atomic`).
    """
    taken: list[LayerLock] = []
    try:
        with SignalsDeferred():
            for layer in layers:
                lock = layer.lock
                if not lock.acquire(what):
                    raise RuntimeError(
                        f"{what} was called while another thread is in {lock.holder} of the same layers: one thread at "
                        "a time learns; wait for it, or give each thread a model of its own (ttt.fork)"
                    )
                taken.append(lock)
                if lock.depth == 1:
                    layer.sink = None  # what a block has left there that a signal's handler ended half-way
        if not repairs:
            refuse_torn(layers, what)
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
            yield
    finally:
        with SignalsDeferred():
            for lock in taken:
                lock.release()
