"""``python -m bench.targets``: what the kernels aim at, and how near they come, from the committed results.

Writes ``bench/results/cpu_targets.md``: a line for every target and dtype, with the figures that miss it, and what
stands in their way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.check import RESULTS, load

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Target:
    """A bound on a figure of some rows.

    Attributes:
        title: what is bounded, and by how much.
        takes: whether a row is meant.
        figure: the row's figure, in the unit of ``limit``.
        limit: the bound.
        at_least: whether the figure is to be above it, not below.
        case: how a row is called in the table.
        obstacle: dtype, or "8bit", -> what stands in the way where the bound is missed.
        beside: what is shown behind a figure that misses the bound.
    """

    title: str
    takes: Callable[[Row], bool]
    figure: Callable[[Row], float]
    limit: float
    at_least: bool
    case: Callable[[Row], str]
    obstacle: dict[str, str]
    beside: Callable[[Row], str] = lambda row: ""

    def reached(self, row: Row) -> bool:
        """Whether ``row`` keeps the bound."""
        value = self.figure(row)
        return value >= self.limit if self.at_least else value <= self.limit


def _of(suite: str, **wanted: Any) -> Callable[[Row], bool]:
    return lambda r: r["suite"] == suite and r["ours"] and all(r.get(k) == v for k, v in wanted.items())


def _commit(few: bool) -> Callable[[Row], bool]:
    return lambda r: r["suite"] == "commit" and r["ours"] and (r["tokens"] <= 16) == few


def _name(row: Row) -> str:
    """The case without what stands beside it in the line."""
    return row["case"].replace(", 8bit state", "")


def _of_read(row: Row) -> str:
    """The figure against a stream that only reads, where that was measured."""
    ratio = row.get("ratio_to_read_bound")
    return "" if ratio is None else f" ({ratio:.2f} x at the rate of a pure read)"


TARGETS = (
    Target(
        "commit, T <= 16: at least 70 % of copy bandwidth on the bytes that the formula moves",
        _commit(few=True), lambda r: r["percent_of_copy"], 70.0, True, _name,
        {
            "float32": "the copy that a case is held against is timed beside it, and moved between 33 and 54 GB/s (AMD "
            "EPYC, shared): at the higher rate arithmetic shows",
            "bfloat16": "arithmetic: half the bytes, but the same work a weight, and rounding besides; "
            "replay adds a pass over W and W* and two products of R rows. T = 16, R = 4 takes as long with all of it "
            "in a core's own cache as a copy of the bytes does (AMD EPYC, Zen 4)",
            "8bit": "arithmetic: decoding, block maxima and encoding with stochastic rounding take as long with all of "
            "it in a core's own cache as a copy of the bytes does (AMD EPYC, Zen 4)",
        },
    ),
    Target(
        "commit, T >= 64: G and S at 60 % or more of the rate of torch's matmul of that shape and dtype",
        _commit(few=False), lambda r: r["percent_of_matmul"], 60.0, True, _name,
        {
            "float32": "at T = 64 the bytes of W, W*, Omega and F take about as long as the products, and the two "
            "overlap in part only: these rows reach 53 to 61 % of copy bandwidth at the same time",
            "bfloat16": "as for float32: at T = 64 and R = 4 the bytes and the drift of the replay rows weigh most",
        },
    ),
    Target(
        "decode at 4096x4096, commit amortised: at most 1.10 x the traffic bound of its own state",
        _of("decode", m=4096), lambda r: r["ratio_to_bound"], 1.10, False, _name,
        {
            "float32": "little in the window of 128; k = 16 is with its part in 16 directions taken out of each input",
            "bfloat16": "the commit's arithmetic, as above; it weighs less in larger windows",
            "8bit": "the commit's encoding, as above; it weighs less in larger windows",
        },
        _of_read,
    ),
    Target(
        "decode, layers of 512 and less: at most 15 us a token above nn.Linear",
        lambda r: _of("decode")(r) and r["m"] <= 512, lambda r: r["us_above_baseline"], 15.0, False, _name,
        {"float32": "the commit: 291 us for 16 tokens of a 512x512 layer (cpu_growth.json), 18 us a token"},
    ),
    Target(
        "observe, down_proj of the last quarter: at most 1.5 x a no-grad forward of the same tokens",
        _of("observe", adapted="down_proj, last quarter"), lambda r: r["ratio"], 1.5, False, _name,
        {"float32": "torch's backward pass through the head and top blocks; of the demo model they are two of five"},
    ),
    Target(
        "generate, learning every 16 tokens: at least 0.85 of plain generation's speed",
        _of("generate"), lambda r: 1 / r["ratio"], 0.85, True, _name,
        {"float32": "the top blocks run again with gradients; of the demo model they are two of five"},
    ),
    Target(
        "per-token Fisher, 1024x1024, T = 64: under 1.74 x forward and backward",
        _of("fisher"), lambda r: r["ratio"], 1.74, False, _name, {},
    ),
)  # fmt: skip


def kind(row: Row) -> str:
    """The dtype, or the form of its state where that is another."""
    return "8bit" if row.get("state") == "8bit" else row["dtype"]


def lines(rows: list[Row]) -> list[str]:
    """The table's lines, in Markdown."""
    out = ["| target | weights | reached | missed | what is in the way |", "|---|---|---|---|---|"]
    for target in TARGETS:
        mine = [row for row in rows if target.takes(row)]
        for name in dict.fromkeys(map(kind, mine)):
            met = [row for row in mine if kind(row) == name and target.reached(row)]
            missed = [row for row in mine if kind(row) == name and not target.reached(row)]
            digits = 1 if target.limit >= 10 else 2
            shown = [f"{target.case(row)}: {target.figure(row):.{digits}f}{target.beside(row)}" for row in missed]
            why = target.obstacle.get(name, "") if missed else ""
            count = f"{len(met)} of {len(met) + len(missed)}"
            out.append(f"| {target.title} | {name} | {count} | {'; '.join(shown)} | {why} |")
    return out


def render(results: list[dict[str, Any]]) -> str:
    """The whole page."""
    about = results[0]["machine"]
    head = (
        f"{about['device']}, {about['isa']}, {about['threads']} threads, torch {about['torch']}, {about['date']}; "
        "medians of interleaved rounds. Written by `python -m bench.targets`."
    )
    rows = [row for found in results for row in found["rows"]]
    return "\n".join(["# CPU kernels: targets", "", head, "", *lines(rows)]) + "\n"


def main(folder: Path = RESULTS) -> None:
    """Read the results of `make bench` and write the page beside them."""
    results = [found for name in ("commit", "layers") if (found := load(folder / f"cpu_{name}.json")) is not None]
    if not results:
        raise SystemExit(f"{folder} holds no cpu_commit.json or cpu_layers.json; run `make bench` first")
    (folder / "cpu_targets.md").write_text(render(results))


if __name__ == "__main__":
    main()
