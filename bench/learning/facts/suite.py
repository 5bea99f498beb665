"""The suite "facts": what a language model was told in one chat and is asked in another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from bench.learning import report
from bench.learning.facts.known import KNOWN
from bench.learning.facts.methods import METHODS, method
from bench.learning.facts.people import KINDS
from bench.learning.facts.run import CHAT, SCENARIOS, TEXTS, TOKENS, run
from bench.learning.language.base import CONFIG, GENERAL, Base, smollm
from bench.learning.runs import shares_gpu
from bench.learning.suite import SEEDS, Figure, Record
from ttt.demo.language_model import PACKAGE
from ttt.demo.questions import REPLY, SYSTEM

MOVED = 0.01  # nats by which what the model knew may become less probable before tuning subtracts anything


class FactsSuite:
    """The suite "facts"; for its methods see `bench.learning.facts.methods`.

    A person tells ten facts in a chat, says other things in other chats (`bench.learning.facts.run.SCENARIOS`), and
    asks three questions about each fact in new chats. The model chooses the answer among ten values, so that chance is
    right one time in ten. A seed is a person.

    Args:
        base: makes what all runs of a process share, on the device that it is called with.
        device: where all is computed.
    """

    name = "facts"
    scenarios: Sequence[str] = tuple(SCENARIOS)
    methods: Sequence[str] = tuple(METHODS)
    references: Sequence[str] = ("frozen",)
    figures: Sequence[Figure] = (
        Figure("right", "right", 2, "share of the questions for which the right value of ten is the most probable"),
        Figure("rank", "rank", 2, "rank of the right value among the ten, by probability; mean over the questions"),
        Figure("nll", "answer, nats", 2, "nats of the right value, mean over the questions"),
        Figure(
            "written", "written", 2, "share of the questions whose freely written answer names the right value only"
        ),
        Figure("general", "known, nats", 4, "increase of the nats of 100 general facts over the frozen model's"),
        Figure("kl", "English, KL", 4, "KL from the frozen model on general English, nats per token"),
        Figure("texts", "texts, nats", 4, "increase of the nats per token of three texts over the frozen model's"),
        Figure("neighbour", "neighbour", 2, "share of the facts chosen for a neighbour, too, of whom nothing was said"),
        Figure("told", "telling, s", 1, "seconds of telling and studying: processor time, on a GPU the wall clock's"),
        Figure("asked", "asking, s", 1, "seconds of asking the 30 questions, likewise"),
    )

    def __init__(self, base: Callable[[str], Base] = smollm, device: str = "cpu") -> None:
        self.base, self.device = base, device

    def protocol(self) -> Record:
        return {
            "model": PACKAGE, "kinds": len(KINDS), "chat": CHAT, "system": SYSTEM, "reply": REPLY,
            "layers": [*(CONFIG.target_modules or ()), CONFIG.layers], "general": list(GENERAL),
            "known": len(KNOWN), "texts": [*TEXTS, TOKENS],
        }  # fmt: skip

    def facts(self) -> Record:
        return {}

    def fits(self, name: str, scenario: str) -> bool:
        return scenario == self.scenarios[0] or not method(name).told_only

    def family(self, name: str) -> str:
        return method(name).family

    def grid(self, name: str) -> Mapping[str, Sequence]:
        return method(name).grid

    def seeds(self, name: str) -> Sequence[int]:
        return SEEDS

    def tuned_on(self, scenario: str) -> str:
        return self.scenarios[0]

    def sweep(self, name: str, scenario: str) -> None:
        return None

    def run(self, scenario: str, method: str, seed: int, options: Record, *, tuning: bool) -> Record:
        return run(self.base(self.device), METHODS[method], scenario, seed, options)

    def score(self, record: Record, others: Mapping[str, Record]) -> float:
        """The share of right answers, minus 10 for each nat above `MOVED` that general facts became less probable."""
        moved = 0.0 if record["method"] == "frozen" else record["general"] - others["frozen"]["general"]
        return _right(record) - 10 * max(0.0, moved - MOVED)

    def combine(self, name: str, scores: Sequence[float]) -> float:
        return fmean(scores)

    def measure(self, record: Record, others: Mapping[str, Record]) -> dict[str, float | None]:
        frozen, shared = others.get("frozen"), shares_gpu(record)
        return {
            "right": _right(record),
            "rank": fmean(record["ranks"]),
            "nll": record["nll"],
            "written": record.get("written"),  # runs on a GPU were made before answers were written
            "general": None if frozen is None else record["general"] - frozen["general"],
            "kl": record["kl"],
            "texts": None if frozen is None else fmean(record["texts"]) - fmean(frozen["texts"]),
            "neighbour": record["neighbour"],
            "told": None if shared else record["told_seconds"],
            "asked": None if shared else record["asked_seconds"],
        }

    def plot(self, records: Sequence[Record], rows: Sequence[Record], title: str, prefix: str) -> list[str]:
        """Draw the shares of right answers as bars."""
        path = f"{prefix}_right.png"
        report.bars(self, rows, "right", "right answers", title, path)
        return [path]


def _right(record: Record) -> float:
    return fmean(rank == 1 for rank in record["ranks"])
