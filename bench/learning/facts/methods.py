"""The methods that the suite "facts" compares, and the values that tuning tries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.learning.facts import contenders
from bench.learning.language.base import CONFIG, Base, as_json
from bench.learning.suite import named
from ttt import DriftBudget
from ttt.conversation import CONVERSATION, Telling
from ttt.nn.own_loss import BEYOND


@dataclasses.dataclass(frozen=True)
class FactsMethod:
    """One row of the table.

    Attributes:
        family: a key of `bench.learning.report.COLOURS`.
        make: makes the contender from the base model, the options and a seed.
        grid: option -> values; tuning tries all combinations of them.
        told_only: whether the method is run in the first scenario only.
    """

    family: str
    make: Callable[[Base, Mapping[str, Any], int], contenders.Contender]
    grid: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    told_only: bool = False


def _learner(told_only: bool = False, **options: Any) -> FactsMethod:
    # All settings are among the options, so that a run with other defaults of the package is another run.
    grid = {name: (value,) for name, value in {"config": as_json(CONFIG), **options}.items()}
    return FactsMethod("combination", contenders.Online, grid, told_only)


PASSES: dict[str, Any] = {**Telling().options, "beyond": BEYOND}
"""Two readings of what is told, with large steps: the default of `ttt chat` and `ttt serve`."""

TALKING = "online (as in conversations)"
"""The method that learns as `ttt chat`, ``ttt serve`` and the demo do."""


def _talking() -> FactsMethod:
    budget = next(each for each in CONVERSATION.protect if isinstance(each, DriftBudget))
    own = CONVERSATION.per_user
    assert own is not None
    return _learner(
        **PASSES, budget=budget.nats, slowest=budget.slowest, rank=own.rank, window=own.window,
        layers=CONVERSATION.layers,
    )  # fmt: skip


METHODS: dict[str, FactsMethod] = {
    "frozen": FactsMethod("reference", contenders.Contender),
    "in context": FactsMethod("reference", contenders.InContext),
    "its fact in context": FactsMethod("reference", contenders.OwnFact),
    "retrieval": FactsMethod("workaround", contenders.Retrieval, {"count": (1, 3)}),
    "LoRA": FactsMethod("workaround", contenders.LoRA, {"rank": (8,), "lr": (1e-3, 3e-3), "steps": (10, 20)}),
    "MEMIT": FactsMethod(
        "workaround", contenders.Memit, {"blocks": ("middle", "last"), "weight": (1000.0, 15000.0, 150000.0)}
    ),
    "online": _learner(),
    "online (2 passes of emphasis 20)": _learner(**PASSES),
    "online (2 passes of emphasis 20, first quarter of the blocks)": _learner(True, **PASSES, blocks="first"),
    "online (2 passes of emphasis 20, middle quarter of the blocks)": _learner(True, **PASSES, blocks="middle"),
    "online (2 passes of emphasis 20, half of the blocks)": _learner(True, **PASSES, layers="last:0.5"),
    TALKING: _talking(),
    "study": _learner(study=True),
    "study (no rehearsal)": _learner(told_only=True, study=True, rehearse=0.0),
    "study (a user's weights)": _learner(told_only=True, study=True, rank=32, window=64),
    "study (first quarter of the blocks)": _learner(told_only=True, study=True, blocks="first"),
    "study (middle quarter of the blocks)": _learner(told_only=True, study=True, blocks="middle"),
    "study (half of the blocks)": _learner(study=True, layers="last:0.5"),
}
"""Name -> method, in the order of the tables. The references that others are scored against come first."""


def method(name: str) -> FactsMethod:
    """The method ``name``.

    Raises:
        ValueError: if there is none.
    """
    return named(METHODS, name)
