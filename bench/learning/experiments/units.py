"""``python -m bench.learning.experiments.units``: does one learning rate serve a model written in other units?

SmolLM2 reads French manual pages in three forms that compute the same function:

* plain: as it is;
* scaled inputs: the inputs of each ``down_proj`` are multiplied by random factors exp(1.5 z), its weights divided by
  them;
* normalised outputs: that, and each ``down_proj`` has other scales of its outputs, from 1e-4 to 1e3 from layer to
  layer, behind which stands a normalisation, as in models that normalise the output of every MLP. Its radius is that of
  the frozen weights, so that the function is the same before learning.

Learning is compared under the rates in several units, with the soft projection. Writes
``bench/learning/results/language_units.json``.
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
from bench.learning.language.base import CONTEXT, Base, segments, smollm
from bench.learning.language.measures import divergence
from bench.learning.language.methods import CONFIG
from bench.learning.language.readers import Learning
from bench.learning.language.texts import TUNING
from bench.machine import machine
from ttt.demo.knowledge import loss

RESULTS = Path("bench/learning/results/language_units.json")
FORMS = ("plain", "scaled inputs", "normalised outputs")
SETTINGS: tuple[dict[str, Any], ...] = (
    {"rate": "decrease", "lr": 0.5}, {"rate": "decrease", "lr": 0.5, "feedback": 0.0},
    {"rate": "decrease", "lr": 0.3}, {"rate": "rms", "lr": 0.02, "feedback": 0.0},
)  # fmt: skip


class Normalised(nn.Module):
    """A linear layer without bias in other units, a normalisation of its output, and factors that undo the units."""

    def __init__(self, linear: nn.Linear, scale: Tensor) -> None:
        super().__init__()
        self.down_proj = linear
        self.register_buffer("frozen", linear.weight.detach().clone())
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down_proj(x)
        with torch.no_grad():
            radius = nn.functional.linear(x, self.get_buffer("frozen")).norm(dim=-1, keepdim=True)
        tiny = torch.finfo(y.dtype).tiny
        return y * (radius / y.norm(dim=-1, keepdim=True).clamp_min(tiny)) / self.get_buffer("scale")


@torch.no_grad()
def rewritten(model: Any, form: str) -> Any:
    """A copy of ``model`` in one of `FORMS`. It computes the same function, but for rounding."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    blocks = model.model.layers
    for at, block in enumerate(blocks[-(-3 * len(blocks) // 4) :]):
        mlp = block.mlp
        if form == "plain":
            continue
        factor = torch.exp(1.5 * torch.randn(mlp.up_proj.out_features, generator=generator))
        mlp.up_proj.weight.mul_(factor.unsqueeze(1))
        mlp.down_proj.weight.div_(factor)
        if form == "normalised outputs":
            scale = torch.exp(torch.randn(mlp.down_proj.out_features, generator=generator)) * 10.0 ** (at - 4)
            mlp.down_proj.weight.mul_(scale.unsqueeze(1))
            mlp.down_proj = Normalised(mlp.down_proj, scale)
    return model


def measure(base: Base, form: str, setting: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """What one form of the model gains, and how far it drifts, in nats per token."""
    model = rewritten(base.model, form)
    frozen = torch.cat([loss(model, segment) for segment in segments(ids)])
    learner = ttt.Learner(ttt.adapt_(model, dataclasses.replace(CONFIG, **setting)), context=CONTEXT)
    learner.calibrate(base.own.split(1))
    reader = Learning(learner)
    learnt = torch.cat([reader.read(segment) for segment in segments(ids)])
    drift = divergence(model, base.general, base.model.get_output_embeddings(), base.frozen_hidden)
    gain = float((frozen - learnt).double().mean())
    return {"form": form, **setting, "gain": round(gain, 4), "kl": round(float(drift.double().mean()), 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="tokens to read")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file to write")
    args = parser.parse_args()
    base, console = smollm(), Console()
    ids, rows = base.tokens(TUNING, args.tokens, 0), []
    for form in FORMS:
        for setting in SETTINGS:
            rows.append(measure(base, form, setting, ids))
            console.print(rows[-1])
    found = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "text": TUNING, "tokens": args.tokens}
    args.json.write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
