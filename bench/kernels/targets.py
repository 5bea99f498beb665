"""``python -m bench.kernels.targets``: compare the committed results with the targets of the kernels.

Writes ``bench/kernels/results/cpu_targets.md``: a line for every target and dtype, with the cases that miss the target
and the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.kernels.check import RESULTS, load

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Target:
    """A bound on a figure of some rows of the results.

    Attributes:
        title: what is bounded, and by how much.
        takes: whether the bound applies to a row.
        figure: the row's figure, in the unit of ``limit``.
        limit: the bound.
        at_least: whether ``limit`` is a lower bound; otherwise it is an upper bound.
        case: the row's name in the table.
        obstacle: for a dtype, or "8bit", the reason why the bound is missed.
        beside: text to show after a figure that misses the bound.
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
        """Whether ``row`` satisfies the bound."""
        value = self.figure(row)
        return value >= self.limit if self.at_least else value <= self.limit


def _of(suite: str, **wanted: Any) -> Callable[[Row], bool]:
    return lambda r: r["suite"] == suite and r["ours"] and all(r.get(k) == v for k, v in wanted.items())


def _commit(few: bool) -> Callable[[Row], bool]:
    return lambda r: r["suite"] == "commit" and r["ours"] and (r["tokens"] <= 16) == few


def _name(row: Row) -> str:
    """The name of the case without the format of its state, which has a column of its own."""
    return row["case"].replace(", 8bit state", "")


def _beside_decode(row: Row) -> str:
    """The ratio to the time of a stream that only reads, and what the products G and S add.

    That is the ratio to bounds that count them, where these were measured; else their time alone.
    """
    ratio, rate = row.get("ratio_to_read_bound"), row.get("matmul_tflop_per_s")
    if "ratio_to_part_bound" in row:
        larger, both = row["ratio_to_part_bound"], row["ratio_to_part_sum"]
        return f" ({larger:.2f} x the bound with G and S beside the bytes, {both:.2f} x with G and S after them)"
    shown = [] if ratio is None else [f"{ratio:.2f} x at the rate of a pure read"]
    if rate:
        # 2 m n flops per token for G, and as many for S.
        products_us = 4 * row["m"] * row["n"] / rate * 1e-6
        shown.append(f"G and S at the rate of torch's matmul: {products_us * row['ratio_to_bound'] / row['us']:.2f} x")
    return f" ({'; '.join(shown)})" if shown else ""


TARGETS = (
    Target(
        "commit, T <= 16: at least 70 % of copy bandwidth on the bytes that the formula moves",
        _commit(few=True), lambda r: r["percent_of_copy"], 70.0, True, _name,
        {
            "float32": "arithmetic, where the copy is fast: the copy is timed beside each case, and its rate varied "
            "by two thirds (AMD EPYC, shared)",
            "bfloat16": "arithmetic: half the bytes of float32, but the same work per weight, and rounding in "
            "addition; replay adds a pass over W and W* and two products of R rows. With all operands in a core's own "
            "cache, T = 16, R = 4 takes at least as long as a copy of its bytes (AMD EPYC, Zen 4)",
            "8bit": "arithmetic: with all operands in a core's own cache, decoding, block maxima and encoding with "
            "stochastic rounding take at least as long as a copy of the bytes (AMD EPYC, Zen 4)",
        },
    ),
    Target(
        "commit, T >= 64: G and S at 60 % or more of the rate of torch's matmul of that shape and dtype",
        _commit(few=False), lambda r: r["percent_of_matmul"], 60.0, True, _name,
        {
            "float32": "at T = 64 moving W, W*, Omega and F takes about as long as the products, and the two overlap "
            "only in part: these rows reach 53 to 61 % of copy bandwidth at the same time",
            "bfloat16": "as for float32; at T = 64 and R = 4 the bytes and the drift of the replay rows take most of "
            "the time",
        },
    ),
    Target(
        "decode at 4096x4096, commit amortised: at most 1.10 x the traffic bound of its own state",
        _of("decode", m=4096), lambda r: r["ratio_to_bound"], 1.10, False, _name,
        {
            "float32": "the bound counts only bytes; a token's share of G and S takes 4 m n flops in addition, for any "
            "window. k = 16: the part of each input in 16 directions is removed",
            "bfloat16": "as for float32",
            "8bit": "as for float32, and the commit's encoding, as above",
        },
        _beside_decode,
    ),
    Target(
        "decode, layers of 512 and less: at most 15 us a token above nn.Linear",
        lambda r: _of("decode")(r) and r["m"] <= 512, lambda r: r["us_above_baseline"], 15.0, False, _name,
        {
            "float32": "not explained: in some processes on the shared machine copies run at 43 to 54 GB/s instead of "
            "35, and work of two threads that takes less than 0.1 ms takes up to twice as long (512x512, window 16: "
            "32 us in five of seven runs, 64 us in two)",
        },
    ),
    Target(
        "observe, down_proj of the last quarter: at most 1.5 x a no-grad forward of the same tokens",
        _of("observe", adapted="down_proj, last quarter"), lambda r: r["ratio"], 1.5, False, _name,
        {
            "float32": "torch's backward pass through the head and the top blocks (two of five in the demo model), and "
            "the products of the commits",
        },
    ),
    Target(
        "generate, learning every 16 tokens: at least 0.85 of plain generation's speed",
        _of("generate"), lambda r: 1 / r["ratio"], 0.85, True, _name,
        {"float32": "the top blocks (two of five in the demo model) run a second time, with gradients"},
    ),
    Target(
        "per-token Fisher, 1024x1024, T = 64: under 1.74 x forward and backward",
        _of("fisher"), lambda r: r["ratio"], 1.74, False, _name, {},
    ),
)  # fmt: skip


def kind(row: Row) -> str:
    """The dtype of a row, or "8bit" if importance and trace are stored in 8 bits."""
    return "8bit" if row.get("state") == "8bit" else row["dtype"]


def lines(rows: list[Row]) -> list[str]:
    """The lines of the table, in Markdown."""
    out = ["| target | weights | reached | missed | reason |", "|---|---|---|---|---|"]
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
    """The whole page, in Markdown."""
    machine = results[0]["machine"]
    head = (
        f"{machine['device']}, {machine['isa']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"{machine['date']}; "
        "medians of interleaved rounds. Written by `python -m bench.kernels.targets`."
    )
    rows = [
        row | {"matmul_tflop_per_s": found["ceilings"].get(f"matmul_{row['dtype']}_tflop_per_s")}
        for found in results
        for row in found["rows"]
    ]
    return "\n".join(["# CPU kernels: targets", "", head, "", *lines(rows)]) + "\n"


app = typer.Typer(add_completion=False)


@app.command()
def main(folder: Annotated[Path, typer.Argument(help="Folder of the results of make bench.")] = RESULTS) -> None:
    """Compare results with the targets, and write the page cpu_targets.md beside them."""
    results = [found for name in ("commit", "layers") if (found := load(folder / f"cpu_{name}.json")) is not None]
    if not results:
        raise SystemExit(f"{folder} holds no cpu_commit.json or cpu_layers.json; run `make bench` first")
    (folder / "cpu_targets.md").write_text(render(results))


if __name__ == "__main__":
    app()
