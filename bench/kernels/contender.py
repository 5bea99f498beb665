"""A `Contender`: one way of doing the work that a case measures, with the check of its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


class Unavailable(Exception):
    """A contender cannot run on this machine, for example because a package is missing; the message says why."""


@dataclasses.dataclass
class Contender:
    """One way of doing a case's work, with its inputs already in memory.

    Attributes:
        run: does the work once, asynchronously on a GPU.
        check: raises AssertionError unless the result agrees with an independent reference. It is called before
            anything is timed.
        units: calls, tokens or bytes that one ``run`` processes; times are per unit.
        cycle: number of runs after which the contender is back at the same memory. Contenders rotate among several
            layers, so that weights are not in the cache.
        graph: on a GPU, capture ``run`` in a CUDA graph; False for work that synchronizes with the host.
        fields: further figures for this contender's row.
    """

    run: Callable[[], object]
    check: Callable[[], None]
    units: int = 1
    cycle: int = 1
    graph: bool = True
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
