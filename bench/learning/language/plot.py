"""The plot of the suite "streams": what each method gains on each text, against what it changes elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.learning.language import texts
from bench.learning.language.best import best
from bench.learning.language.hard import HARD

COLOURS = {"default": "#1f77b4", "Adam": "#d62728", "LoRA": "#9467bd", "SGD": "#ff7f0e", "hard projection": "#2ca02c"}
MARKS = "osD^vP*"
LEAST = 1e-6  # nats; the axis is logarithmic and has no place for what is not positive


def draw(rows: Sequence[Mapping[str, Any]], title: str, prefix: str) -> list[str]:
    """Draw one point for each group of methods, at its best rate, and each text; returns the path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = {key: row for key, row in best(rows).items() if key[1] in COLOURS}
    panels = [(name, shown) for name, every in (("texts", texts.REPORTED), ("hard texts", tuple(HARD)))
              if (shown := [s for s in every if any(key[0] == s for key in found)])]  # fmt: skip
    if not panels:
        return []
    figure, axes = plt.subplots(1, len(panels), figsize=(6.2 * len(panels), 5.2), squeeze=False, layout="constrained")
    for ax, (name, shown) in zip(axes[0], panels, strict=True):
        for scenario, mark in zip(shown, MARKS, strict=False):
            for group, colour in COLOURS.items():
                if (row := found.get((scenario, group))) is not None:
                    gain, up, kl, across = (row[name][0] for name in ("gain", "gain_width", "kl", "kl_width"))
                    kl = max(kl, LEAST)
                    across = min(across, 0.95 * kl)
                    ax.errorbar(kl, gain, up, across, marker=mark, color=colour, elinewidth=0.8, alpha=0.85)
        ax.set_xscale("log")
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_title(f"{name}: up and left is better", fontsize=10)
        ax.set_xlabel("KL(frozen || learnt) on general text, nats per token", fontsize=9)
        ax.set_ylabel("gain on the text, nats per token", fontsize=9)
        ax.grid(alpha=0.3)
        marks = [plt.Line2D([], [], color="black", marker=m, linestyle="") for m in MARKS[: len(shown)]]
        ax.legend(marks, shown, fontsize=8, loc="best")
    groups = [g for g in COLOURS if any(key[1] == g for key in found)]
    points = [plt.Line2D([], [], color=COLOURS[g], marker="o", linestyle="") for g in groups]
    figure.legend(points, groups, fontsize=9, loc="outside lower center", ncol=len(groups))
    figure.suptitle(f"{title}; bars: 95 % intervals", fontsize=9)
    path = f"{prefix}_tradeoff.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return [path]
