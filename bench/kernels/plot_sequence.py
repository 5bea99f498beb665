"""The picture of what reading a text costs by its length, for `bench.kernels.plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLOURS = {"ttt": "#d62728", "gated delta rule": "#1f77b4", "attention": "#7f7f7f"}
SHOWN = {"ttt": "TTT-Linear", "gated delta rule": "gated delta rule", "attention": "attention (torch)"}


def lengths(title: str, rows: list[Row], path: Path) -> bool:
    """Draw the time for each token of a text against the text's length, and the state against it.

    Args:
        title: of the picture.

    Returns:
        False, without drawing, if there is no such row of the suite ``sequence``.
    """
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r["suite"] == "sequence" and r["case"].startswith("prefill")]
    if not rows:
        return False
    figure, (times, states) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for name, colour in COLOURS.items():
        points = sorted((r["tokens"], r["us"] / r["tokens"]) for r in rows if r["contender"] == name)
        times.plot(*zip(*points, strict=True), "o-", color=colour, label=SHOWN[name])
    tokens = sorted({r["tokens"] for r in rows})
    heads, width = rows[0]["heads"], rows[0]["width"]
    # Keys and values; a state; present and first weights and biases of a mini-batch. All in float32.
    kinds = {
        "attention": [2 * 4 * heads * width * t for t in tokens],
        "gated delta rule": [4 * heads * width**2] * len(tokens),
        "ttt": [2 * 4 * heads * width * (width + 1)] * len(tokens),
    }
    for name, sizes in kinds.items():
        states.plot(tokens, [s / 2**20 for s in sizes], "o-", color=COLOURS[name], label=SHOWN[name])
    times.set(xscale="log", yscale="log", xlabel="tokens of the text", ylabel="us a token", title="reading a text")
    states.set(xscale="log", yscale="log", xlabel="tokens of the text", ylabel="MiB", title="what a layer keeps of it")
    for axis in (times, states):
        axis.set_xticks(tokens, [str(t) for t in tokens])
        axis.minorticks_off()
        axis.grid(True, alpha=0.3)
        axis.legend(fontsize=9)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
