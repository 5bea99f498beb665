"""The suite "text": a language model reads kinds of text it has never seen, and should keep what it knew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from bench.learning import metrics, streams, text_plots
from bench.learning.suite import SEEDS, Figure, Record, best_of
from bench.learning.text.methods import EPOCHS, METHODS, NEIGHBOURS, PERIOD, method
from ttt.demo.model import CONFIG


class TextSuite:
    """See `bench.learning.text.streams` for the scenarios and `bench.learning.text.methods` for the methods.

    Shares are of what naive, plain SGD at the rate that gains most, does to the same stream: its gain over the frozen
    model on the new text, and what it adds to the bits per byte of held-out Python.
    """

    name = "text"
    scenarios: Sequence[str] = streams.SCENARIOS
    methods: Sequence[str] = tuple(METHODS)
    references: Sequence[str] = ("frozen", "naive")
    figures: Sequence[Figure] = (
        Figure("new", "new text, bits", 3, "bits per byte of the stream, each byte scored before it is learnt"),
        Figure("gain", "gain, bits", 3, "bits per byte less than the frozen model"),
        Figure("gain_share", "of naive's", 2, "that gain as a share of naive's"),
        Figure("old", "Python, bits", 3, "bits per byte of held-out Python sources after the stream"),
        Figure("forgetting_share", "forgetting, of naive's", 2, "what was added to them, as a share of naive's"),
        Figure("forgetting", "of domains, bits", 3,
               "recurring: bits per byte of a domain's held-out text at the end, less the fewest before; "
               "mean over the domains but the last"),
        Figure("bwt", "BWT, bits", 3, "recurring: the same after a domain's last segment, less at the end"),
        Figure("recovery", "recovery, bytes", 0,
               "recurring: bytes until a domain that comes back is within 5 % of the bits per byte it was left at"),
        Figure("time", "time", 2, "per byte, the frozen model's being 1, measured in turn in the same run"),
        Figure("state", "bytes a weight", 1, "kept beside the weights, for each weight that a learner may change"),
    )  # fmt: skip

    def protocol(self) -> Record:
        fixed = {name: getattr(CONFIG, name) for name in ("layers", "window", "chunk", "clip")}
        fixed["target_modules"] = list(CONFIG.target_modules or ())
        return {
            "adapt": streams.ADAPT, "segment": streams.SEGMENT, "search": streams.SEARCH, "config": fixed,
            "fine_tuning": {"period": PERIOD, "epochs": EPOCHS}, "neighbours": NEIGHBOURS,
        }  # fmt: skip

    def facts(self) -> Record:
        held = {d: len(streams.read(d)) for d in (*streams.REPORTED, *streams.TUNING) if d not in streams.missing()}
        return {"domains": held, "missing": streams.missing()}

    def fits(self, method: str, scenario: str) -> bool:
        if scenario == "recurring" and not METHODS[method].recurs:
            return False
        return scenario.removeprefix("adapt-") not in streams.missing()

    def family(self, name: str) -> str:
        return method(name).family

    def grid(self, name: str) -> Mapping[str, Sequence[Any]]:
        return method(name).grid

    def seeds(self, name: str) -> Sequence[int]:
        return range(SEEDS[0], SEEDS[0] + method(name).streams)

    def combine(self, name: str, scores: Sequence[float]) -> float:
        return min(scores) if method(name).score == "worst" else fmean(scores)

    def tuned_on(self, scenario: str) -> str:
        return streams.TUNED_ON

    def sweep(self, name: str, scenario: str) -> tuple[str, Sequence[Any]] | None:
        return method(name).sweep if scenario in streams.SWEPT else None

    def run(self, scenario: str, method: str, seed: int, options: Record, *, tuning: bool) -> Record:
        from bench.learning.text.run import run

        return run(scenario, method, seed, options, tuning=tuning)

    def score(self, record: Record, others: Mapping[str, Record]) -> float:
        """The share of naive's gain less that of its forgetting; of a reference the gain alone.

        For "worst" naive is at the rate that gains most on this very text.
        """
        if method(record["method"]).score == "new":
            return -record["new"]
        if record["method"] == "frozen":
            return 0.0
        if method(record["method"]).score == "worst":
            others = {**others, "naive": others[best_of("naive")]}
        gain, forgetting = shares(record, others)
        if gain is None or forgetting is None:
            raise ValueError(f"naive gained or forgot nothing in {record['scenario']!r}, seed {record['seed']}")
        return gain - forgetting

    def measure(self, record: Record, others: Mapping[str, Record]) -> dict[str, float | None]:
        gain, forgetting = shares(record, others)
        matrix, columns = record["matrix"], list(dict.fromkeys(record["segments"]))
        visits = [columns.index(domain) for domain in record["segments"]]
        recurs = len(visits) > 1
        frozen, recovery = others.get("frozen"), record["recovery"]
        return {
            "new": record["new"],
            "gain": None if frozen is None else frozen["new"] - record["new"],
            "gain_share": gain,
            "old": record["old"],
            "forgetting_share": forgetting,
            "forgetting": metrics.recurring_forgetting(matrix, visits) if recurs else None,
            "bwt": metrics.recurring_backward_transfer(matrix, visits) if recurs else None,
            "recovery": sum(recovery) / len(recovery) if recovery else None,
            "time": record["time_ratio"],
            "state": record["state_bytes"] / record["parameters"],
        }

    def plot(self, records: Sequence[Record], rows: Sequence[Record], title: str, prefix: str) -> list[str]:
        """Shares as bars, the trade-off curves, and bits per byte along the recurring stream, where there are runs."""
        return text_plots.draw(self, records, rows, title, prefix)


def shares(record: Record, others: Mapping[str, Record]) -> tuple[float | None, float | None]:
    """(share of naive's gain, share of naive's forgetting) of a run; ``others``: of the same stream, by method.

    None where there is no run of naive or frozen, or naive has none to have a share of.
    """
    frozen, naive = others.get("frozen"), others.get("naive")
    if frozen is None or naive is None:
        return None, None
    return (
        metrics.share(frozen["new"] - record["new"], frozen["new"] - naive["new"]),
        metrics.share(record["old"] - frozen["old"], naive["old"] - frozen["old"]),
    )
