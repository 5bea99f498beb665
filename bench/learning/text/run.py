"""One run of the suite: a method reads a stream, is scored on each byte before it learns from it, and tested after."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from bench.learning import metrics
from bench.learning.clock import Clock
from bench.learning.text.base_model import BaseModel, demo_base
from bench.learning.text.methods import Options, TextMethod, method
from bench.learning.text.streams import Stream, held_out, stream
from ttt.demo.model import CONTEXT, LN2


def run(scenario: str, method_name: str, seed: int, options: Options, *, tuning: bool = False) -> dict[str, Any]:
    """One run with the demo model.

    Returns:
        The result of `read`, with ``seconds`` (processor time) and ``sources`` (see `Stream.sources`).

    Raises:
        ValueError: for an unknown scenario or method.
    """
    found = method(method_name)
    text = stream(scenario, seed, tuning=tuning)
    held = {d: held_out(d) for d in text.domains} if scenario == "recurring" else {}
    base = demo_base(tuning=tuning)
    began = time.process_time()
    out = read(base, found, text, held, seed, options)
    return {**out, "seconds": round(time.process_time() - began, 2), "sources": text.sources()}


def read(
    base: BaseModel, found: TextMethod, text: Stream, held: dict[str, Tensor], seed: int, options: Options
) -> dict[str, Any]:
    """The method ``found`` reads ``text``.

    Args:
        held: domain -> (N, T) windows of held-out text. After each segment the model is tested on those of the domains
            that it has read so far.

    Returns:
        A dict of plain values. Scores are bits per byte.

        * ``new``: mean over the stream, each byte scored before it was learnt
        * ``old``: on ``base.old`` after the stream
        * ``curve``: mean of each piece of `CONTEXT` bytes
        * ``segments``: domain of each segment
        * ``matrix``: a row for each segment, a column for each domain of ``held``; None before the domain was read
        * ``recovery``: bytes, for each segment whose domain was read before (see `metrics.recovery`)
        * ``time_ratio``: time per byte divided by the frozen model's in the same run; None for offline training
        * ``state_bytes``: bytes kept in addition to the weights of the base model
        * ``parameters``: number of weights that may learn
    """
    reader = found.make_reader(base, text, options, seed)
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
                    base.frozen.read(*piece)
        nll += mine
        bits = (torch.cat(mine, 1)[0].double() / LN2).tolist()
        if segment.domain in levels:
            recovery.append(metrics.recovery(bits, levels[segment.domain], CONTEXT))
        levels[segment.domain] = sum(bits[-CONTEXT:]) / len(bits[-CONTEXT:])
        matrix.append([round(reader.bits(rows), 5) if d in levels else None for d, rows in held.items()])
    return {
        "new": round(float(torch.cat(nll, 1).double().mean()) / LN2, 5),
        "old": round(reader.bits(base.old), 5),
        "curve": [round(float(part.double().mean()) / LN2, 4) for part in nll],
        "segments": [segment.domain for segment in text.segments],
        "matrix": matrix,
        "recovery": recovery,
        "time_ratio": None if reader.offline else clock.ratio(),
        "state_bytes": reader.state_bytes(),
        "parameters": base.parameters,
    }
