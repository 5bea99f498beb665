"""Suite ``language``: real language models that read text and learn from it, beside ones that only read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import ttt
from bench.kernels import models
from bench.kernels.case import Case
from bench.kernels.contender import Contender
from bench.kernels.suites.observe import Observe, contender_of
from ttt.conversation import CONVERSATION

SMOLLM, LARGE = models.SMOLLM, "llama 22x2048"
ONE, USER, TOLD = "one set of weights", "a user's weights", "a user's weights, as in conversations"
CONFIGS = {
    ONE: ttt.TTTConfig(target_modules=["down_proj"], layers="last:0.25"),
    USER: ttt.TTTConfig(target_modules=["down_proj"], layers="last:0.25", per_user=ttt.LowRank(slots=1)),
    TOLD: CONVERSATION,
}
"""What learns: the package's default, the same with weights for each user, and what `ttt serve` does."""


@dataclasses.dataclass(frozen=True)
class Language(Observe):
    """As `Observe`, with the package's own settings: ``adapted`` is a key of `CONFIGS`."""

    suite = "language"

    adapted: str = ONE

    @property
    def name(self) -> str:
        return f"{self.model}, {self.adapted}, chunks of {self.chunk}"

    def config(self) -> ttt.TTTConfig:
        return dataclasses.replace(CONFIGS[self.adapted], chunk=self.chunk)

    def contenders(self) -> dict[str, Callable[[], Contender]]:
        found = super().contenders()
        # What a forward pass of the whole text at once takes: reading in chunks alone is slower than that.
        whole = dataclasses.replace(self, chunk=self.text)
        return found | {"forward, whole text": lambda: contender_of(whole.reader(), self.text)}


def cases(device: str) -> list[Case]:
    """SmolLM2 in two dtypes and chunks of 16, 64 and 256; weights for a user; a Llama of 1.1 B parameters."""
    found: list[Case] = [
        Language(device, dtype, SMOLLM, chunk, 256) for dtype in ("float32", "bfloat16") for chunk in (16, 64, 256)
    ]
    found += [Language(device, "float32", SMOLLM, 64, 256, adapted) for adapted in (USER, TOLD)]
    return [*found, *(Language(device, dtype, LARGE, 64, 128) for dtype in ("float32", "bfloat16"))]
