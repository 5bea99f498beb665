"""The plots of the suite "text": shares of naive's gain and forgetting, trade-off curves, the recurring stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.learning.report import COLOURS
from bench.learning.suite import Record, Suite, swept
from bench.learning.text.streams import SWEPT

GAIN, FORGETTING = 0.97, 0.20  # the target, drawn as dotted lines: shares of naive's gain and forgetting
RECURRING = (
    "frozen",
    "naive",
    "combined",
    "soft projection",
    "growing columns",
    "generative replay",
    "kNN-LM",
)  # in the last plot
SMOOTHED = 4  # pieces of CONTEXT bytes


def draw(suite: Suite, records: Sequence[Record], rows: Sequence[Record], title: str, prefix: str) -> list[str]:
    """Draw the plots for which there are runs, into files that begin with ``prefix``; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    paths = []
    for name, drawn in (
        ("shares", _shares(suite, rows, title)),
        ("tradeoff", _tradeoff(suite, records, title)),
        ("recurring", _recurring(records, title)),
    ):
        if drawn is not None:
            paths.append(f"{prefix}_{name}.png")
            drawn.savefig(paths[-1], dpi=110)
            _close(drawn)
    return paths


def _close(figure: Any) -> None:
    import matplotlib.pyplot as plt

    plt.close(figure)


# -- bars -----------------------------------------------------------------------------------------------------------


def _shares(suite: Suite, rows: Sequence[Mapping[str, Any]], title: str) -> Any:
    """Bars: the mean over the scenarios of a single domain; marks: each scenario."""
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r["gain_share"] is not None and r["forgetting_share"] is not None]
    single = [r for r in rows if r["scenario"].startswith("adapt-")]
    names = [m for m in suite.methods if m != "frozen" and any(r["method"] == m for r in single)][::-1]
    if not names:
        return None
    scenarios = [s for s in suite.scenarios if any(r["scenario"] == s for r in rows)]
    marks = dict(zip(scenarios, "osD^vP*", strict=False))
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.3 * len(names) + 1.7), sharey=True, layout="constrained")
    for ax, key, goal in ((axes[0], "gain_share", GAIN), (axes[1], "forgetting_share", FORGETTING)):
        for place, name in enumerate(names):
            values = [r[key][0] for r in single if r["method"] == name]
            ax.barh(place, sum(values) / len(values), 0.7, color=COLOURS[suite.family(name)], alpha=0.75)
            for row in rows:
                if row["method"] == name:
                    ax.plot(row[key][0], place, marks[row["scenario"]], color="black", markersize=3.5, alpha=0.7)
        ax.axvline(goal, color="black", linestyle=":", linewidth=1)
        ax.set_yticks(range(len(names)), names, fontsize=8)
        ax.tick_params(axis="x", labelsize=8)
        ax.grid(axis="x", alpha=0.3)
        ax.set_axisbelow(True)
    axes[0].set_xlabel(f"share of naive's gain on new text (dotted: {GAIN:.0%})", fontsize=9)
    axes[1].set_xlabel(f"share of naive's forgetting of Python (dotted: {FORGETTING:.0%})", fontsize=9)
    lines = [plt.Line2D([], [], color="black", marker=m, linestyle="", markersize=4) for m in marks.values()]
    bars = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[f], alpha=0.75) for f in _families(suite, names)]
    labels = [*_families(suite, names), *marks]
    figure.legend([*bars, *lines], labels, fontsize=8, loc="outside right center")
    figure.suptitle(f"{title}\nbars: mean over the scenarios of a single domain", fontsize=9)
    return figure


def _families(suite: Suite, names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(suite.family(name) for name in names[::-1]))


# -- trade-off ------------------------------------------------------------------------------------------------------


def tradeoff(suite: Suite, records: Sequence[Record], name: str) -> list[tuple[float, float, float, bool]]:
    """The points of a method's trade-off curve: (strength, forgetting share, gain share, tuned), by strength.

    Shares are means over the scenarios of its sweep, for seed 0. Points that are missing in one scenario are left out.
    """
    others: dict[str, dict[str, Record]] = {}
    for r in records:
        if r["seed"] == 0 and not swept(r) and r["scenario"].startswith("adapt-"):
            others.setdefault(r["scenario"], {})[r["method"]] = r
    points: dict[tuple[float, bool], list[tuple[float, float]]] = {}
    for r in records:
        sweep = suite.sweep(r["method"], r["scenario"])
        if r["method"] != name or r["seed"] != 0 or sweep is None:
            continue
        figures = suite.measure(r, others.get(r["scenario"], {}))
        gain, forgetting = figures["gain_share"], figures["forgetting_share"]
        if gain is not None and forgetting is not None:
            points.setdefault((r["options"][sweep[0]], not swept(r)), []).append((forgetting, gain))
    most = max((len(p) for p in points.values()), default=0)
    found = []
    for (strength, tuned), each in points.items():
        if len(each) == most:
            x, y = (sum(values) / most for values in zip(*each, strict=True))
            found.append((strength, x, y, tuned))
    return sorted(found)


