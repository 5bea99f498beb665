"""``python -m bench.kernels.plot``: draw the roofline and growth curves of the results as PNG files beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.kernels.check import RESULTS, kind_of, load
from bench.kernels.plot_sequence import lengths

Row = dict[str, Any]

app = typer.Typer(add_completion=False)

# Suites whose cases count bytes and flops, in the order of the roofline's legend.
FAMILIES = {"commit": "#d62728", "decode": "#1f77b4", "window_linear": "#2ca02c", "fisher": "#9467bd"}
DTYPES = {"float32": "#1f77b4", "bfloat16": "#d62728"}
PARTS = ("weight", "anchor", "importance", "trace", "replay memory", "window")


def gather(
    paths: list[Path], kind: str, suite: str | None = None
) -> tuple[dict[str, Any], dict[str, float], list[Row]] | None:
    """(machine, ceilings, rows) of the most recently measured machine of ``kind`` ("cpu" or "cuda"), or None.

    With ``suite``, only of files that have rows of it: the machine's date is then that of these rows.
    """
    found = [r for p in paths if (r := load(p)) is not None and r["machine"].get("kind", "cpu") == kind and r["rows"]]
    found = [r for r in found if suite is None or any(row["suite"] == suite for row in r["rows"])]
    if not found:
        return None
    found.sort(key=lambda r: r["machine"]["date"])
    latest = found[-1]
    same = [r for r in found if kind_of(r) == kind_of(latest)]
    rows = {(row["suite"], row["case"], row["dtype"], row["contender"]): row for r in same for row in r["rows"]}
    ceilings: dict[str, float] = {}
    for r in same:
        for name, rate in r["ceilings"].items():
            ceilings[name] = max(rate, ceilings.get(name, 0.0))
    return latest["machine"], ceilings, list(rows.values())


def title_of(machine: dict[str, Any], what: str) -> str:
    """The title of a picture: ``what`` it shows, and the machine."""
    name = machine["device"]
    if machine.get("kind", "cpu") == "cpu":
        name += f" ({machine['isa']}), {machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    return f"{what}\n{name}, torch {machine['torch']}, {machine['date']}"


# -- roofline -----------------------------------------------------------------------------------------------------


def roofline(machine: dict[str, Any], ceilings: dict[str, float], rows: list[Row], path: Path) -> bool:
    """Draw the rate of each case against its flops per byte, with the measured ceilings, in one panel for each dtype.

    Returns:
        False, without drawing, if there is nothing to draw.
    """
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r["suite"] in FAMILIES and r.get("flops") and r.get("bytes")]
    rows = [r for r in rows if r["contender"] in ("ttt", "plain torch") and not r.get("in_cache")]
    dtypes = [d for d in DTYPES if any(r["dtype"] == d for r in rows)]
    copy = ceilings.get("copy_gb_per_s")
    if not dtypes or copy is None:
        return False
    figure, axes = plt.subplots(
        1, len(dtypes), figsize=(6.4 * len(dtypes), 5.2), sharey=True, squeeze=False, constrained_layout=True
    )
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        shown = [r for r in rows if r["dtype"] == dtype]
        for (suite, colour), (contender, marker) in (
            (family, style) for family in FAMILIES.items() for style in (("ttt", "o"), ("plain torch", "x"))
        ):
            points = [r for r in shown if r["suite"] == suite and r["contender"] == contender]
            axis.plot(
                [r["flops"] / r["bytes"] for r in points],
                [1e3 * r["tflop_per_s"] for r in points],
                marker,
                color=colour,
                markersize=6 if marker == "o" else 5,
                alpha=0.8,
                label=f"{suite}, {contender}" if points else None,
            )
        intensity = [r["flops"] / r["bytes"] for r in shown]
        low, high = min(intensity) / 2, max(intensity) * 2
        matmul = ceilings.get(f"matmul_{dtype}_tflop_per_s")
        knee = high if matmul is None else 1e3 * matmul / copy
        axis.plot([low, min(knee, high)], [copy * low, copy * min(knee, high)], "k-", linewidth=1.2)
        middle = (low * min(knee, high)) ** 0.5
        where: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "fontsize": 9}
        axis.annotate(f"copy: {copy:.3g} GB/s", (middle, copy * middle), xytext=(-6, 2), **where)
        if matmul is not None:
            axis.plot([min(knee, high), high], [1e3 * matmul] * 2, "k-", linewidth=1.2)
            label = f"torch.mm, square: {matmul:.3g} TFLOP/s"
            axis.annotate(label, (high, 1e3 * matmul), xytext=(0, 5), **where)
        axis.margins(y=0.08)
        axis.set(xscale="log", yscale="log", xlabel="flops per byte that the formula must move", title=dtype)
        axis.grid(True, which="major", alpha=0.3)
        axis.legend(fontsize=8, loc="lower right")
    axes[0][0].set_ylabel("GFLOP/s")
    figure.suptitle(title_of(machine, "Roofline: a point for each case"))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


# -- growth -------------------------------------------------------------------------------------------------------


def growth(machine: dict[str, Any], rows: list[Row], path: Path) -> bool:
    """Draw the cost as a function of one parameter at a time, and the memory of a layer.

    Returns:
        False, without drawing, if there is no row of the suite ``growth``.
    """
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r["suite"] == "growth"]
    if not rows:
        return False
    figure, axes = plt.subplots(2, 3, figsize=(15, 9), constrained_layout=True)
    curves: list[tuple[str, str, str, Callable[[Row], Any], str]] = [
        ("d", "commit of 16 tokens, d x d", "d", lambda r: r["m"], "ttt"),
        ("T", "commit of T tokens", "T, tokens", lambda r: r["tokens"], "ttt"),
        ("replay rows", "commit of 16 tokens, R replay rows", "R, rows", lambda r: r["replay"], "ttt"),
        ("window", "decoding with a window of C tokens", "C, tokens", lambda r: r["window"], "ttt"),
        (
            "adapted layers",
            "reading in chunks of 64",
            "adapted layers (of 12)",
            lambda r: int(r["adapted"].split()[1]),
            "observe",
        ),
    ]
    for axis, (curve, title, label, at, ours) in zip(axes.flat, curves, strict=False):
        shown = [r for r in rows if r.get("curve") == curve]
        _curve(axis, shown, at, ours)
        size = {r["m"] for r in shown if "m" in r}
        if curve != "d" and len(size) == 1:
            title += f", {size.pop()} square"
        elif curve == "adapted layers" and shown:
            title += f", {shown[0]['model']}"
        axis.set(title=title, xlabel=label, ylabel="us per token" if curve == "adapted layers" else "us")
    _memory(axes.flat[-1], [r for r in rows if r.get("curve") == "d" and r["contender"] == "ttt"])
    figure.suptitle(title_of(machine, "What the cost grows with"))
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return True


def _curve(axis, rows: list[Row], at: Callable[[Row], Any], ours: str) -> None:
    values = sorted({at(r) for r in rows})
    places: dict[Any, Any] = {v: v for v in values}
    few = values and values[0] > 0 and values[-1] < 16
    if values and values[0] == 0:  # 0, 1, 2, 4, ...: evenly spaced, as a logarithmic axis cannot show 0
        places = {v: i for i, v in enumerate(values)}
    for dtype, colour in DTYPES.items():
        for contender in dict.fromkeys(r["contender"] for r in rows):
            points = sorted((places[at(r)], r["us"], r["us_q1"], r["us_q3"]) for r in rows if _is(r, dtype, contender))
            if not points:
                continue
            x, y, low, high = zip(*points, strict=True)
            label = f"{contender if contender != ours else 'ttt'}, {dtype}"
            axis.plot(x, y, "o-" if contender == ours else "s--", color=colour, markersize=4, label=label)
            axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    if few:
        axis.set_ylim(bottom=0)
    else:
        axis.set(xscale="log" if places == {v: v for v in values} else "linear", yscale="log")
    if values:
        axis.set_xticks(list(places.values()), [str(v) for v in values])
        axis.minorticks_off()
        _plain_ticks(axis)
        axis.legend(fontsize=8)
    axis.grid(True, alpha=0.3)


def _plain_ticks(axis) -> None:
    """Label a logarithmic axis with 1, 2, 5, 10, ... in plain digits."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    if axis.get_yscale() == "log":
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def _is(row: Row, dtype: str, contender: str) -> bool:
    return row["dtype"] == dtype and row["contender"] == contender


