"""The best rate of each group of methods, for each text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from bench.learning.language.methods import METHODS

Row = Mapping[str, Any]


def best(rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """(scenario, group) -> the row of the group's method that gained most there.

    Args:
        rows: of `bench.learning.report.summarise`; those without a gain are left out.
    """
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row["gain"] is not None:
            key = row["scenario"], METHODS[row["method"]].group
            if key not in found or row["gain"][0] > found[key]["gain"][0]:
                found[key] = row
    return found


def mean(rows: Sequence[Row], figure: str) -> float:
    """The mean of a figure over rows."""
    return fmean(row[figure][0] for row in rows)
