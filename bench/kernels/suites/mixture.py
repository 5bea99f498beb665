"""Suite ``mixture``: a mixture of experts all of whose experts learn from text, beside one that only reads."""

from __future__ import annotations

import dataclasses

import ttt
from bench.kernels import models
from bench.kernels.case import Case
from bench.kernels.suites.observe import Observe


@dataclasses.dataclass(frozen=True)
class Mixture(Observe):
    """As `Observe`, with the package's own rates, for experts without protection."""

    suite = "mixture"

    adapted: str = "experts"

    def config(self) -> ttt.TTTConfig:
        return ttt.TTTConfig(target_modules=["experts"], protect=[], chunk=self.chunk)


def cases(device: str) -> list[Case]:
    """Chunks of 1, 16 and 64."""
    return [Mixture(device, "float32", models.MIXTURE, chunk, 128) for chunk in (1, 16, 64)]
