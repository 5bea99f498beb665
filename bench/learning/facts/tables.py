"""The tables of the suite "facts", for `bench.tables`: lists of a head and lines of cells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.learning.facts.methods import METHODS
from bench.learning.facts.run import SCENARIOS
from bench.learning.report import cell

Lines = list[tuple[str, ...]]


def about(found: Mapping[str, Any]) -> Lines:
    """The command, the machine and the date of the results; ``found`` is all of them."""
    machine = found["machine"]
    return [
        ("command", "processor", "cores", "threads", "torch", "date"),
        (
            "`python -m bench.learning --suite facts`", machine["processor"], str(machine["cores"]),
            str(machine["threads"]), machine["torch"], found["date"],
        ),
    ]  # fmt: skip


def by_scenario(found: Mapping[str, Any]) -> Lines:
    """The share of right answers of every method in every scenario, with the number of people."""
    rows = {(row["scenario"], row["method"]): row for row in found["rows"]}
    shown = [scenario for scenario in SCENARIOS if any(s == scenario for s, _ in rows)]
    people = {s: max(row["seeds"] for (each, _), row in rows.items() if each == s) for s in shown}
    lines: Lines = [("method", *(f"{s} ({people[s]})" for s in shown))]
    for method in METHODS:
        if any((scenario, method) in rows for scenario in shown):
            cells = [cell(rows[s, method]["right"], 2) if (s, method) in rows else "" for s in shown]
            lines.append((method, *cells))
    return lines


def costs(found: Mapping[str, Any]) -> Lines:
    """What the first scenario cost: drift, general knowledge, facts ascribed to someone else, time."""
    figures = (("rank", 2), ("kl", 4), ("general", 3), ("texts", 4), ("neighbour", 2), ("told", 1), ("asked", 1))
    lines: Lines = [
        ("method", "rank", "KL, English", "general, nats", "texts, nats", "ascribed to a neighbour", "telling, s",
         "asking, s")
    ]  # fmt: skip
    for row in found["rows"]:
        if row["scenario"] == next(iter(SCENARIOS)):
            lines.append((row["method"], *(cell(row[name], digits) for name, digits in figures)))
    return lines
