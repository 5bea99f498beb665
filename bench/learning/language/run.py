"""One run of the suite: a method reads a text, is scored on each token before it learns from it, and tested after."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from bench.learning.clock import Clock, seconds
from bench.learning.language.base import Base, segments
from bench.learning.language.measures import blocks, divergence
from bench.learning.language.methods import LanguageMethod, Options
from ttt.demo.knowledge import facts_loss, loss

TIMED = 2  # segments that a method reads for each one that the frozen model reads as well, for comparison


def run(base: Base, found: LanguageMethod, ids: Tensor, seed: int, options: Options) -> dict[str, Any]:
    """The method ``found`` reads ``ids`` (1, T + 1) in segments of `base.CONTEXT` tokens, each with an empty context.

    Returns:
        A dict of plain values. Losses and divergences are in nats.

        * ``nll``: mean loss, each token scored before it was learnt
        * ``blocks``: the means of `measures.BLOCKS` consecutive parts of the text
        * ``kl``: means of as many parts of the divergence from the frozen model on general text, afterwards
        * ``facts``: mean loss on how the facts go on, afterwards
        * ``time_ratio``: time per token divided by that of a forward pass in the same run
        * ``seconds``: processor time; of the wall clock on a GPU
        * ``tokens``: how many were scored
        * ``sha256``: of the tokens, and of those of the general text
    """
    device = base.device.type
    began = seconds(device)
    reader = found.make(base, options, seed)
    clock = Clock(TIMED, device)
    parts = []
    for segment in segments(ids):
        with clock.turn():
            parts.append(reader.read(segment))
        if clock.due():
            with clock.frozen():
                loss(base.model, segment)
    nll = torch.cat(parts)
    head = base.model.get_output_embeddings()
    kl = divergence(reader.model, base.general, head, base.frozen_hidden)
    return {
        "nll": round(float(nll.double().mean()), 6),
        "blocks": blocks(nll),
        "kl": blocks(kl),
        "facts": round(facts_loss(reader.model, base.facts), 6),
        "time_ratio": clock.ratio(),
        "seconds": round(seconds(device) - began, 2),
        "tokens": len(nll),
        "sha256": [_digest(ids), _digest(base.general)],
    }


def _digest(ids: Tensor) -> str:
    return hashlib.sha256(str(ids.flatten().tolist()).encode()).hexdigest()[:16]
