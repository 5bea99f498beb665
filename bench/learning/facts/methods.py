"""The methods that the suite "facts" compares, and the values that tuning tries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.learning.facts import contenders
from bench.learning.facts.base_model import BaseModel


@dataclasses.dataclass(frozen=True)
class FactsMethod:
    """One row of the table.

    Attributes:
        family: a key of `bench.learning.report.COLOURS`.
        make: makes the contender from the base model, the options and a seed.
        grid: option -> values; tuning tries all combinations of them.
    """

    family: str
    make: Callable[[BaseModel, Mapping[str, Any], int], contenders.Contender]
    grid: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)


def _online(times: int) -> FactsMethod:
    return FactsMethod("combination", contenders.Online, {"lr": (0.1, 0.3, 1.0), "times": (times,)})


METHODS: dict[str, FactsMethod] = {
    "frozen": FactsMethod("reference", contenders.Contender),
    "in context": FactsMethod("reference", contenders.InContext),
    "its fact in context": FactsMethod("reference", contenders.OwnFact),
    "retrieval": FactsMethod("workaround", contenders.Retrieval, {"count": (1, 3)}),
    "online, told once": _online(1),
    "online, told twice": _online(2),
    "online, told 4 times": _online(4),
    "LoRA": FactsMethod("workaround", contenders.LoRA, {"rank": (8,), "lr": (1e-3, 3e-3), "steps": (10, 20)}),
}
"""Name -> method, in the order of the tables. The references that others are scored against come first."""


def method(name: str) -> FactsMethod:
    """The method ``name``.

    Raises:
        ValueError: if there is none.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {list(METHODS)}, got {name!r}")
    return METHODS[name]