def _memory(axis, rows: list[Row]) -> None:
    """Stacked bars: bytes per weight of each part of a layer, with the layer's total above."""
    colours = ("#444444", "#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b")
    rows = sorted(rows, key=lambda r: (list(DTYPES).index(r["dtype"]), r["m"]))
    labels = []
    for i, row in enumerate(rows):
        bottom, weights = 0.0, row["m"] * row["n"]
        for part, colour in zip(PARTS, colours, strict=True):
            height = row["memory_bytes"][part] / weights
            axis.bar(i, height, 0.75, bottom, color=colour, label=part if i == 0 else None)
            bottom += height
        total = sum(row["memory_bytes"].values()) / 2**20
        axis.annotate(f"{total:.3g}", (i, bottom), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=8)
        labels.append(f"{row['m']}\n{'fp32' if row['dtype'] == 'float32' else 'bf16'}")
    axis.set_xticks(range(len(rows)), labels, fontsize=8)
    axis.set(title="memory of a layer (above: MiB)", xlabel="d and dtype", ylabel="bytes per weight")
    axis.margins(y=0.08)
    if rows:
        axis.legend(fontsize=8)


@app.command()
def main(
    results: Annotated[Path, typer.Option(exists=True, help="Folder of JSON files of bench.kernels.run.")] = RESULTS,
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures (default: the same).")] = None,
) -> None:
    """Draw roofline_KIND.png, growth_KIND.png and sequence_KIND.png for each kind of device that has results."""
    import matplotlib

    matplotlib.use("Agg")
    folder = out or results
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(results.glob("*.json"))
    # These are measured on one thread, the others on all: they are not results of one kind of machine.
    sequence = [file for file in files if file.stem.endswith("_sequence")]
    apart = [file for file in files if "_sequence" in file.stem or file.stem.endswith(("_language", "_decode_bound"))]
    for kind in ("cpu", "cuda"):
        found = gather([file for file in files if file not in apart], kind)
        if found is None:
            print(f"no results on {kind} in {results}")
            continue
        machine, ceilings, rows = found
        path = folder / f"roofline_{kind}.png"
        drawn = {path.name: roofline(machine, ceilings, rows, path)}
        path = folder / f"growth_{kind}.png"
        grown = gather(files, kind, "growth")
        drawn[path.name] = grown is not None and growth(grown[0], grown[2], path)
        if (found := gather(sequence, kind)) is not None:
            machine, _, rows = found
            path = folder / f"sequence_{kind}.png"
            drawn[path.name] = lengths(title_of(machine, "What a text costs by its length"), rows, path)
        for name, done in drawn.items():
            print(f"{folder / name} drawn" if done else f"{name}: no rows for it in {results}")


if __name__ == "__main__":
    app()
