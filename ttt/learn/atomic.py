"""Writes to several layers that must not end half-way: signals wait, and a failure is remembered.

A learning step writes layer after layer. Copying all weights before each step, to be able to go back, would cost as
much as the step. So `whole_write` makes the two things that can stop it half-way harmless in other ways:

* An interrupt (Ctrl-C, or any other signal with a handler in Python) is handled when the last layer is written.
* An exception from a layer (a kernel that fails, memory that runs out) marks the layers as torn: until a complete
  state is put in its place, nothing uses them (`refuse_torn`). Layers that are reset or given a state are whole again.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import Any

from torch import Tensor

from ttt.nn.state_access import standing_in

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGBREAK")
_SIGNALS = [int(getattr(signal, name)) for name in _NAMES if hasattr(signal, name)]  # those that handlers raise on


class SignalsDeferred:
    """A context in which signal handlers written in Python do not run; those of signals that came run at its end.

    Python runs such handlers in the main thread only: in other threads the context does nothing.
    """

    def __enter__(self) -> SignalsDeferred:
        self._handlers: dict[int, Any] = {}
        self._arrived: list[tuple[int, FrameType | None]] = []
        self._active = True
        if threading.current_thread() is threading.main_thread():
            try:
                for number in _SIGNALS:
                    if callable(handler := signal.getsignal(number)):
                        self._handlers[number] = handler
                        signal.signal(number, self._arrive)
            except BaseException:  # a signal that came before its handler was replaced
                self._restore()
                raise
        return self

    def __exit__(self, *exc) -> None:
        self._restore()
        with contextlib.ExitStack() as stack:  # every handler is called, even if one raises
            for number, frame in reversed(self._arrived):
                stack.callback(self._handlers[number], number, frame)

    def _arrive(self, number: int, frame: FrameType | None) -> None:
        if self._active:
            self._arrived.append((number, frame))
        else:
            self._handlers[number](number, frame)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._active = False


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


@contextlib.contextmanager
def stand_in(layers: Sequence[Any], deltas: Sequence[Tensor | None]) -> Iterator[None]:
    """As `ttt.nn.state_access.standing_in`: inside, the weights are W* + delta; no signal interrupts the exchange."""
    exchange = standing_in(layers, deltas)

    def leave() -> None:
        with whole_write(layers, "putting weights back"):
            exchange.__exit__(None, None, None)

    with contextlib.ExitStack() as stack:
        with SignalsDeferred():
            exchange.__enter__()
            stack.callback(leave)
        yield
