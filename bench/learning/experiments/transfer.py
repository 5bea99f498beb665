"""``python -m bench.learning.experiments.transfer``: do one model's step sizes suit another?

Three byte-level models of different width and depth read text they have not seen, under a grid of rates, with and
without protection. The default is that setting whose smallest share of the best gain, over models and `TUNING` texts
and with protection, is largest. `REPORTED` texts, of other places, were read with all settings after that.

Chosen on C++ headers, JavaScript and YAML alone, by the same criterion and by the least forgetting of those with 95 %
there, the rate was .1 and .085, of which the widest model had 80 and 89 % on English. So the texts that showed it
became tuning texts, and others are reported.

Two of the models are not shipped: they are trained when they are missing, which takes five to twenty minutes each.
Writes ``bench/learning/results/demo_transfer.json`` and ``demo_transfer.png``.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import ttt
from bench.learning import streams as texts
from bench.learning.experiments import pretrain
from bench.learning.experiments.drift import yaml
from ttt.config import DEFENCES
from ttt.demo.model import CONFIG, CONTEXT, WEIGHTS, bits_per_byte, windows
from ttt.demo.run import calibration_batches, machine
from ttt.demo.text import held_out_python

CACHE = Path("build/models")
MODELS = {"128x4": (128, 4, 600), "256x5": None, "384x2": (384, 2, 400)}
"""Name, hidden width x blocks -> (width, blocks, training steps), or None for the demo's own."""

TUNING = (
    "headers", "javascript", "yaml", "rst", "english", "licences", "rst/1", "english/1", "licences/1", "html/1",
)  # fmt: skip
REPORTED = ("headers/2", "javascript/2", "yaml/2", "rst/2", "english/2", "licences/2", "html/2")
"""Domains of `bench.learning.text.streams`, and YAML; after the stroke the seed that draws the place, 0 otherwise. They may
overlap: two thirds of javascript/2 and licences/2 are read under the seed 0, too; of the others nothing."""

UNPROTECTED = TUNING[3:]
"""Those that are read without protection, too."""

Setting = dict[str, Any]  # rate, lr, clip, burst, protected
Row = dict[str, Any]

CLIP, BURST = 3.0, 1.2
GRID: dict[str, tuple[Setting, tuple[float, ...], tuple[float, ...]]] = {
    "constant": ({"rate": "constant", "clip": None, "burst": None}, (0.005, 0.01, 0.02), (0.0025, 0.005, 0.01, 0.02)),
    "rms": ({"rate": "rms", "clip": CLIP, "burst": None}, (0.042, 0.06, 0.085, 0.12), (0.021, 0.03, 0.042)),
    "rms, burst": (
        {"rate": "rms", "clip": CLIP, "burst": BURST},
        (0.03, 0.042, 0.06, 0.07, 0.085, 0.1, 0.12, 0.17),
        (0.015, 0.021, 0.03, 0.042, 0.06),
    ),
}
"""Kind -> (what it is, its rates with protection, and without)."""


def load(name: str, console: Console) -> nn.Module:
    """The model ``name`` of `MODELS`, in float32; trained first if it is not there."""
    from transformers import LlamaForCausalLM

    wanted, path = MODELS[name], WEIGHTS
    if wanted is not None:
        path = CACHE / name
        hidden, layers, steps = wanted
        log = path / "training_log.json"
        if not log.exists() or json.loads(log.read_text())["log"][-1]["step"] < steps:  # a run may have been cut off
            console.print(f"{path} is missing: training it, {steps} steps")
            path.mkdir(parents=True, exist_ok=True)
            pretrain.train(steps, 8, path, hidden=hidden, layers=layers)
    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()


def stream(name: str, size: int) -> Tensor:
    """(1, size + 1): text of the domain that ``name`` begins with, from a place that the seed after it draws."""
    domain, _, seed = name.partition("/")
    data = yaml() if domain == "yaml" else texts.streamed(domain)
    return texts.cut(data, [size], torch.Generator().manual_seed(int(seed or 0)))[0][0]


def grid() -> list[Setting]:
    """All settings that are tried."""
    return [
        {**kind, "lr": lr, "protected": protected}
        for kind, *rates in GRID.values()
        for protected, lrs in zip((True, False), rates, strict=True)
        for lr in lrs
    ]


