"""What the command needs of a suite; `bench.learning.suites` lists the suites."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

SEEDS = (1000, 1001)
"""Seeds of the search for options, for references and for methods without other seeds. Reported seeds count from 0."""

Record = dict[str, Any]
"""A run: ``scenario``, ``method``, ``seed``, ``options`` and ``protocol``; if it is finished, also what `Suite.run`
returned."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of the tables.

    Attributes:
        name: its key in the rows of the results.
        title: head of its column.
        digits: number of digits after the decimal point.
        meaning: its definition in one sentence.
    """

    name: str
    title: str
    digits: int = 3
    meaning: str = ""


class Suite(Protocol):
    """Scenarios and methods, and how a method runs in a scenario. Records hold plain values only, for JSON.

    A suite that can run on a GPU has an attribute ``device``, "cpu" or "cuda" (see `device_of`).
    """

    name: str
    scenarios: Sequence[str]
    methods: Sequence[str]
    figures: Sequence[Figure]
    references: Sequence[str]
    """Methods that others are scored against. Tuning chooses their options first."""

    def protocol(self) -> Record:
        """The settings that all runs share. When they change, all runs are made again."""
        ...

    def fits(self, method: str, scenario: str) -> bool:
        """Whether ``method`` can run in ``scenario``."""
        ...

    def family(self, method: str) -> str:
        """The method's family, which gives its colour in plots."""
        ...

    def grid(self, method: str) -> Mapping[str, Sequence[Any]]:
        """Option -> values; tuning tries all combinations of them."""
        ...

    def run(self, scenario: str, method: str, seed: int, options: Record, *, tuning: bool) -> Record:
        """Make one run; with ``tuning``, on data on which reported runs are not scored."""
        ...

    def seeds(self, method: str) -> Sequence[int]:
        """The seeds of the search for the options of ``method``: `SEEDS`, or more."""
        ...

    def tuned_on(self, scenario: str) -> str:
        """The scenario in which the options for ``scenario`` are searched."""
        ...

    def sweep(self, method: str, scenario: str) -> tuple[str, Sequence[Any]] | None:
        """(option, its values) of the method's trade-off curve in ``scenario``; None if it has no curve."""
        ...

    def score(self, record: Record, others: Mapping[str, Record]) -> float:
        """What tuning maximises.

        Args:
            others: runs of the `references` in the same scenario with the same seed: under a reference's name the run
                with the chosen options, under `best_of` its name the run that scored best with this seed.
        """
        ...

    def combine(self, method: str, scores: Sequence[float]) -> float:
        """Combine the scores of one setting, one for each seed, into a single number."""
        ...

    def measure(self, record: Record, others: Mapping[str, Record]) -> dict[str, float | None]:
        """The figures of a run, by name; ``others`` has the runs of the same scenario and seed, by method."""
        ...

    def facts(self) -> Record:
        """Further facts that are stored with the results."""
        ...

    def plot(self, records: Sequence[Record], rows: Sequence[Record], title: str, prefix: str) -> list[str]:
        """Draw the results into files whose paths begin with ``prefix``; returns the paths.

        Args:
            records: the runs, including those of a `sweep` (see `swept`).
            rows: the summary of the runs, from `bench.learning.report.summarise`.
        """
        ...


M = TypeVar("M")


def named(methods: Mapping[str, M], name: str) -> M:
    """The method ``name`` of a suite's ``methods``.

    Raises:
        ValueError: if there is none.
    """
    if name not in methods:
        raise ValueError(f"method must be one of {list(methods)}, got {name!r}")
    return methods[name]


def best_of(method: str) -> str:
    """The name under which `Suite.score` finds the run of the reference ``method`` that scored best with that seed."""
    return f"{method}, best"


def device_of(suite: Suite) -> str:
    """The device on which ``suite`` runs: its attribute ``device``, for a suite that has this setting."""
    return getattr(suite, "device", "cpu")


def protocol_of(suite: Suite, *, tuning: bool, sweep: bool = False) -> Record:
    """The ``protocol`` of a run: that of the suite, and the device unless it is "cpu".

    Args:
        tuning: whether the run is made to choose options.
        sweep: whether the run belongs to a trade-off curve only.
    """
    device = device_of(suite)
    where = {} if device == "cpu" else {"device": device}
    return {**suite.protocol(), **where, "tuning": tuning, **({"sweep": True} if sweep else {})}


def stem_of(suite: Suite) -> str:
    """The beginning of the names of all files of results; runs on another device than "cpu" have files of their own."""
    device = device_of(suite)
    return f"benchmark_{suite.name}" if device == "cpu" else f"benchmark_{suite.name}_{device}"


def swept(record: Record) -> bool:
    """Whether a run belongs to a trade-off curve and not to the tables."""
    return record["protocol"].get("sweep", False)


def candidates(grid: Mapping[str, Sequence[Any]]) -> list[Record]:
    """All combinations of the values of a grid, in its order."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