def _tradeoff(suite: Suite, records: Sequence[Record], title: str) -> Any:
    """One panel for each family of methods, each with naive's curve."""
    import matplotlib.pyplot as plt

    if not any(swept(r) for r in records):
        return None
    curves = {m: points for m in suite.methods if len(points := tradeoff(suite, records, m)) > 1}
    naive = curves.pop("naive", [])
    families = _families(suite, list(curves)[::-1])
    if not families:
        return None
    columns = min(3, len(families))
    lines = -(-len(families) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.4 * columns, 5 * lines), squeeze=False, sharey=True, layout="constrained"
    )
    for ax in axes.flat[len(families) :]:
        ax.set_visible(False)
    for ax, family in zip(axes.flat, families, strict=False):
        mine = {m: points for m, points in curves.items() if suite.family(m) == family}
        for number, (name, points) in enumerate([("naive", naive), *mine.items()]):
            colour = "#7f7f7f" if name == "naive" else f"C{number - 1}"
            option = (suite.sweep(name, SWEPT[0]) or ("",))[0]
            x, y = [p[1] for p in points], [p[2] for p in points]
            ax.plot(x, y, "-o", color=colour, markersize=3.5, linewidth=1.4, label=f"{name}: {option}")
            chosen = [p for p in points if p[3]]
            ax.plot([p[1] for p in chosen], [p[2] for p in chosen], "*", color=colour, markersize=13, mec="black")
        ax.axhline(GAIN, color="black", linestyle=":", linewidth=1)
        ax.axvline(FORGETTING, color="black", linestyle=":", linewidth=1)
        ax.set_title(family, fontsize=10)
        ax.set_xlabel("share of naive's forgetting", fontsize=9)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)
        ax.set(xlim=(-0.1, 1.1), ylim=(-0.1, 1.8))
    for ax in axes[:, 0]:
        ax.set_ylabel("share of naive's gain", fontsize=9)
    dotted = f"dotted: {GAIN:.0%} of the gain, {FORGETTING:.0%} of the forgetting"
    note = f"mean over {len(SWEPT)} scenarios, seed 0; star: tuned; {dotted}; up and left is better"
    figure.suptitle(f"{title}\n{note}", fontsize=9)
    return figure


# -- the recurring stream -------------------------------------------------------------------------------------------


def _recurring(records: Sequence[Record], title: str) -> Any:
    """Bits per byte along the recurring stream of seed 0, smoothed within each segment."""
    import matplotlib.pyplot as plt

    mine = {r["method"]: r for r in records if r["scenario"] == "recurring" and r["seed"] == 0 and not swept(r)}
    shown = [name for name in RECURRING if name in mine]
    if not shown:
        return None
    segments = mine[shown[0]]["segments"]
    domains = list(dict.fromkeys(segments))
    figure, ax = plt.subplots(figsize=(12, 4.6), layout="constrained")
    for number, name in enumerate(shown):
        curve = mine[name]["curve"]
        pieces = len(curve) // len(segments)
        for i in range(len(segments)):
            part = curve[i * pieces : (i + 1) * pieces]
            y = [sum(part[max(0, j + 1 - SMOOTHED) : j + 1]) / min(SMOOTHED, j + 1) for j in range(pieces)]
            x = [(i * pieces + j + 1) / 2 for j in range(pieces)]
            colour = "#7f7f7f" if name == "frozen" else f"C{number - 1}"
            ax.plot(x, y, color=colour, linewidth=1.5, label=name if i == 0 else None)
    high = ax.get_ylim()[1]
    for i, domain in enumerate(segments):
        shade = ("#ffffff", "#e8e8e8", "#d6e4f0", "#f3e6d8", "#e2f0d9")[domains.index(domain)]
        ax.axvspan(i * pieces / 2, (i + 1) * pieces / 2, color=shade, zorder=0)
        ax.text((i + 0.5) * pieces / 2, high, domain, ha="center", va="bottom", fontsize=9)
    ax.set_xlim(0, len(segments) * pieces / 2)
    ax.set_xlabel("KiB read", fontsize=9)
    ax.set_ylabel("bits per byte, mean of the latest 2 KiB of the segment", fontsize=9)
    ax.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right center")
    figure.suptitle(title, fontsize=9)
    return figure
