"""``python -m bench.learning.experiments.columns``: one set of weights compared with a column for each domain.

The frozen model, the demo's default and `ttt.GrowingLearner` read C++ headers, English and YAML in the order
A B A C B C A, where each domain continues where it stopped, and then Python that the model was not trained on.
Afterwards they are tested on the second halves of windows of Python; `ttt.GrowingLearner.routed` may use the first
halves to choose a column. Writes ``bench/learning/results/demo_columns.json``.

The constants of `ttt.GrowingLearner` were chosen after runs on headers, YAML, JavaScript and CMake files in turn. Of
the texts read here, therefore, only the English shows how it works on text that nothing was chosen on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import ttt
from bench.learning.text.streams import yaml
from bench.machine import machine
from ttt.demo.model import COLUMNS, COMBINED, LN2, as_ids, calibration_batches, load_model, new_learner, windows
from ttt.demo.text import held_out_python, stream_of

RESULTS = Path("bench/learning/results/demo_columns.json")
PART = 8192  # bytes of each part of the stream
ORDER = ("headers", "english", "headers", "yaml", "english", "yaml", "headers", "python")
FIRST = 1024  # bytes at the beginning of each part that are also reported alone


@torch.no_grad()
def second_halves(model: nn.Module, rows: Tensor, reader: Any) -> tuple[float, dict[str, int]]:
    """Bits per byte of the second halves of ``rows`` (N, T); the first halves are for `ttt.GrowingLearner.routed`.

    Returns:
        (mean bits per byte, how often each column was chosen).
    """
    total, half = 0.0, rows.shape[1] // 2
    chosen: dict[str, int] = {}
    for row in rows.split(1):
        with reader.routed(row[:, :half]) as name:
            logits = model(input_ids=row).logits[0, half - 1 : -1].float()
        chosen[name] = chosen.get(name, 0) + 1
        total += float(nn.functional.cross_entropy(logits, row[0, half:], reduction="mean")) / LN2
    return total / len(rows), chosen


class Single:
    """A learner with one set of weights, with the interface of `ttt.GrowingLearner`."""

    def __init__(self, learner: ttt.Learner) -> None:
        self.observe = learner.observe

    def routed(self, ids: Tensor):
        return contextlib.nullcontext("active")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS, help="file to write")
    parser.add_argument("--part", type=int, default=PART, help="bytes of each part of the stream")
    args = parser.parse_args()
    console = Console()
    base, config = load_model()[0], COMBINED
    held_out = held_out_python()
    texts = {"headers": stream_of("headers"), "english": stream_of("english"), "yaml": yaml()}
    texts["python"] = held_out[len(held_out) // 2 :]  # the windows below are of the first half
    tests, batches = windows(held_out[: len(held_out) // 2], 24), calibration_batches()
    found: dict[str, Any] = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "config": config.to_dict()}
    found |= {"columns_config": COLUMNS.to_dict(), "part_bytes": args.part, "first_bytes": FIRST, "readers": {}}
    for name in ("frozen", "one set of weights", "columns"):
        learner = new_learner(base, COLUMNS if name == "columns" else config, batches)
        growing = ttt.GrowingLearner(learner) if name == "columns" else None
        reader: Any = growing or Single(learner)
        rows: list[dict[str, Any]] = []
        at = dict.fromkeys(texts, 0)
        for domain in ORDER:
            start = at[domain]
            at[domain] += args.part
            ids = as_ids(texts[domain][start : start + args.part + 1])
            bits = reader.observe(ids, learn=name != "frozen").nll[0] / LN2
            row = {"domain": domain, "again": start > 0, "bits_per_byte": round(float(bits.mean()), 4)}
            rows.append(row | {"first": round(float(bits[:FIRST].mean()), 4)})
            console.print(name, rows[-1])
        python, chosen = second_halves(learner.model, tests, reader)
        one: dict[str, Any] = {"parts": rows, "held_out_python": round(python, 4), "chosen": chosen}
        one["bits_per_byte"] = round(sum(r["bits_per_byte"] for r in rows) / len(rows), 4)
        again = [r["first"] for r in rows if r["again"]]
        one["first_bytes_of_a_domain_that_comes_back"] = round(sum(again) / len(again), 4)
        if growing is not None:
            one["columns"] = [
                {"tokens": c.tokens, "worth": round(c.worth, 4), "error": round(c.error, 4)} for c in growing.columns
            ]
            one["column_bytes"] = growing.bytes()
            one["switches"] = [
                {"bytes": s.tokens, "kind": s.kind, "column": s.column,
                 "bits": {k: round(v, 3) for k, v in s.bits.items()}} for s in growing.history
            ]  # fmt: skip
        found["readers"][name] = one
        console.print(name, {k: v for k, v in one.items() if k not in ("parts", "switches")})
    args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
