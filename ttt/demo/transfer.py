"""``python -m ttt.demo.transfer``: do one model's step sizes suit another?

Three byte-level models of different width and depth read text they have not seen, under a grid of rates, with and
without protection. On C++ headers (a part that the demo does not show) one default is chosen: the setting whose
smallest share of a model's best gain is largest. On reStructuredText, which nothing was tuned on, it is compared with
what is best there for each model. Two of the models are not shipped: they are trained when they are missing, which
takes five to twenty minutes each. Writes ``bench/results/demo_transfer.json`` and ``demo_transfer.png``.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import ttt
from ttt.config import DEFENCES
from ttt.demo import pretrain
from ttt.demo.model import CONFIG, CONTEXT, WEIGHTS, as_ids, bits_per_byte, windows
from ttt.demo.run import calibration_batches, machine
from ttt.demo.text import held_out_python, stream_of
from ttt.demo.tune import OFFSET

CACHE = Path("build/models")
MODELS = {"128x4": (128, 4, 600), "256x5": None, "384x2": (384, 2, 400)}
"""Name, hidden width x blocks -> (width, blocks, training steps), or None for the demo's own."""

RATES = {
    "constant": (0.0025, 0.005, 0.01, 0.02, 0.04),
    "rms": (0.03, 0.042, 0.06, 0.12),
    "energy": (2.0, 8.0, 32.0),
}
PROTECTED = {"constant": (0.005, 0.01, 0.02), "rms": (0.03, 0.042, 0.06)}
CLIPS = {"constant": None, "rms": 3.0, "energy": None}

Row = dict[str, Any]


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


def rst() -> bytes:
    """scikit-learn's descriptions of its datasets.

    Raises:
        FileNotFoundError: without scikit-learn (``pip install 'ttt[benchmark]'``).
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the report reads scikit-learn's descriptions of datasets; scikit-learn is missing")
    files = sorted((Path(spec.origin).parent / "datasets" / "descr").glob("*.rst"))
    return b"\n\0".join(path.read_bytes() for path in files)


def streams(size: int) -> dict[str, Tensor]:
    """Name -> (1, size + 1): the text that is tuned on, and the one that is reported."""
    return {
        "tuning: headers": as_ids(stream_of("headers")[OFFSET : OFFSET + size + 1]),
        "report: reStructuredText": as_ids(rst()[: size + 1]),
    }


def grid() -> list[Row]:
    """All settings that are tried: rate, lr, clip, and whether the demo's protection is on."""
    return [
        {"rate": rate, "lr": lr, "clip": CLIPS[rate], "protected": protected}
        for protected, rates in ((False, RATES), (True, PROTECTED))
        for rate, lrs in rates.items()
        for lr in lrs
    ]


class Model:
    """One model, measured under any setting; its calibrations are made once for each kind of state."""

    def __init__(self, base: nn.Module, held_out: Tensor) -> None:
        self.base, self.held_out = base, held_out
        self.known: dict[str, Any] = {}

    def measure(self, setting: Row, stream: Tensor) -> dict[str, float]:
        """Bits per byte of ``stream``, each byte scored before it is learnt, and of held-out Python afterwards."""
        options: dict[str, Any] = {name: setting[name] for name in ("rate", "lr", "clip")}
        config = dataclasses.replace(CONFIG, **options | ({} if setting["protected"] else DEFENCES))
        model = ttt.adapt_(copy.deepcopy(self.base), config)
        learner = ttt.Learner(model, context=CONTEXT)
        if setting["protected"]:
            if config.rate not in self.known:
                learner.calibrate(calibration_batches())
                self.known[config.rate] = learner.snapshot()
            learner.rollback(self.known[config.rate])
        new = learner.observe(stream).bits
        return {"new_bpb": round(new, 4), "old_bpb": round(bits_per_byte(model, self.held_out), 4)}


def shares(rows: list[Row]) -> None:
    """Give each row its gain over the frozen model's bits, and that as a share of the best of its model and text.

    Protected and unprotected rows have a best of their own.
    """
    frozen = {(r["model"], r["text"]): r["new_bpb"] for r in rows if r["rate"] is None}
    best: dict[tuple, float] = {}
    for r in rows:
        r["gain"] = round(frozen[r["model"], r["text"]] - r["new_bpb"], 4)
        key = r["model"], r["text"], r["protected"]
        best[key] = max(r["gain"], best.get(key, r["gain"]))
    for r in rows:
        r["share"] = None if r["rate"] is None else round(r["gain"] / best[r["model"], r["text"], r["protected"]], 4)


