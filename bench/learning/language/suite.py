"""The suite "streams": a language model reads streams of text and should not forget what it knew."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from bench.learning import metrics
from bench.learning.language import plot, texts
from bench.learning.language.base import CONTEXT, GENERAL, Base, check_text, smollm
from bench.learning.language.hard import CHUNK, HARD
from bench.learning.language.measures import BLOCKS
from bench.learning.language.methods import METHODS, method
from bench.learning.language.run import run
from bench.learning.runs import shares_gpu
from bench.learning.suite import SEEDS, Figure, Record
from ttt.demo.language_model import PACKAGE
from ttt.learn.own_text import LENGTH, SEQUENCES

SHARE = 4  # a hard text is shorter by this factor: it shows harm soon, or not at all


class StreamsSuite:
    """The suite "streams"; for its scenarios see `.texts` and `.hard` in this folder, for its methods `.methods`.

    A seed is the part of the text that is read, counted from 0, and the seed of random draws.

    Args:
        tokens: to read of each text; a `SHARE`-th of them of each hard text.
        base: makes what all runs of a process share, on the device that it is called with.
        device: where all is computed.
    """

    name = "streams"
    scenarios: Sequence[str] = (*texts.REPORTED, *HARD)
    methods: Sequence[str] = tuple(METHODS)
    references: Sequence[str] = ("frozen",)
    figures: Sequence[Figure] = (
        Figure("nll", "nats per token", 3, "mean loss on the text, each token scored before it is learnt"),
        Figure("gain", "gain", 3, "the frozen model's loss on the text minus the method's, in nats per token"),
        Figure("gain_width", "gain, ±", 3,
               f"half the 95 % interval of the gain, from the means of {BLOCKS} parts of the text (Student's t)"),
        Figure("kl", "KL", 4, "KL(frozen || learnt) on general English text afterwards, in nats per token"),
        Figure("kl_width", "KL, ±", 4, f"half the 95 % interval of the KL, from {BLOCKS} parts of that text"),
        Figure("facts", "facts", 3, "increase of the loss on how 30 facts go on, in nats per fact"),
        Figure("time", "time", 2, "time per token, divided by that of a forward pass in the same run"),
    )  # fmt: skip

    def __init__(self, tokens: int = 4096, base: Callable[[str], Base] = smollm, device: str = "cpu") -> None:
        self.tokens = tokens
        self.base, self.device = base, device

    @property
    def tokens(self) -> int:
        """Number of tokens that are read of each text."""
        return self._tokens

    @tokens.setter
    def tokens(self, value: int) -> None:
        if value < SHARE * CHUNK or value % (SHARE * CHUNK):
            raise ValueError(f"tokens must be a multiple of {SHARE * CHUNK}, got {value}")
        self._tokens = value

    def protocol(self) -> Record:
        return {
            "model": PACKAGE, "tokens": self.tokens, "hard": self.tokens // SHARE, "context": CONTEXT, "chunk": CHUNK,
            "general": list(GENERAL), "samples": [SEQUENCES, LENGTH],
        }  # fmt: skip

    def facts(self) -> Record:
        return {"texts": {name: texts.SOURCES[name].what for name in texts.REPORTED}}

    def fits(self, name: str, scenario: str) -> bool:
        """Whether ``name`` reads ``scenario``.

        Raises:
            FileNotFoundError: if the text is not on this machine, so that nothing is run without it.
        """
        if scenario in HARD and not method(name).hard:
            return False
        _check(scenario)
        return True

    def family(self, name: str) -> str:
        return method(name).family

    def grid(self, name: str) -> Mapping[str, Sequence[Any]]:
        return {option: (value,) for option, value in method(name).options.items()}

    def seeds(self, name: str) -> Sequence[int]:
        return SEEDS

    def combine(self, name: str, scores: Sequence[float]) -> float:
        return fmean(scores)

    def tuned_on(self, scenario: str) -> str:
        return texts.TUNING

    def sweep(self, name: str, scenario: str) -> None:
        return None

    def run(self, scenario: str, method: str, seed: int, options: Record, *, tuning: bool) -> Record:
        if (scenario == texts.TUNING) != tuning:
            raise ValueError(f"scenario must be {texts.TUNING!r} if, and only if, options are tuned, got {scenario!r}")
        base = self.base(self.device)
        count = self.tokens // SHARE if scenario in HARD else self.tokens
        ids = base.tokens(scenario, count, seed - SEEDS[0] if tuning else seed)
        return run(base, METHODS[method], ids, seed, options)

    def score(self, record: Record, others: Mapping[str, Record]) -> float:
        """The gain; for the frozen model 0."""
        return others["frozen"]["nll"] - record["nll"] if "frozen" in others else 0.0

    def measure(self, record: Record, others: Mapping[str, Record]) -> dict[str, float | None]:
        frozen = others.get("frozen")
        kl, kl_width = metrics.interval(record["kl"])
        time = None if shares_gpu(record) else record["time_ratio"]
        found = {"nll": record["nll"], "kl": kl, "kl_width": kl_width, "time": time}
        if frozen is None:
            return {**found, "gain": None, "gain_width": None, "facts": None}
        # Of the differences within each part: the parts differ far more in how hard they are than in the gain.
        gain, width = metrics.interval([a - b for a, b in zip(frozen["blocks"], record["blocks"], strict=True)])
        return {**found, "gain": gain, "gain_width": width, "facts": record["facts"] - frozen["facts"]}

    def plot(self, records: Sequence[Record], rows: Sequence[Record], title: str, prefix: str) -> list[str]:
        """Draw the gain against the divergence."""
        return plot.draw(rows, title, prefix)


@functools.cache
def _check(scenario: str) -> None:
    check_text(scenario)
