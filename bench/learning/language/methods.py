"""The methods that the suite "streams" compares.

Each rate is a method of its own. A table shows the best rate of a group for each text: these rates are chosen on the
very text that is reported, which favours all methods over the package's default, which is the same for all texts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import ttt
from bench.learning.language import readers
from bench.learning.language.base import CONFIG, Base, as_json
from bench.learning.language.readers import Reader
from bench.learning.suite import named

Options = Mapping[str, Any]

ADAM_RATES = (2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4)
SGD_RATES = (0.003, 0.00625, 0.0125, 0.025)
HARD_PROJECTION_RATES = (0.009, 0.0175, 0.035, 0.07)
LORA: Options = {"rank": 16, "alpha": 32, "lr": 5e-4}
DEFAULT = "default"


@dataclasses.dataclass(frozen=True)
class LanguageMethod:
    """One row of the results.

    Attributes:
        group: methods that differ only in their rate.
        family: a key of `bench.learning.report.COLOURS`.
        options: what ``make`` gets; plain values.
        make: makes the reader of one run from the base model, the options and a seed.
        hard: whether the method also reads the hard texts.
    """

    group: str
    family: str
    options: Options
    make: Callable[[Base, Options, int], Reader]
    hard: bool = False


def _frozen(base: Base, o: Options, seed: int) -> Reader:
    return Reader(base.model)


def _learner(base: Base, o: Options, seed: int) -> Reader:
    return readers.Learning(base.learner(ttt.TTTConfig.from_dict(o["config"])))


def _adam(base: Base, o: Options, seed: int) -> Reader:
    return readers.adam(base, o["lr"])


def _lora(base: Base, o: Options, seed: int) -> Reader:
    return readers.lora(base, **o, seed=seed)


def _options(config: ttt.TTTConfig) -> Options:
    """All settings, so that a run with other defaults is another run."""
    return {"config": as_json(config)}


# All settings of the step are named: with other defaults of the package these methods stay what they are.
_plain = functools.partial(dataclasses.replace, CONFIG, rate="rms", clip=3.0, burst=1.2, feedback=0.0)

METHODS: dict[str, LanguageMethod] = {
    "frozen": LanguageMethod("frozen", "reference", {}, _frozen, hard=True),
    DEFAULT: LanguageMethod(DEFAULT, "combination", _options(CONFIG), _learner, hard=True),
    # Gradient descent without protection; a rate is in units of the root mean square of the gradients.
    **{
        f"SGD {lr:g}": LanguageMethod("SGD", "reference", _options(_plain(lr=lr, protect=[])), _learner)
        for lr in SGD_RATES
    },
    **{
        f"hard projection {lr:g}": LanguageMethod(
            "hard projection", "orthogonal", _options(_plain(lr=lr, protect=[ttt.OrthogonalUpdates(32)])), _learner
        )
        for lr in HARD_PROJECTION_RATES
    },
    **{f"Adam {lr:g}": LanguageMethod("Adam", "workaround", {"lr": lr}, _adam, hard=lr == 1e-4) for lr in ADAM_RATES},
    "LoRA": LanguageMethod("LoRA", "workaround", LORA, _lora, hard=True),
}
"""Name -> method, in the order of the tables."""


def method(name: str) -> LanguageMethod:
    """The method ``name``.

    Raises:
        ValueError: if there is none.
    """
    return named(METHODS, name)
