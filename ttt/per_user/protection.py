"""Calibration of the protections that all users share: importance, replay memory and protected directions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ttt import ops
from ttt.nn import Capturing, LowRankLinear
from ttt.nn.capture import refuse_or_warn_of_unreached
from ttt.nn.kronecker import Calibration
from ttt.signals import SignalsDeferred


def calibrate(layers: Sequence[LowRankLinear], losses: Iterator[Tensor], kind: str) -> None:
    """Set importance, replay memory, its principal directions and the scale of gradients from ``losses``.

    Omega's row and column means are computed from those of the tokens' squared gradients (``kind`` "mas": absolute
    values), without an m x n matrix: the mean of row i is sum_t delta_ti^2 mean_j x_tj^2. They are scaled so that
    importance_m[i] importance_n[j] has mean 1 over the model, as Omega has elsewhere. Layers are written at the end, so
    that an error leaves them unchanged.

    Args:
        losses: summed losses of batches, computed as they are drawn.
        kind: "fisher" or "mas".

    Raises:
        ValueError: if there is no loss, or none with a gradient at a layer, or a gradient is not finite.

    Warns:
        UserWarning: if there is no gradient at some layers.
    """
    drawn, rows = 0, [0] * len(layers)
    wide = layers[0].eta_sum.dtype
    sums = [
        tuple(torch.zeros(k, dtype=wide, device=la.weight.device) for k in (la.out_features, la.in_features))
        for la in layers
    ]
    memories = [None if la.memory is None else (la.memory.clone(), la.seen.clone()) for la in layers]
    # The gradients for MAS are not those of the loss, so they say nothing about its scale.
    moments = [None if la.calibrated is None or kind == "mas" else torch.zeros_like(la.calibrated) for la in layers]
    softs = [Calibration(la) if la.config.kronecker else None for la in layers]
    with Capturing(layers) as capturing, torch.enable_grad():
        for loss in losses:
            loss.backward()
            drawn += 1
            captured = zip(layers, capturing.renew(), sums, memories, moments, softs, strict=True)
            for at, (layer, pairs, (by_row, by_column), memory, moment, soft) in enumerate(captured):
                for x, delta in pairs:
                    x, delta = x.to(layer.weight.dtype).contiguous(), delta.to(layer.weight.dtype)
                    *_, steps = layer.steps(x, delta, None)
                    if not bool(steps.finite.all()):
                        raise ValueError(f"calibration got a gradient that is not finite at {layer.name or layer}")
                    rows[at] += len(x)
                    if moment is not None and steps.grown is not None:
                        moment += steps.grown
                    xs, ds = (t.to(wide).abs() if kind == "mas" else t.to(wide).square() for t in (x, delta))
                    by_row += ds.T @ xs.mean(1)
                    by_column += xs.T @ ds.mean(1)
                    if soft is not None:
                        soft.add(x, delta)
                    if memory is not None:
                        with torch.no_grad():
                            ops.reservoir_insert(memory[0], memory[1], x, seed=layer.seed)
    if not drawn:
        raise ValueError("batches must hold at least one batch of tokens, got none")
    refuse_or_warn_of_unreached(layers, rows)
    weights = sum(layer.weight.numel() for layer in layers)
    mean = sum(float(rows.mean()) * layer.weight.numel() for layer, (rows, _) in zip(layers, sums, strict=True))
    with SignalsDeferred():
        for layer, (by_row, by_column), memory, moment, soft in zip(
            layers, sums, memories, moments, softs, strict=True
        ):
            if layer.importance_m is not None:
                layer.importance_m.copy_(by_row / (mean / weights or 1.0))
                layer.importance_n.copy_(by_column / (by_column.mean() or 1.0))
            if memory is not None:
                layer.memory.copy_(memory[0])
                layer.seen.copy_(memory[1])
                layer.refresh_basis()
            if soft is not None and int(soft.seen):
                moment = soft.write()
            if moment is not None:
                layer.calibrated.copy_(moment)
