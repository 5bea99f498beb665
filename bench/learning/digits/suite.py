"""The suite "digits": a small multilayer perceptron learns scikit-learn's digits task by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from bench.learning import metrics, report
from bench.learning.digits.methods import METHODS, fits, method
from bench.learning.digits.run import BATCH, EPOCHS, HIDDEN, run
from bench.learning.digits.tasks import SCENARIOS
from bench.learning.suite import SEEDS, Figure, Record

# Methods drawn as curves: one of each kind, so that the plot stays readable.
CURVES = ("joint", "naive", "EWC online", "SI", "LwF", "ER 200", "DER++ 200", "generative", "layer replay", "PNN")


class DigitsSuite:
    """The suite "digits"; for its scenarios see `bench.learning.digits.tasks`, for its methods `.digits.methods`."""

    name = "digits"
    scenarios: Sequence[str] = SCENARIOS
    methods: Sequence[str] = tuple(METHODS)
    figures: Sequence[Figure] = (
        Figure("acc", "ACC", meaning="mean accuracy on all tasks after the last task"),
        # A difference between runs of the same seed, so that the interval is that of the difference.
        Figure("over_naive", "over naive (own rate)", meaning="ACC minus that of plain SGD at its own best rate"),
        Figure("bwt", "BWT", meaning="backward transfer: change of the accuracy on a task by later tasks"),
        Figure("fwt", "FWT", meaning="forward transfer: accuracy before a task is learnt, minus the untrained model's"),
        Figure("forgetting", "forgetting", meaning="best earlier accuracy on a task minus the last, mean over tasks"),
        Figure("intransigence", "intransigence", meaning="accuracy of joint training on the newest task, minus ours"),
        Figure("us_per_sample", "CPU us/sample", 0, "processor time of learning, per sample"),
        Figure("state_kib", "state, KiB", 0, "kept in addition to the weights"),
    )
    references: Sequence[str] = ()

    def protocol(self) -> Record:
        return {"hidden": HIDDEN, "epochs": EPOCHS, "batch": BATCH}

    def fits(self, method: str, scenario: str) -> bool:
        return fits(method, scenario)

    def family(self, name: str) -> str:
        return method(name).family

    def grid(self, name: str) -> Mapping[str, Sequence[Any]]:
        return method(name).grid

    def run(self, scenario: str, method: str, seed: int, options: Record, *, tuning: bool) -> Record:
        return run(scenario, method, seed, options, tuning=tuning)

    def seeds(self, name: str) -> Sequence[int]:
        return SEEDS

    def combine(self, name: str, scores: Sequence[float]) -> float:
        return fmean(scores)

    def tuned_on(self, scenario: str) -> str:
        return scenario

    def sweep(self, method: str, scenario: str) -> None:
        return None

    def facts(self) -> Record:
        return {}

    def score(self, record: Record, others: Mapping[str, Record]) -> float:
        matrix = record["matrix"]
        if method(record["method"]).score == "learning":
            return sum(row[i] for i, row in enumerate(matrix)) / len(matrix)
        return metrics.average_accuracy(matrix)

    def measure(self, record: Record, others: Mapping[str, Record]) -> dict[str, float | None]:
        matrix = record["matrix"]
        joint, naive = others.get("joint"), others.get("naive (own rate)")
        acc = metrics.average_accuracy(matrix)
        return {
            "acc": acc,
            "over_naive": None if naive is None else acc - metrics.average_accuracy(naive["matrix"]),
            "bwt": metrics.backward_transfer(matrix),
            "fwt": metrics.forward_transfer(matrix, record["untrained"]),
            "forgetting": metrics.forgetting(matrix),
            "intransigence": None if joint is None else metrics.intransigence(
                matrix, [row[j] for j, row in enumerate(joint["matrix"])]
            ),
            "us_per_sample": 1e6 * record["seconds"] / record["samples"],
            "state_kib": record["state_bytes"] / 1024,
        }  # fmt: skip

    def plot(self, records: Sequence[Record], rows: Sequence[Record], title: str, prefix: str) -> list[str]:
        """Draw ACC of every method as bars, and for `CURVES` the mean accuracy on the tasks learnt so far."""
        paths = [f"{prefix}_acc.png", f"{prefix}_curves.png"]
        report.bars(self, rows, "acc", "ACC", title, paths[0])
        self._curves(records, title, paths[1])
        return paths

    def _curves(self, records: Sequence[Record], title: str, path: str) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        scenarios = [s for s in self.scenarios if any(r["scenario"] == s for r in records)]
        size = (4.2 * len(scenarios), 4.4)
        drawing, axes = plt.subplots(1, len(scenarios), figsize=size, squeeze=False, layout="constrained")
        for ax, scenario in zip(axes[0], scenarios, strict=True):
            for number, name in enumerate(CURVES):
                mine = [r for r in records if r["scenario"] == scenario and r["method"] == name]
                if not mine:
                    continue
                curves = [[sum(row[: i + 1]) / (i + 1) for i, row in enumerate(r["matrix"])] for r in mine]
                tasks = range(1, len(curves[0]) + 1)
                found = [metrics.interval(points) for points in zip(*curves, strict=True)]
                middle = [m for m, _ in found]
                ax.plot(tasks, middle, label=name, color=f"C{number}", marker=".")
                if len(mine) > 1:
                    low, high = [m - w for m, w in found], [m + w for m, w in found]
                    ax.fill_between(tasks, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
            ax.set_title(scenario, fontsize=10)
            ax.set_xlabel("tasks learnt", fontsize=8)
            ax.set_ylabel("mean accuracy on them", fontsize=8)
            ax.set_ylim(0, 1.02)
            ax.grid(alpha=0.3)
        # A method may be missing from a panel: the legend is gathered from all of them.
        lines = {label: line for ax in axes[0] for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        drawing.legend(lines.values(), lines.keys(), fontsize=8, loc="outside right center")
        drawing.suptitle(title, fontsize=9)
        drawing.savefig(path, dpi=110)
        plt.close(drawing)
