"""What the benchmark command needs of a suite; `SUITES` in `ttt.benchmark` lists them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Record = dict[str, Any]
"""A finished run: ``scenario``, ``method``, ``seed``, ``options``, ``protocol``, and what `Suite.run` returned."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A column of the table: how a figure is called, its unit, and how it is printed."""

    name: str
    title: str
    digits: int = 3


class Suite(Protocol):
    """Scenarios, methods, and how one runs in the other. Everything it returns is plain values, for JSON."""

    name: str
    scenarios: Sequence[str]
    methods: Sequence[str]
    figures: Sequence[Figure]

    def protocol(self) -> Record:
        """What all runs have in common; runs under another protocol are run again."""
        ...

    def fits(self, method: str, scenario: str) -> bool:
        """Whether ``method`` can run in ``scenario``."""
        ...

    def family(self, method: str) -> str:
        """What kind of method it is, for colours."""
        ...

    def grid(self, method: str) -> Mapping[str, Sequence[Any]]:
        """Option -> values that tuning tries."""
        ...

    def run(self, scenario: str, method: str, seed: int, options: Record, *, tuning: bool) -> Record:
        """One run; with ``tuning``, on data that reported runs are not scored on."""
        ...

    def score(self, record: Record) -> float:
        """What tuning maximises."""
        ...

    def measure(self, record: Record, others: Mapping[str, Record]) -> dict[str, float | None]:
        """The figures of a run; ``others`` holds the runs of the same scenario and seed, by method."""
        ...

    def plot(self, records: Sequence[Record], rows: Sequence[Record], title: str, prefix: str) -> list[str]:
        """Draw runs, and the rows that sum them up, into files that begin with ``prefix``; returns their paths."""
        ...


def candidates(grid: Mapping[str, Sequence[Any]]) -> list[Record]:
    """All combinations of a grid's values, in its order."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
