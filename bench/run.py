"""``python -m bench.run --device cpu --suite commit,decode,observe --json bench/results/cpu.json``

Every contender is checked against the reference, then all of a case's contenders are timed in turn. Prints a table
and writes the same figures as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.cases import SUITES, Case
from bench.timing import copy_rate, interleaved, machine, matmul_rate, quartiles


def measure(case: Case, device: str, rounds: int, copy: float) -> list[dict]:
    """One row for each contender of ``case``; ratios are medians of the rounds' own ratios."""
    case.check()
    times = interleaved(device, case.contenders, rounds)
    rows = []
    for name, repeats in ((name, case.repeats_of.get(name, case.repeats)) for name in times):
        times[name] = [seconds / repeats for seconds in times[name]]
    for name, seconds in times.items():
        low, median, high = quartiles(seconds)
        ratios = [s / b for s, b in zip(seconds, times[case.baseline], strict=True)]
        row = {"suite": case.suite, "case": case.name, "dtype": case.dtype, "contender": name, "unit": case.unit}
        row |= {"us": median * 1e6, "us_q1": low * 1e6, "us_q3": high * 1e6}
        row |= {"ratio": quartiles(ratios)[1], "baseline": case.baseline, "bytes": case.bytes, "flops": case.flops}
        row |= {"gb_per_s": case.bytes / median / 1e9, "tflop_per_s": case.flops / median / 1e12}
        row["percent_of_copy"] = 100 * case.bytes / median / copy
        rows.append({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()})
    return rows


def table_of(rows: list[dict], title: str) -> Table:
    table = Table(title=title)
    for column in ("suite", "case", "dtype", "contender", "us", "quartiles", "GB/s", "% of copy", "ratio to"):
        table.add_column(column, justify="left" if column in ("suite", "case", "dtype", "contender") else "right")
    for r in rows:
        # Bytes are those that ours must move: they say nothing about another contender.
        own = r["contender"] in ("ttt", "observe")
        cells = [
            r["suite"],
            r["case"],
            r["dtype"],
            r["contender"],
            f"{r['us']:.1f}",
            f"{r['us_q1']:.1f}-{r['us_q3']:.1f}",
        ]
        cells += (
            [f"{r['gb_per_s']:.1f}", f"{r['percent_of_copy']:.0f}"] if own and r["suite"] != "observe" else ["", ""]
        )
        table.add_row(*cells, "" if r["contender"] == r["baseline"] else f"{r['ratio']:.3f} {r['baseline']}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--suite", default=",".join(SUITES), help=f"comma-separated, of {', '.join(SUITES)}")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    args = parser.parse_args()
    unknown = set(args.suite.split(",")) - set(SUITES)
    if unknown:
        parser.error(f"--suite must be of {', '.join(SUITES)}, got {', '.join(sorted(unknown))}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch.cuda.is_available() is False")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    console = Console(width=150)
    about = machine(args.device)
    console.print(about)
    copy = copy_rate(args.device)
    ceilings = {"copy_gb_per_s": round(copy / 1e9, 1)}
    for dtype in (torch.float32, torch.bfloat16):
        ceilings[f"matmul_{str(dtype).removeprefix('torch.')}_tflop_per_s"] = round(
            matmul_rate(args.device, dtype) / 1e12, 4
        )
    console.print(ceilings)
    rows: list[dict] = []
    for suite in args.suite.split(","):
        for case in SUITES[suite](args.device):
            rows += measure(case, args.device, args.rounds, copy)
            console.print(f"{suite}: {case.name}, {case.dtype}: done", style="dim")
            del case
            gc.collect()
            if args.json:  # after every case, so that a run that is cut off leaves what it measured
                args.json.parent.mkdir(parents=True, exist_ok=True)
                found = {"machine": about, "ceilings": ceilings, "rounds": args.rounds, "rows": rows}
                args.json.write_text(json.dumps(found, indent=1) + "\n")
    console.print(
        table_of(rows, f"{about['device']}, {about['threads']} threads, copy {ceilings['copy_gb_per_s']} GB/s")
    )


if __name__ == "__main__":
    main()
