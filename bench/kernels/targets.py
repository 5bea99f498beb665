"""``python -m bench.kernels.targets``: what the kernels aim at, and how near they come, from the committed results.

Writes ``bench/kernels/results/cpu_targets.md``: a line for every target and dtype, with the figures that miss it, and
what stands in their way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.kernels.check import RESULTS, load

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


def _beside_decode(row: Row) -> str:
    """The figure against a stream that only reads, and what the products alone would add to the bound."""
    ratio, rate = row.get("ratio_to_read_bound"), row.get("matmul_tflop_per_s")
    shown = [] if ratio is None else [f"{ratio:.2f} x at the rate of a pure read"]
    if rate:
        # Of each token 2 m n flops for G, as many for S.
        products_us = 4 * row["m"] * row["n"] / rate * 1e-6
        shown.append(f"G and S at the rate of torch's matmul: {products_us * row['ratio_to_bound'] / row['us']:.2f} x")
    return f" ({'; '.join(shown)})" if shown else ""


TARGETS = (
    Target(
        "commit, T <= 16: at least 70 % of copy bandwidth on the bytes that the formula moves",
        _commit(few=True), lambda r: r["percent_of_copy"], 70.0, True, _name,
        {
            "float32": "arithmetic, where the copy is fast: it is timed beside each case, and its rate moved by two "
            "thirds (AMD EPYC, shared)",
            "bfloat16": "arithmetic: half the bytes, but the same work a weight, and rounding besides; "
            "replay adds a pass over W and W* and two products of R rows. T = 16, R = 4 takes at least as long with "
            "all of it in a core's own cache as a copy of the bytes does (AMD EPYC, Zen 4)",
            "8bit": "arithmetic: decoding, block maxima and encoding with stochastic rounding take at least as long "
            "with all of it in a core's own cache as a copy of the bytes does (AMD EPYC, Zen 4)",
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
            "float32": "the bound counts bytes alone; a token's share of G and S is 4 m n flops besides, however large "
            "the window. k = 16: each input's part in 16 directions is taken out",
            "bfloat16": "as for float32",
            "8bit": "as for float32, and the commit's encoding, as above",
        },
        _beside_decode,
    ),
    Target(
        "decode, layers of 512 and less: at most 15 us a token above nn.Linear",
        lambda r: _of("decode")(r) and r["m"] <= 512, lambda r: r["us_above_baseline"], 15.0, False, _name,
        {
            "float32": "a state of the shared machine that lasts for whole processes: copies run at 43 to 54 GB/s "
            "instead of 35, and what two threads do in less than 0.1 ms takes up to twice as long (512x512, window "
            "16: 32 us in five of seven runs, 64 in two); not explained",
        },
    ),
    Target(
        "observe, down_proj of the last quarter: at most 1.5 x a no-grad forward of the same tokens",
        _of("observe", adapted="down_proj, last quarter"), lambda r: r["ratio"], 1.5, False, _name,
        {
            "float32": "torch's backward pass through the head and top blocks, of the demo model two of five, and the "
            "commits' products",
        },
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
        "medians of interleaved rounds. Written by `python -m bench.kernels.targets`."
    )
    rows = [
        row | {"matmul_tflop_per_s": found["ceilings"].get(f"matmul_{row['dtype']}_tflop_per_s")}
        for found in results
        for row in found["rows"]
    ]
    return "\n".join(["# CPU kernels: targets", "", head, "", *lines(rows)]) + "\n"


def main(folder: Path = RESULTS) -> None:
    """Read the results of `make bench` and write the page beside them."""
    results = [found for name in ("commit", "layers") if (found := load(folder / f"cpu_{name}.json")) is not None]
    if not results:
        raise SystemExit(f"{folder} holds no cpu_commit.json or cpu_layers.json; run `make bench` first")
    (folder / "cpu_targets.md").write_text(render(results))


if __name__ == "__main__":
    main()
