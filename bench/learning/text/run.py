"""One run of the text suite: a method reads a stream of bytes, is scored on each before it learns, and tested after."""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import ttt
from bench.learning import metrics
from bench.learning.text.readers import Learning, Reader
from bench.learning.text.streams import Stream, held_out, stream
from bench.learning.text.methods import Options, TextMethod, method
from ttt.config import DEFENCES
from ttt.demo import text as texts
from ttt.demo.model import CONTEXT, LN2, as_ids, load_model, windows
from ttt.demo.run import calibration_batches
from ttt.nn.directions import refresh
from ttt.nn.state import BASE

OLD_WINDOWS = 32
TIMED = 4  # of each so many pieces one is read by the frozen model, too

# What importance, replay memory and the rest of `BASE`, once measured, do not depend on.
_STRENGTHS: dict[str, Any] = {"lr": 0.02, "clip": 3.0, "replay_beta": 0.1, "distill_rows": 0, "seed": 0}


class Lab:
    """What the runs of a process share: the base model, and what was measured of it.

    Args:
        model: a causal language model of bytes, not adapted.
        config: which of its layers learn, and how, but for what a method changes.
        known: text that the model was trained on.
        batches: windows (N, T) of it, for calibration.
        old: (N, T) windows of text of that kind, that it was not trained on; what learning costs is measured there.
    """

    def __init__(
        self, model: nn.Module, config: ttt.TTTConfig, known: bytes, batches: list[Tensor], old: Tensor
    ) -> None:
        self.model, self.config, self.known, self.batches, self.old = model, config, known, batches, old
        self.frozen = Reader(model)
        self._calibrated: dict[ttt.TTTConfig, nn.Module] = {}

    @functools.cached_property
    def parameters(self) -> int:
        """Weights that learn under ``config``: what state is counted for."""
        return ttt.memory(ttt.adapt_(copy.deepcopy(self.model), self.config)).parameters

    def base_rows(self, count: int, seed: int) -> Tensor:
        """(count, CONTEXT + 1) int64: random rows of ``known``."""
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(self.known) - CONTEXT, (count,), generator=generator)
        return torch.cat([as_ids(self.known[s : s + CONTEXT + 1]) for s in starts.tolist()])

    def learner(self, found: TextMethod, options: Options, seed: int) -> ttt.Learner:
        """A learner that has read nothing, calibrated if it protects anything."""
        config = found.config(self.config, options, seed)
        model = ttt.adapt_(copy.deepcopy(self.model), config)
        if config.calibrates:
            source = self._calibrated_under(config)
            for (_, layer), (_, other) in zip(ttt.learning_layers(model), ttt.learning_layers(source), strict=True):
                # The anchor stays the base model's (SI moved the source's), and a basis has its own size.
                for name in set(BASE) - {"anchor", "basis"}:
                    if (held := getattr(layer, name)) is not None:
                        held.copy_(getattr(other, name))
                refresh(layer)
        rules = [rule(options, seed, torch.cat(self.batches)) for rule in found.rules]
        return ttt.Learner(model, context=CONTEXT, rules=rules)

    def _calibrated_under(self, config: ttt.TTTConfig) -> nn.Module:
        used = {name: int(getattr(config, name) > 0) for name in DEFENCES}
        config = dataclasses.replace(config, **{**_STRENGTHS, **used})
        if config not in self._calibrated:
            model = ttt.adapt_(copy.deepcopy(self.model), config)
            learner = ttt.Learner(model, context=CONTEXT)
            if config.importance == "si":
                # Its importance is a path's, not a point's: that of reading the text once, without protection.
                for row in torch.cat(self.batches).split(1):
                    learner.observe(row)
                learner.consolidate()
            else:
                learner.calibrate(self.batches)
            self._calibrated[config] = model
        return self._calibrated[config]


@functools.cache
def demo_lab(*, tuning: bool = False) -> Lab:
    """The demo model."""
    model, config = load_model()
    return Lab(model, config, texts.training_python(), calibration_batches(), old_windows(tuning=tuning))


def old_windows(*, tuning: bool) -> Tensor:
    """(OLD_WINDOWS, CONTEXT) int64 of the Python modules that the demo model never saw; for tuning one less, others."""
    data = texts.held_out_python()
    # While tuning, those halfway between the reported ones.
    return windows(data, 2 * OLD_WINDOWS - 1)[1::2] if tuning else windows(data, OLD_WINDOWS)


