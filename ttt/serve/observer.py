"""Who is told what a `ttt.serve.service.Service` does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Observer(Protocol):
    """Is told what happens, in the service's thread; see `ttt.serve.http.metrics`."""

    def served(self, prompt: int, completion: int) -> None: ...
    def learnt(self, tokens: int, seconds: float) -> None: ...
    def studied(self, episodes: int, seconds: float) -> None: ...
    def failed(self, kind: str) -> None: ...
    def evicted(self) -> None: ...
    def opened(self, seconds: float) -> None: ...
    def stored(self, seconds: float) -> None: ...


class Silent:
    """An `Observer` that does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: None