class Model:
    """One model, measured under any setting; its calibrations are made once for each kind of state."""

    def __init__(self, base: nn.Module, held_out: Tensor) -> None:
        self.base, self.held_out = base, held_out
        self.known: dict[str, Any] = {}

    def measure(self, setting: Setting, ids: Tensor) -> dict[str, float]:
        """Bits per byte of ``ids``, each byte scored before it is learnt, and of held-out Python afterwards."""
        options: dict[str, Any] = {name: setting[name] for name in ("rate", "lr", "clip", "burst")}
        config = dataclasses.replace(CONFIG, **options | ({} if setting["protected"] else DEFENCES))
        model = ttt.adapt_(copy.deepcopy(self.base), config)
        learner = ttt.Learner(model, context=CONTEXT)
        if setting["protected"]:
            if config.rate not in self.known:
                learner.calibrate(calibration_batches())
                self.known[config.rate] = learner.snapshot()
            learner.rollback(self.known[config.rate])
        new = learner.observe(ids).bits
        return {"new_bpb": round(new, 4), "old_bpb": round(bits_per_byte(model, self.held_out), 4)}


def shares(rows: list[Row]) -> None:
    """Give each row its gain over the frozen model's bits, that as a share of the best of its model and text, and how
    many bits per byte of held-out Python are lost.

    Protected and unprotected rows have a best of their own.
    """
    frozen = {(r["model"], r["text"]): r for r in rows if r["rate"] is None}
    best: dict[tuple, float] = {}
    for r in rows:
        reference = frozen[r["model"], r["text"]]
        r["gain"] = round(reference["new_bpb"] - r["new_bpb"], 4)
        r["lost"] = round(r["old_bpb"] - reference["old_bpb"], 4)
        key = r["model"], r["text"], r["protected"]
        best[key] = max(r["gain"], best.get(key, r["gain"]))
    for r in rows:
        r["share"] = None if r["rate"] is None else round(r["gain"] / best[r["model"], r["text"], r["protected"]], 4)


def edges(rows: list[Row]) -> list[Row]:
    """The best rows whose rate is the lowest or highest that was tried of their kind: there the grid is too narrow."""
    rates: dict[tuple, list[float]] = {}

    def kind(r: Row) -> tuple:
        return tuple(r[n] for n in ("rate", "clip", "burst", "protected"))

    for r in rows:
        rates.setdefault(kind(r), []).append(r["lr"])
    found = (r for r in rows if r["share"] == 1.0)
    return [r for r in found if r["lr"] in (min(rates[kind(r)]), max(rates[kind(r)]))]


def summary(rows: list[Row]) -> list[Row]:
    """For each setting and text, the share on each model and the smallest, best first, and the mean of what is lost;
    settings tried on all models only."""
    found: dict[tuple, Row] = {}
    for r in rows:
        if r["rate"] is None:
            continue
        names = ("text", "protected", "rate", "clip", "burst", "lr")
        line = found.setdefault(tuple(r[n] for n in names), {n: r[n] for n in names} | {"shares": {}, "lost": 0.0})
        line["shares"][r["model"]] = r["share"]
        line["lost"] += r["lost"] / len(MODELS)
    complete = [line for line in found.values() if len(line["shares"]) == len(MODELS)]
    for line in complete:
        line["worst"], line["lost"] = min(line["shares"].values()), round(line["lost"], 4)
    return sorted(complete, key=lambda line: (line["text"], line["protected"], -line["worst"]))


def ranking(lines: list[Row]) -> list[Row]:
    """The settings, by the smallest share with protection over models and the tuning texts, largest first.

    ``tuning`` and ``report``: the smallest share with protection on each text; ``unprotected`` likewise, where tried;
    ``lost`` the mean over models and tuning texts.
    """
    found: dict[tuple, Row] = {}
    for line in lines:
        key = tuple(line[n] for n in ("rate", "lr", "clip", "burst"))
        one = found.setdefault(key, {"tuning": {}, "report": {}, "unprotected": {}, "lost": 0.0})
        role = "tuning" if line["text"] in TUNING else "report"
        one[role if line["protected"] else "unprotected"][line["text"]] = line["worst"]
        if line["protected"] and role == "tuning":
            one["lost"] += line["lost"] / len(TUNING)
    tried = [
        dict(zip(("rate", "lr", "clip", "burst"), key, strict=True))
        | {"worst": min(one["tuning"].values())}
        | one
        | {"lost": round(one["lost"], 4)}
        for key, one in found.items()
        if set(one["tuning"]) == set(TUNING)
    ]
    return sorted(tried, key=lambda one: -one["worst"])


