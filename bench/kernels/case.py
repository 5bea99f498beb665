"""A `Case`: one measurement, which knows its inputs, its bytes and flops, and the contenders that do the work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from bench.kernels.ceilings import copy_ceiling
from bench.kernels.contender import Contender


@dataclasses.dataclass(frozen=True)
class Case:
    """One group of rows: the same work, done by several contenders in turn.

    A case is cheap to make: inputs are allocated when `contenders` are made.

    Attributes:
        device: "cpu" or "cuda".
        dtype: of the weights, as torch names it.
        quick: whether the case belongs to the smaller selection of ``pytest bench``.

    Class attributes:
        suite: name of the suite.
        unit: what the times (``us``) are per: a call, a step or a token.
        ours: the contender whose ratios `bench.kernels.check` compares with committed results.
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
        """Unique within its suite and dtype; new and committed results are matched by it."""
        raise NotImplementedError

    @property
    def threads(self) -> int | None:
        """Number of torch threads; None for the number that the whole run uses."""
        return None

    @property
    def ceiling(self) -> str | None:
        """What limits the speed of the case: "copy" (bandwidth), "matmul" (arithmetic), or None if neither does."""
        return "copy"

    def bytes(self, contender: str) -> int | None:
        """Bytes that ``contender``'s formula must move for one unit, each operand once; None if not counted."""
        raise NotImplementedError

    def flops(self, contender: str) -> int | None:
        """Multiplications and additions of ``contender``'s matrix products, for one unit; None if not counted."""
        raise NotImplementedError

    def product_flops(self, contender: str) -> int | None:
        """The part of `flops` that is compared with the rate of a matrix product."""
        return self.flops(contender)

    def parts(self, contender: str) -> list[tuple[float, float]] | None:
        """(bytes, flops of products) of the parts of one unit that follow one another; None if not counted.

        Within a part bytes and flops may overlap: it takes at least the larger of their times, and at most their sum
        if neither is waited for twice.
        """
        return None

    def contenders(self) -> dict[str, Callable[[], Contender]]:
        """Functions that make the contenders, by name. Each may raise `bench.kernels.contender.Unavailable`."""
        raise NotImplementedError

    def ceilings(self) -> dict[str, Callable[[], Contender]]:
        """Functions that make the ceilings, which are timed in the same rounds as the contenders.

        A unit of "copy" and "read" is one byte; a unit of the others is one flop.
        """
        return {"copy": lambda: copy_ceiling(self.device)}

    def parameters(self) -> dict[str, Any]:
        """The case's own fields, for its rows of the JSON."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in ("device", "dtype", "quick")]
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class TimedCase(Case):
    """A case of which only the time is known: neither bytes nor flops are counted, and nothing limits it."""

    @property
    def ceiling(self) -> str | None:
        return None

    def bytes(self, contender: str) -> int | None:
        return None

    def flops(self, contender: str) -> int | None:
        return None


_shared: dict[tuple, Any] = {}


def shared(key: tuple, make: Callable[[], Any]) -> Any:
    """``make()``, kept until another key is asked for: consecutive cases that use the same layers share them."""
    if key not in _shared:
        _shared.clear()  # before the next layers are made: memory may not hold both
        _shared[key] = make()
    return _shared[key]
