"""``python -m bench.learning.overview``: the README's picture of SmolLM2, from the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.learning.facts.methods import TALKING
from bench.learning.facts.run import SCENARIOS
from bench.learning.language import texts
from bench.learning.language.best import best
from bench.learning.language.methods import DEFAULT
from bench.learning.metrics import interval

RESULTS = Path(__file__).parent / "results"
OURS, OTHER, REFERENCE = "#1f77b4", "#9c9c9c", "#d0d0d0"
TOLD = {"frozen": ("frozen", REFERENCE), "LoRA": ("LoRA fine-tuning", OTHER), "retrieval": ("retrieval", OTHER),
        "in context": ("whole chat in context", OTHER), "its fact in context": ("right sentence in context", REFERENCE),
        TALKING: ("ttt, at once", OURS), "study": ("ttt, after a study", OURS)}  # fmt: skip
READ = {"LoRA": ("LoRA", OTHER), "Adam": ("Adam", OTHER), DEFAULT: ("ttt", OURS)}


def answered(found: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Of each method in `TOLD`, the share of questions that are answered rightly after ten facts were told.

    Beside it stands half the width of its 95 % interval over people.
    """
    first = next(iter(SCENARIOS))
    rows = {row["method"]: tuple(row["right"]) for row in found["rows"] if row["scenario"] == first}
    return {method: rows[method] for method in TOLD}


def read(found: dict[str, Any], figure: str) -> dict[str, tuple[float, float]]:
    """Of each method in `READ`, the mean of ``figure`` over the texts that are unlike the general text.

    Beside it stands half the width of its 95 % interval over texts.
    """
    rows = best(found["rows"])
    chosen = [text for text in texts.REPORTED if text != texts.AS_GENERAL]
    return {group: interval([rows[text, group][figure][0] for text in chosen]) for group in READ}


def main() -> None:
    """Draw what is remembered of what was told, what is gained on texts that are read, and what that disturbs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    told, streams = (json.loads((RESULTS / f"benchmark_{name}.json").read_text()) for name in ("facts", "streams"))
    right = answered(told)
    panels = (
        ("Told ten facts once, asked in a new chat", "right answers (chance: 0.1)", "%.2f", TOLD, right),
        ("Reads texts of six other kinds", "gain over frozen, nats per token", "%.3f", READ, read(streams, "gain")),
        ("Other text stays as it was", "KL from frozen, nats per token", "%.3f", READ, read(streams, "kl")),
    )
    figure, all_axes = pyplot.subplots(1, 3, figsize=(12, 3.2), width_ratios=(4, 3, 3))
    for axes, (title, what, digits, shown, values) in zip(all_axes, panels, strict=True):
        names, colours = zip(*shown.values(), strict=True)
        means, widths = zip(*(values[method] for method in shown), strict=True)
        axes.barh(
            names, means, color=colours, xerr=widths, error_kw={"ecolor": "#555555", "elinewidth": 1, "capsize": 2}
        )
        end = 1.25 * max(mean + width for mean, width in values.values())
        for at, (mean, width) in enumerate(zip(means, widths, strict=True)):
            axes.text(mean + width + 0.02 * end, at, digits % mean, va="center")
        axes.set(xlabel=what, xlim=(0, end))
        if values is right:  # shares; the room beyond 1 is for the numbers
            axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
        axes.set_title(title, fontsize=11)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(w_pad=3)
    figure.savefig(RESULTS / "overview.png", dpi=110)
    print(f"{RESULTS / 'overview.png'} written")


if __name__ == "__main__":
    main()