def run(scenario: str, method_name: str, seed: int, options: Options, *, tuning: bool = False) -> dict[str, Any]:
    """One run with the demo model.

    Returns:
        What `read` does; ``seconds`` of the processor that it took; ``sources``, see `Stream.sources`.

    Raises:
        ValueError: for an unknown scenario or method.
    """
    found = method(method_name)
    text = stream(scenario, seed, tuning=tuning)
    held = {d: held_out(d) for d in text.domains} if scenario == "recurring" else {}
    lab = demo_lab(tuning=tuning)
    began = time.process_time()
    out = read(lab, found, text, held, seed, options)
    return {**out, "seconds": round(time.process_time() - began, 2), "sources": text.sources()}


def read(
    lab: Lab, found: TextMethod, text: Stream, held: dict[str, Tensor], seed: int, options: Options
) -> dict[str, Any]:
    """``found`` reads ``text``.

    Args:
        held: domain -> (N, T) windows on which it is tested after each segment, once it has read of that domain.

    Returns:
        A dict of plain values, bits per byte: ``new``, the mean over the stream, each byte scored before it was
        learnt; ``old``, on what the base model knows, afterwards; ``curve``, the mean of each piece of `CONTEXT`
        bytes; ``segments``, the domain of each; ``matrix``, a row for each segment and a column for each domain of
        ``held`` (None before the domain was read); ``recovery``, bytes for each segment whose domain was read before
        (`metrics.recovery`). And ``time_ratio``, the time per byte against the frozen model's in the same run (None for
        what was trained before); ``state_bytes`` kept beside the base model's weights, and ``parameters`` that may
        learn, for which they are counted.
    """
    reader = found.reader(lab, text, options, seed) if found.reader else Learning(lab.learner(found, options, seed))
    clock = Clock()
    nll: list[Tensor] = []
    levels: dict[str, float] = {}
    matrix, recovery = [], []
    for segment in text.segments:
        mine = []
        for start in range(0, segment.ids.shape[1] - 1, CONTEXT):
            piece = segment.ids, start, min(start + CONTEXT, segment.ids.shape[1] - 1)
            with clock.turn():
                mine.append(reader.read(*piece))
            if clock.due():
                with clock.frozen():
                    lab.frozen.read(*piece)
        nll += mine
        bits = (torch.cat(mine, 1)[0].double() / LN2).tolist()
        if segment.domain in levels:
            recovery.append(metrics.recovery(bits, levels[segment.domain], CONTEXT))
        levels[segment.domain] = sum(bits[-CONTEXT:]) / len(bits[-CONTEXT:])
        matrix.append([round(reader.bits(rows), 5) if d in levels else None for d, rows in held.items()])
    return {
        "new": round(float(torch.cat(nll, 1).double().mean()) / LN2, 5),
        "old": round(reader.bits(lab.old), 5),
        "curve": [round(float(part.double().mean()) / LN2, 4) for part in nll],
        "segments": [segment.domain for segment in text.segments],
        "matrix": matrix,
        "recovery": recovery,
        "time_ratio": None if reader.offline else clock.ratio(),
        "state_bytes": reader.state_bytes(),
        "parameters": lab.parameters,
    }


class Clock:
    """The time of a method's turns against the frozen model's, one of which follows the first of every `TIMED`."""

    def __init__(self) -> None:
        self._blocks: list[tuple[list[float], list[float]]] = []

    def turn(self) -> _Timer:
        if not self._blocks or len(self._blocks[-1][0]) == TIMED:
            self._blocks.append(([], []))
        return _Timer(self._blocks[-1][0])

    def due(self) -> bool:
        return not self._blocks[-1][1]

    def frozen(self) -> _Timer:
        return _Timer(self._blocks[-1][1])

    def ratio(self) -> float:
        """Median over the blocks: what is done only now and then is shared by the block's turns."""
        ratios = [sum(own) / len(own) / frozen[0] for own, frozen in self._blocks]
        return round(median(ratios), 4)


class _Timer:
    def __init__(self, times: list[float]) -> None:
        self.times = times

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self.times.append(time.perf_counter() - self.began)
