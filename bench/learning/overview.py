"""``python -m bench.learning.overview``: the README's picture, from the committed figures of the demo."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
DOMAIN, LATEST = "headers", 4  # text shown; points that a curve averages
SHOWN = {"frozen": ("frozen", "#7f7f7f"), "SGD": ("plain SGD", "#d62728"), "default": ("ttt, default", "#1f77b4"),
         "columns": ("ttt, growing columns", "#2ca02c")}  # fmt: skip


def main() -> None:
    """Draw bits per byte while the model reads new text, and the bits that it loses on text that it knew."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = json.loads((RESULTS / "demo.json").read_text())
    one = found["domains"][DOMAIN]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 3.4), width_ratios=(3, 2))
    before = next(row["old_bpb"] for row in one["rows"] if row["method"] == "frozen")
    for method, (label, colour) in SHOWN.items():
        curve = one["curves"][method]
        mean = [sum(curve[i - LATEST : i]) / LATEST for i in range(LATEST, len(curve) + 1)]
        step = one["bytes"] / len(curve) / 1024
        left.plot([step * i for i in range(LATEST, len(curve) + 1)], mean, label=label, color=colour)
    left.set(title="Learns: C++ headers, each byte scored before it is learnt", xlabel="KiB read",
             ylabel="bits per byte, mean of the latest 2 KiB")  # fmt: skip
    left.set_ylim(top=3.35)
    left.legend(fontsize=8, ncol=2, loc="upper right", frameon=False)
    lost = {row["method"]: row["old_bpb"] - before for row in one["rows"] if row["method"] in SHOWN}
    names = [m for m in SHOWN if m != "frozen"]
    bars = right.barh([SHOWN[m][0] for m in names], [lost[m] for m in names], color=[SHOWN[m][1] for m in names])
    right.bar_label(bars, fmt="%.3f", padding=3)
    right.set(title="Keeps: Python, which it knew before", xlabel="bits per byte lost afterwards")
    right.set_xlim(0, 1.25 * max(lost.values()))
    right.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    figure.tight_layout()
    figure.savefig(RESULTS / "overview.png", dpi=110)
    print(f"{RESULTS / 'overview.png'} written")


if __name__ == "__main__":
    main()
