"""``python -m bench.learning.experiments.telling METHOD``: what a conversation of hundreds of turns does to the model.

A person of the suite "facts" tells ten facts, then sentences about other things. After 0, 50, 200 and 500 of these it
is measured how many questions are answered, and how far the model has moved. At the end other values of some facts are
told, and asked for: whether anything new can still be learnt. METHOD is one of the methods of the suite.

Writes ``bench/learning/results/telling.json``; a run replaces the one of the same method and person.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from bench.learning.clock import seconds
from bench.learning.facts.contenders import Contender
from bench.learning.facts.methods import METHODS, method
from bench.learning.facts.people import Fact, corrected, of_things, person
from bench.learning.facts.questions import questions
from bench.learning.facts.run import TEXTS, TOKENS, _choices, _general, _known
from bench.learning.language.base import Base, smollm
from bench.learning.language.measures import divergence
from bench.machine import machine
from ttt.demo.knowledge import loss

RESULTS = Path("bench/learning/results/telling.json")
AFTER = (0, 50, 200, 500)
"""After how many sentences about other things it is measured."""


def texts_of(base: Base) -> dict[str, torch.Tensor]:
    """Those of `TEXTS` that are on this machine."""
    found = {}
    for name in TEXTS:
        try:
            found[name] = base.tokens(name, TOKENS, 0)
        except FileNotFoundError as error:
            print(error)
    return found


def right(contender: Contender, facts: Sequence[Fact]) -> float:
    """The share of the questions about ``facts`` for which the right value of ten is the most probable."""
    return round(fmean(choice.rank == 1 for choice in _choices(contender, questions(facts))), 4)


def measured(base: Base, contender: Contender, facts: Sequence[Fact]) -> dict[str, Any]:
    """What `bench.learning.facts.run.run` measures of the same name, with the texts by name."""
    head = base.model.get_output_embeddings()
    found: dict[str, Any] = {"right": right(contender, facts), "general": round(_general(contender, _known(base)), 5)}
    with torch.no_grad(), contender.answering(1):
        found["kl"] = round(float(divergence(contender.model, base.general, head, base.frozen_hidden).mean()), 6)
        read = {name: float(loss(contender.model, ids).mean()) for name, ids in texts_of(base).items()}
    return {**found, "texts": {name: round(each, 5) for name, each in read.items()}}


def run(base: Base, name: str, seed: int, after: Sequence[int] = AFTER) -> dict[str, Any]:
    """Tell the person ``seed`` to the method ``name``, and measure ``after`` so many other sentences."""
    facts, more = person(seed), of_things(seed, max(after))
    options = {option: values[0] for option, values in method(name).grid.items()}
    frozen, contender = (METHODS[each].make(base, options, seed) for each in ("frozen", name))
    began, told = time.perf_counter(), 0.0
    rows = []
    before = measured(base, frozen, facts)
    contender.tell([fact.told for fact in facts])
    said = 0
    for count in sorted(after):
        start = seconds(base.device.type)
        contender.tell(more[said:count])
        told, said = told + seconds(base.device.type) - start, count
        found = measured(base, contender, facts)
        found["general"] = round(found["general"] - before["general"], 5)
        found["texts"] = {text: round(nats - before["texts"][text], 5) for text, nats in found["texts"].items()}
        rows.append({"other sentences": count, **found})
        print(f"{time.perf_counter() - began:6.0f} s", rows[-1], flush=True)
    later = corrected(facts, seed)
    contender.tell([fact.told for fact in later])
    return {
        "method": name, "seed": seed, "options": options, "rows": rows,
        "new_values": len(later), "new_values_right": right(contender, later),
        "seconds_per_sentence": round(told / max(said, 1), 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("method", choices=[name for name in METHODS if name.startswith("online")])
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    made = {**run(smollm(), options.method, options.seed), "machine": machine(), "date": time.strftime("%Y-%m-%d")}
    runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    kept = [each for each in runs if (each["method"], each["seed"]) != (made["method"], made["seed"])]
    RESULTS.write_text(json.dumps({"runs": [*kept, made]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