def plot(rows: list[Row], path: Path) -> None:
    """Gain with protection against the rate: a column for each way to scale it, a line of panels for what the texts are
    there for; a colour for each model, a thin line for each text and a thick one for the smallest of them."""
    import matplotlib.pyplot as plt

    kinds = [name for name, (_, protected, _) in GRID.items() if len(protected) > 2]
    roles = (("tuned on", TUNING), ("reported", REPORTED))
    figure, axes = plt.subplots(2, len(kinds), figsize=(4.6 * len(kinds), 7), sharey=True, constrained_layout=True)
    for line, (title, domains) in zip(axes, roles, strict=True):
        for axis, name in zip(line, kinds, strict=True):
            kind, rates, _ = GRID[name]
            shown = [r for r in rows if r["protected"] and all(r[k] == v for k, v in kind.items())]
            for colour, model in enumerate(MODELS):
                lines = []
                for domain in domains:
                    found = {r["lr"]: 100 * r["share"] for r in shown if (r["model"], r["text"]) == (model, domain)}
                    if set(found) == set(rates):
                        lines.append([found[lr] for lr in rates])
                        axis.plot(rates, lines[-1], lw=0.7, alpha=0.5, color=f"C{colour}")
                if lines:
                    least = [min(values) for values in zip(*lines, strict=True)]
                    axis.plot(rates, least, "o-", ms=4, lw=2.2, color=f"C{colour}", label=f"{model}: smallest")
            axis.axhline(95, color="black", lw=0.8, ls=":")
            axis.set(xscale="log", xlabel="lr", title=f"{name}: {title}", ylim=(60, 101))
            axis.set_xticks(rates, [f"{lr:g}" for lr in rates], fontsize=7)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        line[0].set_ylabel("gain with protection, % of the best")
        line[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def finish(found: dict[str, Any], path: Path) -> None:
    """Write ``found`` with what follows from its rows, and the plot."""
    shares(found["rows"])
    found["edges"] = edges(found["rows"])
    found["ranking"] = ranking(summary(found["rows"]))
    # A line for each row: there are hundreds.
    rows = ",\n  ".join(json.dumps(r) for r in found["rows"])
    text = json.dumps(found | {"rows": "@"}, indent=1)
    path.write_text(text.replace('"@"', f"[\n  {rows}\n ]") + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, default=12288)
    parser.add_argument("--models", default=",".join(MODELS), help="those to measure now; others stay as they are")
    parser.add_argument("--texts", default=",".join((*TUNING, *REPORTED)), help="likewise")
    parser.add_argument("--json", type=Path, default=Path("bench/learning/results/demo_transfer.json"))
    args = parser.parse_args()
    names, domains = args.models.split(","), args.texts.split(",")
    console, held_out = Console(width=160), windows(held_out_python(), 8)
    found: dict[str, Any] = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "bytes": args.bytes, "rows": []}
    if args.json.exists():
        before = json.loads(args.json.read_text())
        if before["bytes"] == args.bytes and "ranking" in before:  # rows of the first protocol have other fields
            found["rows"] = [r for r in before["rows"] if r["model"] not in names or r["text"] not in domains]
    found |= {"config": CONFIG.to_dict()}
    for name in names:
        model = Model(load(name, console), held_out)
        for domain in domains:
            ids = stream(domain, args.bytes)
            frozen = {"rate": "constant", "clip": None, "burst": None, "lr": 0.0, "protected": False}
            rows = [frozen | model.measure(frozen, ids) | {"rate": None}]
            for setting in grid():
                if domain not in UNPROTECTED and not setting["protected"]:
                    continue
                rows.append(setting | model.measure(setting, ids))
                console.print(name, domain, rows[-1])
            found["rows"] += [{"model": name, "text": domain} | row for row in rows]
            finish(found, args.json)  # every time, so that a run that is cut off leaves what it measured
    plot(found["rows"], args.json.with_suffix(".png"))
    for line in found["ranking"]:
        console.print(line)
    console.print("best at an edge of the grid:", found["edges"])


if __name__ == "__main__":
    main()
