"""What the benchmark command needs of a suite; `SUITES` in `bench.learning` lists them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

SEEDS = (1000, 1001)
"""Of the search for options: of the references, and of methods for which a suite names no others. Never reported:
reported seeds count from 0."""

Record = dict[str, Any]
"""A finished run: ``scenario``, ``method``, ``seed``, ``options``, ``protocol``, and what `Suite.run` returned."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A column of the table: how a figure is called, its unit, how it is printed, and what it says."""

    name: str
    title: str
    digits: int = 3
    meaning: str = ""


class Suite(Protocol):
    """Scenarios, methods, and how one runs in the other. Everything it returns is plain values, for JSON."""

    name: str
    scenarios: Sequence[str]
    methods: Sequence[str]
    figures: Sequence[Figure]
    references: Sequence[str]
    """Methods whose runs scoring needs: tuning chooses their options first."""

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

    def seeds(self, method: str) -> Sequence[int]:
        """Those of the search for ``method``'s options: `SEEDS`, or more."""
        ...

    def tuned_on(self, scenario: str) -> str:
        """The scenario in which the options for ``scenario`` are searched."""
        ...

    def sweep(self, method: str, scenario: str) -> tuple[str, Sequence[Any]] | None:
        """(option, values) of the method's trade-off curve in ``scenario``; None if none is drawn."""
        ...

    def score(self, record: Record, others: Mapping[str, Record]) -> float:
        """What tuning maximises; ``others`` holds runs of `references`, of the same scenario and seed.

        The chosen ones by their names, and under `best_of` their names those that scored best on this very seed.
        """
        ...

    def combine(self, method: str, scores: Sequence[float]) -> float:
        """The scores of one setting over the seeds as one number."""
        ...

    def measure(self, record: Record, others: Mapping[str, Record]) -> dict[str, float | None]:
        """The figures of a run; ``others`` holds the runs of the same scenario and seed, by method."""
        ...

    def facts(self) -> Record:
        """What else is to be known of the figures: goes into the results as it is."""
        ...

    def plot(self, records: Sequence[Record], rows: Sequence[Record], title: str, prefix: str) -> list[str]:
        """Draw runs, and the rows that sum them up, into files that begin with ``prefix``; returns their paths.

        Runs of a `sweep` are among ``records``: `swept` tells them.
        """
        ...


def best_of(method: str) -> str:
    """The name under which `Suite.score` finds the run of a reference that scored best on the same seed."""
    return f"{method}, best"


def swept(record: Record) -> bool:
    """Whether a run belongs to a trade-off curve, and not to the tables."""
    return record["protocol"].get("sweep", False)


def candidates(grid: Mapping[str, Sequence[Any]]) -> list[Record]:
    """All combinations of a grid's values, in its order."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
