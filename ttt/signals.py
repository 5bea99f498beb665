"""`SignalsDeferred`: a block of code that no signal handler, such as that of Ctrl-C, interrupts."""

from __future__ import annotations

import contextlib
import signal
import threading
from types import FrameType
from typing import Any

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
