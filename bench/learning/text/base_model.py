"""The base model that all runs of a process share, and its calibrations."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import ttt
from bench.learning.text.readers import Reader
from ttt.defences import SWITCHES
from ttt.demo.model import COMBINED, CONTEXT, as_ids, calibration_batches, load_model, new_learner, windows
from ttt.demo.text import held_out_python, training_python
from ttt.nn.state import BASE
from ttt.rules import StreamRule

OLD_WINDOWS = 32

# Options that do not change what calibration measures, at fixed values.
_STRENGTHS: dict[str, Any] = {"lr": 0.02, "clip": 3.0, "replay_beta": 0.1, "distill_rows": 0, "seed": 0}


class BaseModel:
    """A model that is not adapted, from which the runs of a process make their learners.

    Learners whose configurations differ only in strengths share one calibration.

    Args:
        model: a causal language model of bytes, not adapted.
        config: which of its layers learn, and how; a method changes a part of it.
        known: text that the model was trained on.
        batches: windows (N, T) of ``known``, for calibration.
        old: (N, T), windows of text of the same kind that the model was not trained on; forgetting is measured there.
    """

    def __init__(
        self, model: nn.Module, config: ttt.TTTConfig, known: bytes, batches: list[Tensor], old: Tensor
    ) -> None:
        self.model, self.config, self.known, self.batches, self.old = model, config, known, batches, old
        self.frozen = Reader(model)
        self._calibrated: dict[ttt.TTTConfig, nn.Module] = {}

    @functools.cached_property
    def parameters(self) -> int:
        """Number of weights that learn under ``config``, by which the bytes of state are divided."""
        return ttt.memory_usage(ttt.adapt_(copy.deepcopy(self.model), self.config)).parameters

    def known_rows(self, count: int, seed: int) -> Tensor:
        """(count, CONTEXT + 1) int64: random rows of ``known``."""
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(self.known) - CONTEXT, (count,), generator=generator)
        return torch.cat([as_ids(self.known[s : s + CONTEXT + 1]) for s in starts.tolist()])

    def learner(self, config: ttt.TTTConfig, rules: Sequence[StreamRule] = ()) -> ttt.Learner:
        """A new learner, calibrated if ``config`` needs that."""
        if config.kronecker:  # factors of another size, and a rate whose unit calibration measures
            return new_learner(self.model, config, self.batches, rules=rules)
        model = ttt.adapt_(copy.deepcopy(self.model), config)
        if config.calibrates:
            source = self._calibrated_under(config)
            for (_, layer), (_, other) in zip(ttt.learning_layers(model), ttt.learning_layers(source), strict=True):
                # The anchor stays the base model's (SI moved the source's), and a basis may have another size.
                for name in set(BASE) - {"anchor", "basis"}:
                    if (tensor := getattr(layer, name)) is not None:
                        tensor.copy_(getattr(other, name))
                layer.refresh_basis()
        return ttt.Learner(model, context=CONTEXT, rules=rules)

    def _calibrated_under(self, config: ttt.TTTConfig) -> nn.Module:
        """A model calibrated with ``config``; configurations that differ only in strengths share one."""
        used = {name: int(getattr(config, name) > 0) for name in SWITCHES}
        config = config.with_flat(**{**_STRENGTHS, **used})
        if config not in self._calibrated:
            if config.importance == "si":
                # Importance by SI belongs to a path of learning: here that of reading the text once without protection.
                learner = ttt.Learner(ttt.adapt_(copy.deepcopy(self.model), config), context=CONTEXT)
                for row in torch.cat(self.batches).split(1):
                    learner.observe(row)
                learner.consolidate()
            else:
                learner = new_learner(self.model, config, self.batches)
            self._calibrated[config] = learner.model
        return self._calibrated[config]


@functools.cache
def demo_base(*, tuning: bool = False) -> BaseModel:
    """The demo model."""
    model, _ = load_model()
    return BaseModel(model, COMBINED, training_python(), calibration_batches(), old_windows(tuning=tuning))


def old_windows(*, tuning: bool) -> Tensor:
    """(OLD_WINDOWS, CONTEXT) int64 of the Python modules that the demo model was not trained on.

    For tuning there is one window less; each lies halfway between two of the others.
    """
    data = held_out_python()
    return windows(data, 2 * OLD_WINDOWS - 1)[1::2] if tuning else windows(data, OLD_WINDOWS)
