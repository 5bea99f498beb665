"""The methods that the vision suite compares: what each is made of, and what tuning may try."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

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
# Penalties span decades: which is best depends on the scenario, not only on the rule.
LAMBDAS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        family: "reference", "regularisation", "replay" or "architecture".
        build: from the options other than ``lr``, and a seed, the rules of one run.
        grid: option -> values that tuning tries, all combinations of them.
        needs_task: it has to be told the task at test time.
        score: what tuning maximises: "acc", or "learning", the mean accuracy on each task just after it was learnt.
    """

    family: str
    build: Callable[[Options, int], list[Rule]]
    grid: Mapping[str, tuple]
    needs_task: bool = False
    score: str = "acc"


def _ewc(mode: str, fisher: str) -> Callable[[Options, int], list[Rule]]:
    return lambda o, seed: [EWC(o["lam"], mode=mode, fisher=fisher, seed=seed)]


METHODS: dict[str, Method] = {
    # Learns the first task and nothing after it: what a model that never learns from use would know.
    "frozen": Method("reference", lambda o, s: [], {"lr": RATES}),
    # Plain SGD at the rate that learns each new task best, and at the rate that ends with the best ACC, as the others'.
    "naive": Method("reference", lambda o, s: [], {"lr": RATES}, score="learning"),
    "naive (own rate)": Method("reference", lambda o, s: [], {"lr": SLOW}),
    # For each row a new model, trained on all tasks so far together: the upper bound.
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
    # Not quite blind: 4 rows and beta .1 joined this grid after reported figures of 16 rows had been seen, and so did
    # the ends of LAMBDAS. The choice within the grids is the search's.
    "layer replay": Method(
        "replay", lambda o, s: [LayerReplay(o["rows"], beta=o["beta"], capacity=BUFFER)],
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
    if name not in METHODS:
        raise ValueError(f"method must be one of {list(METHODS)}, got {name!r}")
    return METHODS[name]


def fits(name: str, scenario: str) -> bool:
    """Whether ``name`` can run in ``scenario``: a method that needs the task runs where the task is told."""
    return not method(name).needs_task or scenario == "split-task"
