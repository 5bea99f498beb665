"""The search for the options of each method, and the file of chosen options."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.learning.runs import Journal, key_of, wanted
from bench.learning.suite import SEEDS, Record, Suite, best_of, candidates


def tuned_path(suite: Suite) -> Path:
    """The committed file of chosen options."""
    return Path(__file__).parent / "tuned" / f"{suite.name}.json"


def load(path: Path) -> dict[str, dict[str, Record]]:
    """Scenario -> method -> options, from the file ``path``.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; `python -m bench.learning --tune` writes it")
    chosen = json.loads(path.read_text())["chosen"]
    return {s: {m: found["options"] for m, found in methods.items()} for s, methods in chosen.items()}


def options_of(suite: Suite, path: Path) -> dict[str, dict[str, Record]]:
    """Scenario -> method -> options: the only candidate where there is one, else what `load` finds in the file.

    A suite whose methods all have one candidate needs no search and no file.

    Raises:
        FileNotFoundError: if there is no file, and it is needed.
    """
    single = {m: found[0] for m in suite.methods if len(found := candidates(suite.grid(m))) == 1}
    held = load(path) if len(single) < len(suite.methods) else {}
    return {s: {**held.get(s, {}), **single} for s in {*held, *map(suite.tuned_on, suite.scenarios)}}


def todo(suite: Suite, scenarios: Sequence[str], methods: Sequence[str]) -> list[Record]:
    """All runs of the search for the options of ``methods`` in ``scenarios``, and of the references."""
    every = sorted({*SEEDS, *(seed for method in methods for seed in suite.seeds(method))})
    return [
        wanted(suite, scenario, method, seed, options, tuning=True)
        for scenario in dict.fromkeys(suite.tuned_on(s) for s in scenarios)
        for method in dict.fromkeys([*suite.references, *methods])
        if suite.fits(method, scenario)
        for options in candidates(suite.grid(method))
        for seed in (every if method in suite.references else suite.seeds(method))
    ]


def choose(suite: Suite, journal: Journal, runs: Sequence[Record]) -> dict[str, dict[str, dict[str, Any]]]:
    """Choose the options with the best score over the tuning seeds.

    Those of references are chosen with `SEEDS`, even if other methods use more seeds.

    Returns:
        Scenario -> method -> a dict with

        * ``options``: the chosen ones
        * ``score``: theirs, and ``worst``, the lowest score of the search
        * ``tried``: number of settings
        * ``at_edge``: numeric options whose best value is the first or last of the grid, so that a better value may
          lie outside
    """
    tried: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for wish in runs:
        record = journal.records[key_of(wish)]
        options = json.dumps(record["options"])
        tried.setdefault((record["scenario"], record["method"]), {}).setdefault(options, []).append(record)
    chosen: dict[str, dict[str, dict[str, Any]]] = {}
    settled: dict[tuple[str, int], dict[str, Record]] = {}
    for (scenario, method), found in tried.items():  # the references come first
        scores = {
            options: [
                suite.score(r, settled.get((scenario, r["seed"]), {}))
                for r in records
                if method not in suite.references or r["seed"] in SEEDS
            ]
            for options, records in found.items()
        }
        totals = {options: suite.combine(method, values) for options, values in scores.items()}
        best = max(totals, key=lambda options: totals[options])
        if method in suite.references:
            for record in found[best]:
                settled.setdefault((scenario, record["seed"]), {})[method] = record
            for record in (r for records in found.values() for r in records):
                references = settled[scenario, record["seed"]]
                best_so_far = references.setdefault(best_of(method), record)
                if suite.score(record, {}) > suite.score(best_so_far, {}):
                    references[best_of(method)] = record
        chosen.setdefault(scenario, {})[method] = {
            "options": json.loads(best),
            "score": round(totals[best], 4),
            "worst": round(min(totals.values()), 4),
            "tried": len(scores),
            "at_edge": _edges(json.loads(best), suite.grid(method)),
        }
    return chosen


def _edges(options: Record, grid: Mapping[str, Sequence[Any]]) -> list[str]:
    numeric = [n for n, values in grid.items() if len(values) > 2 and not isinstance(values[0], str)]
    return [n for n in numeric if options[n] in (grid[n][0], grid[n][-1])]


def save(path: Path, suite: Suite, chosen: Mapping[str, Mapping[str, Any]]) -> None:
    """Write ``chosen`` to ``path``, and keep what the file has for other scenarios and methods."""
    held: dict[str, dict[str, Any]] = json.loads(path.read_text())["chosen"] if path.exists() else {}
    for scenario, methods in chosen.items():
        held.setdefault(scenario, {}).update(methods)
    ordered = {
        s: {m: held[s][m] for m in suite.methods if m in held[s]}
        for s in dict.fromkeys(suite.tuned_on(scenario) for scenario in suite.scenarios)
        if s in held
    }  # without methods that the suite no longer has
    content = {"suite": suite.name, "seeds": list(SEEDS), "protocol": suite.protocol(), "chosen": ordered}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
