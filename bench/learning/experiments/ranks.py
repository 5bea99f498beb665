"""``python -m bench.learning.experiments.ranks``: low-rank weights of a user compared with full-rank weights.

The demo model reads a part of the C++ headers that the demo does not read, without protection: frozen, with full-rank
weights, and as the only user of a `ttt.LowRank` of each of several ranks. Writes
``bench/learning/results/demo_ranks.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console

import ttt
from bench.learning.experiments.tune import OFFSET
from bench.machine import machine
from ttt.defences import SWITCHES
from ttt.demo.model import COMBINED, CONTEXT, RATE_ALONE, as_ids, load_model
from ttt.demo.text import stream_of

RESULTS = Path("bench/learning/results/demo_ranks.json")
RANKS = (4, 16, 32, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, default=19200, help="bytes to read")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file to write")
    args = parser.parse_args()
    console = Console()
    ids = as_ids(stream_of("headers")[OFFSET : OFFSET + args.bytes + 1])
    plain: dict[str, Any] = {**SWITCHES, "lr": RATE_ALONE}
    rows: list[dict[str, Any]] = []
    sizes = [(f"rank {rank}", ttt.LowRank(slots=1, rank=rank)) for rank in RANKS]
    for name, users in [("frozen", None), ("full rank", None), *sizes]:
        model, config = load_model()[0], COMBINED
        ttt.adapt_(model, config.with_flat(**plain, per_user=users))
        learner = ttt.Learner(model, context=CONTEXT)
        observed = learner.observe(ids, learn=name != "frozen", users=None if users is None else ["user"])
        rows.append({"weights": name, "bits_per_byte": round(observed.bits, 4)})
        if users is not None and learner.pool is not None:
            layers = learner.pool.layers.values()
            rows[-1]["numbers"] = sum(users.capacity * (la.in_features + la.out_features) for la in layers)
        console.print(rows[-1])
    found = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "bytes": args.bytes, "offset": OFFSET}
    args.json.write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
