"""``python -m bench.learning.pretrain --layer NAME``: train a byte-level model of one kind of layer, and measure it.

The models have about 4 million parameters, and read the same text in the same order: the sources of Python's standard
library in pieces of 512 bytes, with the optimiser of `bench.learning.experiments.pretrain`. Measured are bits per byte
of held-out files by position, up to 16 times the length of training; bytes per second in decoding; and the bytes of
the state. The results of all layers are in one JSON file, where a run replaces those of its layer.

With ``--saved FOLDER`` a model that ``--out FOLDER`` saved is measured anew; ``trained`` of its row is then the machine
and the command of its training.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.learning.experiments.pretrain import new_model, training
from bench.machine import provenance
from ttt.demo.model import CONTEXT, LN2, as_ids
from ttt.demo.text import HELD_OUT, held_out_python, training_python
from ttt.learn.huggingface import cache_of, cached

RESULTS = Path(__file__).parent / "results" / "pretrain.json"
LAYERS: dict[str, Any] = {
    "ttt-linear": "ttt-linear",
    "ttt-mlp": "ttt-mlp",
    "gated-delta": "gated-delta",
    "hybrid": ["gated-delta", "window", "gated-delta", "window", "gated-delta"],
    "hybrid-linear": ["ttt-linear", "window", "ttt-linear", "window", "ttt-linear"],
    "llama": None,
}
RANGES = ((0, 512), (512, 2048), (2048, 8192))
TEXTS = 4
"""Held-out texts of 8192 bytes."""
PROMPT, DECODED = 2048, 64
"""Bytes that are read before decoding is timed, and bytes that are decoded."""

app = typer.Typer(add_completion=False)


def model_of(layer: str) -> torch.nn.Module:
    """A model of 5 blocks, 256 wide; the MLPs' width makes the numbers of parameters nearly equal.

    Raises:
        ValueError: for an unknown ``layer``.
    """
    if layer not in LAYERS:
        raise ValueError(f"layer must be one of {', '.join(LAYERS)}, got {layer!r}")
    if layer == "llama":
        return new_model()
    from ttt.sequence_models import TTTSequenceConfig, TTTSequenceForCausalLM

    # A sequence layer has five projections where attention has four; TTT-MLP's first weights count too.
    inner = {"ttt-mlp": 512, "hybrid": 720, "hybrid-linear": 720}.get(layer, 672)
    config = TTTSequenceConfig(
        vocab_size=256, hidden_size=256, intermediate_size=inner, num_hidden_layers=5, num_attention_heads=4,
        mixers=LAYERS[layer], window=256,
    )  # fmt: skip
    return TTTSequenceForCausalLM(config)


def train(model: torch.nn.Module, steps: int, batch: int, minutes: float, seed: int = 0) -> dict[str, Any]:
    """Train for ``steps`` steps of ``batch`` pieces, or for ``minutes``, whichever ends first; returns what was done.

    The rate rises for 20 steps and falls linearly to 0 at ``steps``.
    """
    data = as_ids(training_python())[0]
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n and n.endswith("proj.weight")]
    model.train()
    start, cpu, mean, done = time.time(), time.process_time(), 0.0, 0
    for mean in training(model, data, matrices, steps, batch, warm_up=20, generator=generator):
        done += 1
        if done % 20 == 0:
            print(f"step {done}, {mean:.3f} bits per byte, {time.time() - start:.0f} s", flush=True)
        if time.time() - start > 60 * minutes:
            break
    return {
        "steps": done, "steps_planned": steps, "batch": batch, "bytes_read": done * batch * CONTEXT, "seed": seed,
        "minutes_allowed": minutes, "cpu_seconds": round(time.process_time() - cpu, 1),
        "train_bpb": round(mean, 4),
    }  # fmt: skip


@torch.no_grad()
def by_position(model: torch.nn.Module) -> dict[str, float]:
    """Mean bits per byte of held-out texts in each of `RANGES`; every text is read from an empty context, in pieces."""
    data, longest = as_ids(held_out_python())[0], RANGES[-1][1]
    starts = torch.linspace(0, len(data) - longest - 1, TEXTS).long().tolist()
    losses = []
    for start in starts:
        ids, cache, parts = data[start : start + longest + 1].unsqueeze(0), None, []
        for at in range(0, longest, 2048):
            end = min(longest, at + 2048)
            out: Any = model(input_ids=ids[:, at:end], **cached(model, cache))
            cache = cache_of(out)
            targets = ids[0, at + 1 : end + 1]
            parts.append(torch.nn.functional.cross_entropy(out.logits[0].float(), targets, reduction="none") / LN2)
        losses.append(torch.cat(parts))
    mean = torch.stack(losses).mean(0)
    return {f"{a}-{b}": round(float(mean[a:b].mean()), 4) for a, b in RANGES}


@torch.no_grad()
def decoding(model: torch.nn.Module) -> dict[str, float]:
    """Bytes per second of greedy decoding after `PROMPT` bytes, the best of 3, and the bytes of the state there."""
    prompt, tokens = PROMPT, DECODED
    ids = as_ids(held_out_python())[:, : prompt + 1]
    best = float("inf")
    size = 0
    for _ in range(3):
        out: Any = model(input_ids=ids[:, :prompt], **cached(model, None))
        cache, token = cache_of(out), out.logits[:, -1:].argmax(-1)
        size = _cache_bytes(cache)
        start = time.perf_counter()
        for _ in range(tokens):
            out = model(input_ids=token, **cached(model, cache))
            cache, token = cache_of(out), out.logits[:, -1:].argmax(-1)
        best = min(best, time.perf_counter() - start)
    return {"prompt": prompt, "bytes_per_second": round(tokens / best, 1), "state_bytes": size}


def _kind(config: dict[str, Any]) -> tuple[Any, Any]:
    return config["model_type"], config.get("mixers")


def _cache_bytes(cache: Any) -> int:
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


@app.command()
def main(
    layer: Annotated[str, typer.Option(help=f"One of {', '.join(LAYERS)}.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 1500,
    batch: Annotated[int, typer.Option(min=1, help="Pieces of 512 bytes in each step.")] = 8,
    minutes: Annotated[float, typer.Option(help="Training stops after this time, if not all steps are done.")] = 40.0,
    seed: Annotated[int, typer.Option(help="Of the first weights and the order of the text.")] = 0,
    json_file: Annotated[Path, typer.Option("--json", help="The file of results.")] = RESULTS,
    out: Annotated[Path | None, typer.Option(help="Folder to save the model in.")] = None,
    saved: Annotated[Path | None, typer.Option(help="Folder of a model from an earlier run, to measure anew.")] = None,
) -> None:
    """Train a byte-level model of one kind of layer, measure it, and add it to the results."""
    torch.manual_seed(seed)
    try:
        model = model_of(layer)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    found = json.loads(json_file.read_text()) if json_file.exists() else {}
    rows = {r["layer"]: r for r in found.get("rows", [])}
    if saved is None:
        row: dict[str, Any] = {"layer": layer, "parameters": sum(p.numel() for p in model.parameters())}
        row |= train(model, steps, batch, minutes, seed)
    elif layer in rows:
        wanted: Any = model.config
        kind, held = _kind(wanted.to_dict()), _kind(json.loads((saved / "config.json").read_text()))
        if kind != held:
            raise typer.BadParameter(f"saved must hold a model of layer {layer!r}, {kind}, it holds {held}")
        model, row = type(model).from_pretrained(saved), dict(rows[layer])  # type: ignore[attr-defined]
        row.setdefault("trained", row["machine"])
    else:
        raise typer.BadParameter(f"{json_file} must hold the row of layer {layer!r} for saved, it has {list(rows)}")
    model.eval()
    row |= {"held_out_bpb": by_position(model), "decode": decoding(model), "machine": provenance("cpu")}
    rows[layer] = row
    about = {"held_out": HELD_OUT, "texts": TEXTS, "context": CONTEXT}
    found = {"about": about, "rows": [rows[name] for name in LAYERS if name in rows]}
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(row))
    if out is not None:
        model.save_pretrained(out)  # type: ignore[operator]


if __name__ == "__main__":
    app()
