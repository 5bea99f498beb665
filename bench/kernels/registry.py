"""What a bench is made of: a `Case` knows its inputs, bytes and flops; a `Contender` does the case's work one way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar


class Unavailable(Exception):
    """A contender cannot run here (a package is not installed, say); the message says why."""


@dataclasses.dataclass
class Contender:
    """One way of doing a case's work, with its inputs already in memory.

    Attributes:
        run: does the work once, asynchronously on a GPU.
        check: raises AssertionError unless the result agrees with an independent reference. Nothing is timed before.
        units: calls, tokens or bytes that one ``run`` makes; times are per unit.
        cycle: after so many runs it comes back to the same memory (contenders rotate, so that weights are cold).
        graph: on a GPU, capture ``run`` in a CUDA graph; False for what synchronizes with the host.
        fields: more figures for this contender's row.
    """

    run: Callable[[], object]
    check: Callable[[], None]
    units: int = 1
    cycle: int = 1
    graph: bool = True
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Case:
    """One group of rows: the same work, done by several contenders in turn. Cheap until `contenders` are made.

    Attributes:
        device: "cpu" or "cuda".
        dtype: of the weights, as torch names it.
        quick: in the smaller selection of ``pytest bench``.

    Class attributes:
        suite, unit: name of the suite, and what ``us`` is the time of.
        ours: the contender whose ratios `bench.kernels.check` guards.
        baseline: the contender that ``ratio`` refers to.
        forward: the contender that is a plain forward pass, which ``ratio_to_forward`` refers to.
    """

    suite: ClassVar[str]
    unit: ClassVar[str] = "call"
    ours: ClassVar[str] = "ttt"
    baseline: ClassVar[str]
    forward: ClassVar[str | None] = None

    device: str
    dtype: str
    quick: bool = dataclasses.field(default=False, kw_only=True)

    @property
    def name(self) -> str:
        """Within its suite and dtype, this names the case; results are matched by it."""
        raise NotImplementedError

    @property
    def threads(self) -> int | None:
        """torch threads; None for those the run has."""
        return None

    @property
    def ceiling(self) -> str | None:
        """What bounds the case: "copy", "matmul", or None where neither says much."""
        return "copy"

    def bytes(self, contender: str) -> int | None:
        """Bytes that ``contender``'s formula must move for one unit, each operand once; None if not counted."""
        raise NotImplementedError

    def flops(self, contender: str) -> int | None:
        """Multiplications and additions of ``contender``'s matrix products, for one unit; None if not counted."""
        raise NotImplementedError

    def product_flops(self, contender: str) -> int | None:
        """Those of `flops` that are held against the rate of a matrix product."""
        return self.flops(contender)

    def contenders(self) -> dict[str, Callable[[], Contender]]:
        """Makers of the contenders, by name. A maker may raise `Unavailable`."""
        raise NotImplementedError

    def ceilings(self) -> dict[str, Callable[[], Contender]]:
        """Makers of the ceilings that are measured in the same rounds; a unit is one byte ("copy", "read") or flop."""
        from bench.kernels.timing import copy_ceiling

        return {"copy": lambda: copy_ceiling(self.device)}

    def parameters(self) -> dict[str, Any]:
        """What makes this case, for the JSON."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in ("device", "dtype", "quick")]
        return {name: getattr(self, name) for name in names}


_shared: dict[tuple, Any] = {}


def shared(key: tuple, make: Callable[[], Any]) -> Any:
    """``make()``, kept until another key is asked for: cases in a row that use the same layers share them."""
    if key not in _shared:
        _shared.clear()  # before the next ones are made: two would not fit everywhere
        _shared[key] = make()
    return _shared[key]
