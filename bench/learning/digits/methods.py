"""The methods that the suite "digits" compares: their rules, and the values that tuning tries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.learning.suite import named
from ttt.defences import Defence
from ttt.rules import (
    EWC,
    MAS,
    DarkExperienceReplay,
    ExperienceReplay,
    GenerativeReplay,
    LayerReplay,
    LwF,
    Progressive,
    Rule,
    SynapticIntelligence,
)

Options = Mapping[str, Any]

BUFFER = 200
RATES = (0.005, 0.01, 0.02)
SLOW = (0.0025, *RATES)
# Penalties span decades, because the best one depends on the scenario as well as on the rule.
LAMBDAS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        family: "reference", "regularisation", "replay" or "architecture".
        build: makes the rules of one run from the options (``lr`` is not used) and a seed.
        grid: option -> values; tuning tries all combinations of them.
        needs_task: whether it must be told the task at test time.
        score: what tuning maximises. "acc": the mean accuracy at the end; "learning": the mean accuracy on each task
            directly after it was learnt.
    """

    family: str
    build: Callable[[Options, int], Sequence[Rule | Defence]]
    grid: Mapping[str, tuple]
    needs_task: bool = False
    score: str = "acc"


def _ewc(mode: str, fisher: str) -> Callable[[Options, int], Sequence[Rule | Defence]]:
    return lambda o, seed: [EWC(o["lam"], mode=mode, fisher=fisher, seed=seed)]


METHODS: dict[str, Method] = {
    # Learns only the first task, as a model that does not learn from use.
    "frozen": Method("reference", lambda o, s: [], {"lr": RATES}),
    # Plain SGD, at the rate that learns each new task best, and at the rate with the best ACC at the end.
    "naive": Method("reference", lambda o, s: [], {"lr": RATES}, score="learning"),
    "naive (own rate)": Method("reference", lambda o, s: [], {"lr": SLOW}),
    # The upper bound: for each row a new model, trained on all tasks so far together.
    "joint": Method("reference", lambda o, s: [], {"lr": RATES}),
    "EWC separate": Method("regularisation", _ewc("separate", "exact"), {"lr": RATES, "lam": LAMBDAS}),
    "EWC online": Method("regularisation", _ewc("online", "exact"), {"lr": RATES, "lam": LAMBDAS}),
    "EWC online (empirical)": Method("regularisation", _ewc("online", "empirical"), {"lr": RATES, "lam": LAMBDAS}),
    "SI": Method(
        "regularisation", lambda o, s: [SynapticIntelligence(o["lam"])],
        {"lr": RATES, "lam": LAMBDAS},
    ),
    "MAS": Method("regularisation", lambda o, s: [MAS(o["lam"])], {"lr": RATES, "lam": LAMBDAS}),
    "LwF": Method(
        "regularisation", lambda o, s: [LwF(o["weight"], temperature=2.0)],
        {"lr": RATES, "weight": (0.05, 0.1, 0.25, 0.5)},
    ),
    f"ER {BUFFER}": Method(
        "replay", lambda o, s: [ExperienceReplay(BUFFER, fill=o["fill"], seed=s)],
        {"lr": RATES, "fill": ("step", "task")},
    ),
    f"DER {BUFFER}": Method(
        "replay", lambda o, s: [DarkExperienceReplay(BUFFER, alpha=o["alpha"], beta=0.0, seed=s)],
        {"lr": RATES, "alpha": (0.03, 0.1, 0.3)},
    ),
    f"DER++ {BUFFER}": Method(
        "replay", lambda o, s: [DarkExperienceReplay(BUFFER, alpha=o["alpha"], beta=o["beta"], seed=s)],
        {"lr": RATES, "alpha": (0.03, 0.1), "beta": (0.5, 1.0)},
    ),
    "generative": Method(
        "replay", lambda o, s: [GenerativeReplay(components=o["components"], low=0.0, high=1.0, weight=o["weight"],
                                                 seed=s)],
        {"lr": RATES, "components": (16,), "weight": (0.3, 1.0)},
    ),
    # 4 rows, beta .1 and the ends of LAMBDAS were added after results with 16 rows had been seen; the choice within
    # the grid is the search's.
    "layer replay": Method(
        "replay", lambda o, s: [LayerReplay(o["rows"], strength=o["beta"])],
        {"lr": RATES, "rows": (4, 16, 64), "beta": (0.1, 0.3, 1.0)},
    ),
    "EWC + ER": Method(
        "replay", lambda o, s: [EWC(o["lam"], fisher="exact", seed=s), ExperienceReplay(BUFFER, fill="task", seed=s)],
        {"lr": RATES, "lam": LAMBDAS[:3]},
    ),
    "PNN": Method("architecture", lambda o, s: [Progressive()], {"lr": RATES}, needs_task=True),
}  # fmt: skip


def method(name: str) -> Method:
    """The method ``name``.

    Raises:
        ValueError: if there is none.
    """
    return named(METHODS, name)


def fits(name: str, scenario: str) -> bool:
    """Whether ``name`` can run in ``scenario``: a method that needs the task runs only in "split-task"."""
    return not method(name).needs_task or scenario == "split-task"