def summary(rows: list[Row]) -> list[Row]:
    """For each setting and text, the share on each model and the smallest, best first; settings tried on all only."""
    found: dict[tuple, Row] = {}
    for r in rows:
        if r["rate"] is None:
            continue
        names = ("text", "protected", "rate", "clip", "lr")
        line = found.setdefault(tuple(r[n] for n in names), {n: r[n] for n in names} | {"shares": {}})
        line["shares"][r["model"]] = r["share"]
    complete = [line for line in found.values() if len(line["shares"]) == len(MODELS)]
    for line in complete:
        line["worst"] = min(line["shares"].values())
    return sorted(complete, key=lambda line: (line["text"], line["protected"], -line["worst"]))


def default(lines: list[Row]) -> Row:
    """Of the settings tried with and without protection, that with the largest smallest share on the tuning text.

    ``tuning`` and ``report``: its shares on each text, by "protected" and "unprotected" and model.
    """
    found: dict[tuple, Row] = {}
    for line in lines:
        one = found.setdefault(tuple(line[n] for n in ("rate", "lr", "clip")), {"tuning": {}, "report": {}})
        one[line["text"].split(":")[0]]["protected" if line["protected"] else "unprotected"] = line["shares"]
    tried = [(key, one) for key, one in found.items() if len(one["tuning"]) == 2]
    if not tried:
        return {}
    key, best = max(tried, key=lambda pair: min(min(shares.values()) for shares in pair[1]["tuning"].values()))
    return dict(zip(("rate", "lr", "clip"), key, strict=True)) | best


def plot(rows: list[Row], path: Path) -> None:
    """Gain on the tuning text against the rate, a panel for each way to scale it, a curve for each model."""
    import matplotlib.pyplot as plt

    shown = [r for r in rows if r["text"].startswith("tuning") and not r["protected"] and r["rate"]]
    figure, axes = plt.subplots(1, len(RATES), figsize=(4.6 * len(RATES), 3.8), sharey=True, constrained_layout=True)
    titles = {"constant": "constant", "rms": "lr / rms gradient", "energy": "lr / mean squared input"}
    for axis, rate in zip(axes, RATES, strict=True):
        for model in MODELS:
            points = sorted((r["lr"], 100 * r["share"]) for r in shown if (r["model"], r["rate"]) == (model, rate))
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=f"C{list(MODELS).index(model)}", label=model)
        axis.set(xscale="log", xlabel="lr", title=titles[rate], ylim=(0, 105))
        axis.set_xticks(RATES[rate], [f"{lr:g}" for lr in RATES[rate]])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("gain, % of the model's best")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _write(found: dict[str, Any], path: Path) -> None:
    """``found`` with what follows from its rows."""
    shares(found["rows"])
    found["summary"] = summary(found["rows"])
    found["default"] = default(found["summary"])
    path.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, default=12288)
    parser.add_argument("--models", default=",".join(MODELS), help="those to measure now; others stay as they are")
    parser.add_argument("--json", type=Path, default=Path("bench/results/demo_transfer.json"))
    args = parser.parse_args()
    console, held_out = Console(width=160), windows(held_out_python(), 8)
    found: dict[str, Any] = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "bytes": args.bytes, "rows": []}
    if args.json.exists():
        before = json.loads(args.json.read_text())
        if before["bytes"] == args.bytes:
            found["rows"] = [r for r in before["rows"] if r["model"] not in args.models.split(",")]
    found |= {"offset": OFFSET, "config": CONFIG.to_dict()}
    for name in args.models.split(","):
        model = Model(load(name, console), held_out)
        for text, stream in streams(args.bytes).items():
            frozen = {"rate": "constant", "lr": 0.0, "clip": None, "protected": False}
            rows = [frozen | model.measure(frozen, stream) | {"rate": None}]
            for setting in grid():
                if text.startswith("report") and setting["rate"] == "energy":  # far behind on the first text
                    continue
                rows.append(setting | model.measure(setting, stream))
                console.print(name, text, rows[-1])
            found["rows"] += [{"model": name, "text": text} | row for row in rows]
            _write(found, args.json)  # every time, so that a run that is cut off leaves what it measured
    plot(found["rows"], args.json.with_suffix(".png"))
    for line in found["summary"]:
        console.print(line)
    console.print("default:", found["default"])


if __name__ == "__main__":
    main()
