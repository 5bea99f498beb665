"""``python -m bench.learning.experiments.storage``: importance and trace stored in 32, 16 and 8 bits.

The demo's default method and EWC alone read the demo's streams with each ``state_dtype``, once as in the demo and once
with a consolidation halfway, which turns the trace into importance. Writes
``bench/learning/results/demo_storage.json``.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console

import ttt
from bench.learning.experiments.demo_setting import options_of, setting
from bench.machine import machine
from ttt.demo.model import (
    DEFAULT,
    EWC,
    as_ids,
    bits_per_byte,
    methods,
    new_learner,
)
from ttt.demo.text import stream_of

RESULTS = Path("bench/learning/results/demo_storage.json")
DTYPES = ("float32", "bfloat16", "8bit")


def main() -> None:
    args, console = options_of(__doc__, 20480, RESULTS), Console()
    base, config, held_out, batches = setting()
    half = args.bytes // 2
    rows: list[dict[str, Any]] = []
    for domain in ("english", "headers"):
        stream = as_ids(stream_of(domain)[: args.bytes + 1])
        for method in (DEFAULT, EWC):
            for consolidates in (False, True):
                for dtype in DTYPES:
                    chosen = methods(config)[method]
                    assert chosen is not None
                    learner = new_learner(base, dataclasses.replace(chosen, state_dtype=dtype), batches)
                    first = learner.observe(stream[:, : half + 1])
                    if consolidates:
                        learner.consolidate()
                    second = learner.observe(stream[:, half:])
                    held = ttt.memory_usage(learner.model).per_parameter
                    row: dict[str, Any] = {
                        "domain": domain,
                        "method": method,
                        "consolidates": consolidates,
                        "state_dtype": dtype,
                    }
                    row |= {"new_bpb": round((first.bits + second.bits) / 2, 4)}
                    row |= {"old_bpb": round(bits_per_byte(learner.model, held_out), 4)}
                    row["state_bytes_per_weight"] = round(held["importance"] + held["trace"], 3)
                    full = row if dtype == DTYPES[0] else rows[-DTYPES.index(dtype)]
                    row |= {f"{key}_moved": round(row[key] - full[key], 4) for key in ("new_bpb", "old_bpb")}
                    rows.append(row)
                    console.print(row)
    largest = max(abs(row[f"{key}_bpb_moved"]) for row in rows for key in ("new", "old"))
    found = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "bytes": args.bytes, "largest_move": largest}
    args.json.write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n")
    console.print(f"The largest move from float32: {largest} bits per byte")


if __name__ == "__main__":
    main()
