"""The tables of the suite "facts", for `bench.tables`: lists of a head and lines of cells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.learning.facts.methods import METHODS
from bench.learning.facts.run import SCENARIOS
from bench.learning.report import about_gpu, cell

Lines = list[tuple[str, ...]]


def about(found: Mapping[str, Any]) -> Lines:
    """The command, the machine and the date of the results; ``found`` is all of them."""
    machine = found["machine"]
    if "gpu" in machine:
        return about_gpu(found, "python -m bench.learning --suite facts --device cuda")
    return [
        ("command", "processor", "cores", "threads", "torch", "date"),
        (
            "`python -m bench.learning --suite facts`", machine["processor"], str(machine["cores"]),
            str(machine["threads"]), machine["torch"], found["date"],
        ),
    ]  # fmt: skip


def by_scenario(found: Mapping[str, Any]) -> Lines:
    """The share of right answers of every method in every scenario, with the number of people.

    Where a method was told by fewer people than the head says, their number stands in the cell.
    """
    rows = {(row["scenario"], row["method"]): row for row in found["rows"]}
    shown = [scenario for scenario in SCENARIOS if any(s == scenario for s, _ in rows)]
    people = {s: max(row["seeds"] for (each, _), row in rows.items() if each == s) for s in shown}
    lines: Lines = [("method", *(f"{s} ({people[s]})" for s in shown))]
    for method in METHODS:
        if any((scenario, method) in rows for scenario in shown):
            lines.append((method, *(_right(rows.get((s, method)), people[s]) for s in shown)))
    return lines


def _right(row: Mapping[str, Any] | None, people: int) -> str:
    if row is None:
        return ""
    return cell(row["right"], 2) + ("" if row["seeds"] == people else f" ({row['seeds']})")


def costs(found: Mapping[str, Any]) -> Lines:
    """Of the first scenario: drift, facts ascribed to others and, if measured, answers written freely and time."""
    figures = (
        ("written", 2, "right when written"), ("rank", 2, "rank"), ("kl", 4, "KL, English"),
        ("general", 3, "general, nats"), ("texts", 4, "texts, nats"),
        ("neighbour", 2, "ascribed to a neighbour"), ("told", 1, "telling, s"), ("asked", 1, "asking, s"),
    )  # fmt: skip
    rows = [row for row in found["rows"] if row["scenario"] == next(iter(SCENARIOS))]
    shown = [each for each in figures if any(row.get(each[0]) is not None for row in rows)]
    lines: Lines = [("method", *(title for _, _, title in shown))]
    for row in rows:
        lines.append((row["method"], *(cell(row[name], digits) for name, digits, _ in shown)))
    return lines
