"""Suite ``generate``: generate text and learn from it every 16 tokens, beside generation without learning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

import ttt
from bench.kernels import models
from bench.kernels.case import Case
from bench.kernels.contender import Contender
from bench.kernels.state import LEARNS
from bench.kernels.suites.observe import LLAMA
from ttt.learn.huggingface import cache_of, cached


@dataclasses.dataclass(frozen=True)
class Generate(Case):
    """Generate ``new`` tokens greedily after a prompt of ``prompt`` tokens, with a KV cache; times are per new token.

    The ``down_proj`` layers of the last quarter of the blocks learn from the generated text, with the options of
    `bench.kernels.state.LEARNS`.
    """

    suite = "generate"
    unit = "token"
    ours = "ttt"
    baseline = forward = "plain generation"

    model: str
    prompt: int
    new: int
    learn_every: int

    @property
    def name(self) -> str:
        model = "demo model" if self.model == "demo" else self.model
        return f"{model}, {self.new} tokens, learning every {self.learn_every}"

    @property
    def ceiling(self) -> str | None:
        return None

    def bytes(self, contender: str) -> int | None:
        """For plain generation the model's matrices; not counted for the others."""
        parameters = models.parameters_of(models.frozen(self.model, self.device, self.dtype))
        return parameters * getattr(torch, self.dtype).itemsize if contender == "plain generation" else None

    def flops(self, contender: str) -> int | None:
        parameters = models.parameters_of(models.frozen(self.model, self.device, self.dtype))
        return 2 * parameters if contender == "plain generation" else None

    def ceilings(self) -> dict[str, Callable[[], Contender]]:
        return {}

    def contenders(self) -> dict[str, Callable[[], Contender]]:
        ids = models.tokens(self.model, self.prompt, self.device)

        @torch.no_grad()
        def plain() -> Tensor:
            """(1, prompt + new)."""
            base = models.frozen(self.model, self.device, self.dtype)
            out, cache, now = [ids], None, ids
            for _ in range(self.new):
                step = base(input_ids=now, **cached(base, cache))
                cache = cache_of(step)
                now = step.logits[:, -1:].argmax(-1)
                out.append(now)
            return torch.cat(out, 1)

        def ours() -> Contender:
            model = models.load(self.model, self.device, self.dtype)
            ttt.adapt_(model, dataclasses.replace(LEARNS, target_modules=["down_proj"], layers="last:0.25"))
            learner = ttt.Learner(model, context=models.CONTEXT)
            known = models.tokens(self.model, 512, self.device, skip=self.prompt)
            learner.calibrate(list(known.view(4, 128).split(2)))

            def generate() -> Tensor:
                written = learner.generate(  # type: ignore[attr-defined]
                    ids, max_new_tokens=self.new, learn_every=self.learn_every, learn_prompt=False, learn_output=True
                )
                return written.sequences

            def check() -> None:
                """The text up to the first learning step must be the frozen model's; then the weights must change."""
                got = generate()
                if got.shape != (1, self.prompt + self.new):
                    raise AssertionError(f"generate gave {tuple(got.shape)}")
                same = self.prompt + min(self.learn_every, self.new)
                if not torch.equal(got[:, :same], plain()[:, :same]):
                    raise AssertionError("the first tokens differ from the frozen model's")
                if all(torch.equal(layer.effective_weight(), layer.base_weight) for layer in learner.layers):
                    raise AssertionError("nothing was learnt")
                learner.reset()

            return Contender(generate, check, units=self.new, graph=False)

        return {"ttt": ours, "plain generation": lambda: Contender(plain, lambda: None, units=self.new, graph=False)}


def cases(device: str) -> list[Case]:
    """The demo model, and a Llama of 134 M parameters."""
    big = "bfloat16" if device == "cuda" else "float32"
    return [Generate(device, "float32", "demo", 64, 64, 16, quick=True), Generate(device, big, LLAMA, 64, 32, 16)]
