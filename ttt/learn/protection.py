"""What must not be forgotten: measuring it (`calibrate`) and adding to it (`consolidate`)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ttt import ops
from ttt.learn.huggingface import swapped
from ttt.nn import Capturing, Linear, Update, gaussian
from ttt.nn.directions import refresh
from ttt.nn.rates import CALIBRATED
from ttt.nn.state_access import wide, write


def calibrate(layers: list[Linear], losses: Iterator[Tensor], kind: str) -> None:
    """Base importance and replay memory from the gradients of ``losses``; see `ttt.Learner.calibrate`.

    ``losses`` are computed as they are drawn, so their forward passes run while gradients are collected.
    All layers are written at the end: an error leaves them as they were.
    """
    if any(int(layer.step) or layer.pending or layer.base for layer in layers):
        raise ValueError("calibrate before learning: the model has already learnt; call reset() first")
    sums: list[Any] = [
        None if la.importance is None else torch.zeros_like(la.weight, dtype=la.win_eta.dtype) for la in layers
    ]
    memories = [None if la.memory is None else (la.memory.clone(), la.seen.clone()) for la in layers]
    pasts = [gaussian.of_layer(la) for la in layers]
    moments = [None if la.moments is None or kind == "mas" else torch.zeros_like(la.moments[0]) for la in layers]
    step = torch.zeros((1,), dtype=torch.int64, device=layers[0].weight.device)
    tokens = 0
    with Capturing(layers) as capturing, torch.enable_grad():
        for loss in losses:
            loss.backward()
            captured = zip(layers, capturing.renew(), sums, memories, moments, strict=True)
            for at, (layer, pairs, total, memory, moment) in enumerate(captured):
                update = layer.update_from(pairs)
                if update is None or not bool(update.finite):
                    raise ValueError(f"calibration gave no finite gradient at {layer.name or layer}")
                tokens += update.x.shape[0]
                if total is not None:
                    accumulate(layer, update, total, step, kind)
                if (past := pasts[at]) is not None:
                    pasts[at] = past.with_rows(update.x)
                if moment is not None and update.moments is not None:
                    moment += update.moments
                if memory is not None:
                    with torch.no_grad():
                        ops.reservoir_insert(*memory, update.x, seed=layer.seed)
    if tokens == 0:
        raise ValueError("batches must hold at least one batch of tokens, got none")
    protected = [(layer, total) for layer, total in zip(layers, sums, strict=True) if total is not None]
    mean = mean_of(total for _, total in protected)
    for layer, total in protected:
        write(layer, "importance", total.div_(mean or 1.0))
        layer.own("importance_scale")
        layer.importance_scale.fill_(mean / (tokens / len(layers)))
    for layer, memory, past, moment in zip(layers, memories, pasts, moments, strict=True):
        gaussian.write_past(layer, past)
        if moment is not None:  # the gradients of MAS are not the loss's
            layer.moments[CALIBRATED].copy_(moment)
        if memory is not None:
            layer.own("memory", "seen", copy=False)
            layer.memory.copy_(memory[0])
            layer.seen.copy_(memory[1])
            refresh(layer)


@torch.no_grad()
def accumulate(layer: Linear, update: Update, total: Tensor, step: Tensor, kind: str) -> None:
    """Add to ``total`` (m, n) what ``update`` says of the importance of ``layer``'s weights, which stay as they are."""
    rates = torch.zeros_like(update.eta)  # so that only the sum grows
    ops.commit(layer.weight, None, None, total, update.x, update.delta, rates, step, kind=kind)


@torch.no_grad()
def consolidate(layers: list[Linear]) -> None:
    """Move anchors and importance to what was learnt; see `ttt.Learner.consolidate`."""
    for layer in layers:
        layer.remember_base()
        layer.flush()
    protected = [layer for layer in layers if layer.importance is not None]
    # What grew is computed twice, for the mean and for the sum, rather than kept for all layers at once.
    mean = mean_of(grown(layer) for layer in protected)
    for layer in protected:
        si, scale = layer.config.importance == "si", float(layer.importance_scale)
        if not scale:
            layer.own("importance_scale")
            layer.importance_scale.fill_(mean)
        # SI's unit (loss per squared distance) is not that of the Fisher: it is measured anew.
        unit = mean if si or not scale else scale
        decay = 1.0 if si else layer.config.consolidate_decay
        write(layer, "importance", grown(layer).div_(unit or 1.0).add_(wide(layer, "importance"), alpha=decay))
    for layer in layers:
        layer.own("anchor", copy=False)
        layer.anchor.copy_(layer.weight)
        if layer.trace is not None:
            layer.trace.zero_()
        layer.tokens.zero_()
        gaussian.consolidate(layer)
        if layer.memory is not None:
            layer.own("memory", "seen")
            _merge_recent(layer)
            refresh(layer)


@contextlib.contextmanager
def anchored(layers: Iterable[Linear]) -> Iterator[None]:
    """Inside, the layers compute with their anchors: the model is the one that must not be forgotten.

    Nothing is copied, and the anchors are those of the moment, whatever moved them. There is no graph.
    """
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for layer in layers:
            linear = functools.partial(torch.nn.functional.linear, weight=layer.anchor, bias=layer.bias)
            stack.enter_context(swapped(layer, linear))
        yield


def grown(layer: Linear) -> Tensor:
    """The importance that the trace stands for, (m, n), before normalisation: a new tensor."""
    trace = wide(layer, "trace")
    if layer.config.importance != "si":
        return trace / layer.tokens.clamp_min(1)
    moved = layer.weight.to(trace.dtype) - layer.anchor.to(trace.dtype)
    return trace.div(moved.square_().add_(layer.config.si_xi)).relu_()


def mean_of(parts: Iterable[Tensor]) -> float:
    """Mean over all elements of all tensors; 0 for none."""
    total, count = 0.0, 0
    for part in parts:
        total, count = total + float(part.sum(dtype=torch.float64)), count + part.numel()
    return total / count if count else 0.0


def _merge_recent(layer: Linear) -> None:
    """Two uniform samples become one of their union: memory rows are replaced with the recent rows' share."""
    capacity, old, new = layer.memory.shape[0], int(layer.seen), int(layer.recent_seen)
    sample = layer.recent[: min(new, layer.recent.shape[0])]
    # Seeded by the state, so that a rolled-back or loaded layer consolidates alike.
    generator = torch.Generator(device=sample.device).manual_seed(layer.seed ^ int(layer.step))
    sample = sample[torch.randperm(len(sample), generator=generator, device=sample.device)]
    room = max(0, min(capacity - old, len(sample)))
    if room:
        layer.memory[old : old + room] = sample[:room]
    if old + room < capacity:
        layer.seen += room  # all of the sample is in, and nothing else: only filled rows may be drawn
    else:
        rest = sample[room:]
        count = min(len(rest), round(capacity * (new - room) / (old + new)))
        slots = torch.randperm(capacity, generator=generator, device=rest.device)[:count]
        layer.memory[slots] = rest[:count]
        layer.seen += new
    layer.recent.zero_()
    layer.recent_seen.zero_()
