"""Train the demo model: a byte-level Llama, on the sources of Python's standard library.

    python -m bench.learning.experiments.pretrain --steps 2000
    python -m bench.learning.experiments.pretrain --steps 600 --hidden 128 --layers 4 --out build/models/128x4

It writes weights (safetensors in bfloat16), configuration and training log to ``bench/learning/byte_model``, or to
``--out``. Hidden matrices are trained with Muon (Jordan et al. 2024: momentum, orthogonalised by a Newton-Schulz
iteration), all other parameters with AdamW; both rates fall linearly to zero.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from ttt.demo.model import CONTEXT, LN2, WEIGHTS, as_ids, bits_per_byte, windows
from ttt.demo.text import HELD_OUT, held_out_python, training_python
from ttt.ops.sequence.large_chunk import newton_schulz

HIDDEN, LAYERS = 256, 5  # of the demo model: 4.4 M parameters


def new_model(hidden: int = HIDDEN, layers: int = LAYERS) -> torch.nn.Module:
    """A byte-level `LlamaForCausalLM` with random weights, 64 features per head and MLPs of width 3 ``hidden``.

    Raises:
        ValueError: if ``hidden`` is not a multiple of 64, or ``layers`` is less than 1.
    """
    if hidden < 64 or hidden % 64:
        raise ValueError(f"hidden must be a multiple of 64, got {hidden}")
    if layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers}")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


class Muon(torch.optim.Optimizer):
    """Muon in float32; `torch.optim.Muon` iterates in bfloat16, which is slow on most CPUs.

    Matrices of one shape are orthogonalised together, in batched products.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for (rows, cols), params in by_shape.items():
                updates = []
                for p in params:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]))
                ortho = newton_schulz(torch.stack(updates))
                scale = group["lr"] * max(1.0, rows / cols) ** 0.5
                for p, u in zip(params, ortho, strict=True):
                    p.add_(u, alpha=-scale)


def training(
    model: torch.nn.Module,
    data: torch.Tensor,
    matrices: Collection[torch.nn.Parameter],
    steps: int,
    batch: int,
    *,
    warm_up: int,
    peak: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[float]:
    """Train ``model``, a step at a time, on ``batch`` pieces of ``data`` (N,), `CONTEXT` bytes each, drawn at random.

    The rates rise for ``warm_up`` steps and fall linearly to 0 at ``steps``.

    Args:
        matrices: parameters that are trained with Muon; all others are with AdamW.
        peak: highest learning rate, as a share of the full one.

    Yields:
        After each step, the mean loss of about the last ``warm_up`` steps, in bits per byte.
    """
    chosen = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)]
    base_rates = [[g["lr"] for g in o.param_groups] for o in optimizers]
    mean = 0.0
    for step in range(steps):
        rate = peak * min(1.0, (step + 1) / warm_up) * (1 - step / steps)
        for optimizer, rates in zip(optimizers, base_rates, strict=True):
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * rate
        at = torch.randint(len(data) - CONTEXT, (batch,), generator=generator).tolist()
        ids = torch.stack([data[s : s + CONTEXT] for s in at])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        mean += (float(loss.detach()) / LN2 - mean) / (min(step, warm_up - 1) + 1)
        yield mean


def train(
    steps: int,
    batch: int,
    out: Path,
    seed: int = 0,
    resume: bool = False,
    peak: float = 1.0,
    hidden: int = HIDDEN,
    layers: int = LAYERS,
) -> None:
    """Train for ``steps`` steps of ``batch`` sequences, and write the model to ``out`` every 100 steps.

    Args:
        resume: continue from the weights in ``out``.
        peak: highest learning rate, as a share of the full one.
    """
    torch.manual_seed(seed)
    data, held_out = as_ids(training_python())[0], windows(held_out_python(), 64)
    command = f"python -m bench.learning.experiments.pretrain --steps {steps} --batch {batch} --seed {seed}"
    if (hidden, layers) != (HIDDEN, LAYERS):
        command += f" --hidden {hidden} --layers {layers}"
    if resume:
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32, local_files_only=True).train()
        before = json.loads((out / "training_log.json").read_text())
        commands, log = [*before["commands"], f"{command} --resume --peak {peak}"], before["log"]
    else:
        model, commands, log = new_model(hidden, layers), [command], []
    done = log[-1]["step"] if log else 0
    spent = log[-1]["seconds"] if log else 0
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    start = time.time() - spent
    summary = {
        "commands": commands,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "training_bytes": len(data),
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out": HELD_OUT,
    }
    for step, mean in enumerate(training(model, data, matrices, steps, batch, warm_up=50, peak=peak)):
        if step % 100 == 99 or step == steps - 1:
            model.eval()
            row = {"step": done + step + 1, "bytes": (done + step + 1) * batch * CONTEXT}
            row["seconds"] = round(time.time() - start)
            row |= {"train_bpb": round(mean, 4), "held_out_bpb": round(bits_per_byte(model, held_out), 4)}
            model.train()
            log.append(row)
            print(json.dumps(row), flush=True)
            summary["log"] = log
            _save(model, summary, out)  # every time, so that an interrupted run leaves a usable model


def _save(model: torch.nn.Module, summary: dict, out: Path) -> None:
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    (out / "training_log.json").write_text(json.dumps(summary, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=8, help="sequences of 512 bytes per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="width, a multiple of 64")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--resume", action="store_true", help="go on from the weights in --out")
    parser.add_argument("--peak", type=float, default=1.0, help="highest rate, as a share of the full one")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train(args.steps, args.batch, args.out, args.seed, args.resume, args.peak, args.hidden, args.layers)


if __name__ == "__main__":
    main()
