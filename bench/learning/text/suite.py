"""The suite "text": a language model reads new kinds of text and should not forget what it knew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from bench.learning import metrics
from bench.learning.suite import SEEDS, Figure, Record, best_of
from bench.learning.text import plots, streams
from bench.learning.text.methods import EPOCHS, METHODS, NEIGHBOURS, PERIOD, method
from bench.learning.text.run import run
from ttt.demo.model import COMBINED


class TextSuite:
    """The suite "text"; for its scenarios see `bench.learning.text.streams`, for its methods `.text.methods`.

    Shares are relative to naive (SGD without protection, at the rate that gains most) on the same stream: the gain
    share to its gain over the frozen model on the new text, the forgetting share to its increase of the bits per byte
    of held-out Python.
    """

    name = "text"
    scenarios: Sequence[str] = streams.SCENARIOS
    methods: Sequence[str] = tuple(METHODS)
    references: Sequence[str] = ("frozen", "naive")
    figures: Sequence[Figure] = (
        Figure("new", "new text, bits", 3, "bits per byte of the stream, each byte scored before it is learnt"),
        Figure("gain", "gain, bits", 3, "the frozen model's bits per byte of the stream, minus the method's"),
        Figure("gain_share", "of naive's", 2, "gain divided by naive's"),
        Figure("old", "Python, bits", 3, "bits per byte of held-out Python sources after the stream"),
        Figure("forgetting_share", "forgetting, of naive's", 2,
               "increase of these bits per byte over the frozen model's, divided by naive's"),
        Figure("forgetting", "of domains, bits", 3,
               "recurring: bits per byte of a domain's held-out text at the end, minus the lowest before; "
               "mean over the domains except the last"),
        Figure("bwt", "BWT, bits", 3,
               "recurring: bits per byte after a domain's last segment, minus those at the end; mean as above"),
        Figure("recovery", "recovery, bytes", 0,
               "recurring: bytes until a domain that comes back is within 5 % of its bits per byte when it ended"),
        Figure("time", "time", 2, "time per byte, divided by the frozen model's in the same run"),
        Figure("state", "bytes per weight", 1, "bytes kept in addition to the weights, per weight that may learn"),
    )  # fmt: skip

    def protocol(self) -> Record:
        fixed = {name: getattr(COMBINED, name) for name in ("layers", "window", "chunk", "clip")}
        fixed["target_modules"] = list(COMBINED.target_modules or ())
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
        return run(scenario, method, seed, options, tuning=tuning)

    def score(self, record: Record, others: Mapping[str, Record]) -> float:
        """The share of naive's gain minus that of its forgetting; for naive and frozen the gain alone.

        Where the method's ``score`` is "worst", naive has the rate that gains most on the same stream.
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
        """Draw shares as bars, trade-off curves, and bits per byte along the recurring stream, if there are runs."""
        return plots.draw(self, records, rows, title, prefix)


def shares(record: Record, others: Mapping[str, Record]) -> tuple[float | None, float | None]:
    """(share of naive's gain, share of naive's forgetting) of a run.

    A share is None if there is no run of naive or of frozen, or if naive did not gain or forget.

    Args:
        others: runs of the same stream, by method.
    """
    frozen, naive = others.get("frozen"), others.get("naive")
    if frozen is None or naive is None:
        return None, None
    return (
        metrics.share(frozen["new"] - record["new"], frozen["new"] - naive["new"]),
        metrics.share(record["old"] - frozen["old"], naive["old"] - frozen["old"]),
    )
