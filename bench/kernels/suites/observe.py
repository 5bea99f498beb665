"""Suite ``observe``: a whole model that reads a text and learns from it, beside one that only reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import ttt
from bench.kernels import models
from bench.kernels.case import Case
from bench.kernels.contender import Contender
from bench.kernels.state import LEARNS
from ttt.demo.model import CONFIG
from ttt.learn.huggingface import cache_of, cached

QUARTER = "down_proj, last quarter"
DEFAULTS = "the demo's layers and rates"
LLAMA = "llama 12x768"


@dataclasses.dataclass(frozen=True)
class Observe(Case):
    """Read ``text`` tokens in chunks of ``chunk``, with a KV cache; times are per token.

    ``adapted`` says which layers learn: `QUARTER` (``down_proj`` of the last quarter of the blocks), `DEFAULTS` (the
    demo's), or "last k" (``down_proj`` of the last k blocks).
    """

    suite = "observe"
    unit = "token"
    ours = "observe"
    baseline = forward = "forward"

    model: str
    chunk: int
    text: int
    adapted: str = QUARTER

    @property
    def name(self) -> str:
        model = "demo model" if self.model == "demo" else self.model
        adapted = "" if self.adapted == QUARTER else f", {self.adapted}"
        return f"{model}{adapted}, chunks of {self.chunk}"

    @property
    def ceiling(self) -> str | None:
        return None

    def bytes(self, contender: str) -> int | None:
        """For the forward pass the model's matrices, once per chunk; not counted for the others."""
        model = models.frozen(self.model, self.device, self.dtype)
        size = getattr(torch, self.dtype).itemsize
        return models.parameters_of(model) * size // self.chunk if contender == "forward" else None

    def flops(self, contender: str) -> int | None:
        model = models.frozen(self.model, self.device, self.dtype)
        return 2 * models.parameters_of(model) if contender == "forward" else None

    def ceilings(self) -> dict[str, Callable[[], Contender]]:
        return {}

    def config(self) -> ttt.TTTConfig:
        """The demo's configuration for `DEFAULTS`, otherwise the options of `bench.kernels.state.LEARNS`."""
        if self.adapted == DEFAULTS:
            return dataclasses.replace(CONFIG, chunk=self.chunk)
        layers = "last:0.25" if self.adapted == QUARTER else self.adapted.replace(" ", ":")
        return dataclasses.replace(LEARNS, target_modules=["down_proj"], layers=layers, chunk=self.chunk)

    def reader(self) -> Callable[[], Tensor]:
        """A function that returns (text,) losses in nats, as `ttt.Learner.observe` does where nothing is learnt."""
        ids = models.tokens(self.model, self.text + 1, self.device)
        base = models.frozen(self.model, self.device, self.dtype)

        @torch.no_grad()
        def read() -> Tensor:
            out = []
            for start in range(0, self.text, models.CONTEXT):
                cache = None
                for at in range(start, min(start + models.CONTEXT, self.text), self.chunk):
                    end = min(at + self.chunk, start + models.CONTEXT, self.text)
                    step = base(input_ids=ids[:, at:end], **cached(base, cache))
                    cache = cache_of(step)
                    out.append(cross_entropy(step.logits[0].float(), ids[0, at + 1 : end + 1], reduction="none"))
            return torch.cat(out)

        return read

    def contenders(self) -> dict[str, Callable[[], Contender]]:
        def observe(captured: bool = False) -> Contender:
            ids = models.tokens(self.model, self.text + 1, self.device)
            model = models.load(self.model, self.device, self.dtype)
            ttt.adapt_(model, self.config())
            learner = ttt.Learner(model, context=models.CONTEXT)
            known = models.tokens(self.model, 512, self.device, skip=self.text + 1)
            learner.calibrate(list(known.view(4, 128).split(2)))

            reader: Any = ttt.GraphedLearner(learner, chunk=self.chunk) if captured else learner
            users = {} if learner.pool is None else {"users": ["user"]}

            def check() -> None:
                """The first chunk must score as in the frozen model, and the text better at the second reading."""
                first, chunk = reader.observe(ids, **users), slice(0, min(self.chunk, self.text))
                error = float((first.nll[0, chunk] - self.reader()()[chunk]).abs().mean())
                if not error <= (1e-3 if self.dtype == "float32" else 0.05):
                    raise AssertionError(f"the first chunk's losses differ from the frozen model's by {error:.2e} nats")
                second = reader.observe(ids, **users)
                rejected = first.rejected + second.rejected
                if rejected or not second.bits < first.bits:
                    raise AssertionError(f"{first.bits} bits, then {second.bits}; {rejected} chunks rejected")
                learner.reset()

            layers = learner.access.layers
            state = sum(t.nbytes for layer in layers for name, t in layer.state_dict().items() if name != "weight")
            fields = {"adapted_layers": len(layers), "state_bytes": state}
            return contender_of(lambda: reader.observe(ids, **users), self.text, check, fields)

        found: dict[str, Callable[[], Contender]] = {"observe": observe}
        if self.device == "cuda":
            found["observe, captured"] = lambda: observe(captured=True)
        return found | {"forward": lambda: contender_of(self.reader(), self.text)}


def contender_of(
    run: Callable[[], object],
    tokens: int,
    check: Callable[[], None] = lambda: None,
    fields: dict[str, Any] | None = None,
) -> Contender:
    """What reads ``tokens`` tokens in each ``run``; the host waits within it, so that no CUDA graph can hold it."""
    return Contender(run, check, units=tokens, fields=fields or {}, graph=False)


def cases(device: str) -> list[Case]:
    """Chunks of 16, 64 and 128: the demo model, and a Llama of 134 M parameters."""
    big = "bfloat16" if device == "cuda" else "float32"
    found = [Observe(device, "float32", "demo", chunk, 512, quick=chunk == 64) for chunk in (16, 64, 128)]
    found += [Observe(device, "float32", "demo", chunk, 512, DEFAULTS) for chunk in (64, 128)]
    return [*found, *(Observe(device, big, LLAMA, chunk, 256) for chunk in (16, 64, 128))]
