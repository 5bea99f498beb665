"""Measuring what must not be forgotten (`calibrate`), and adding to it what was learnt (`consolidate`)."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ttt import ops
from ttt.learn.draw import draw_tokens
from ttt.learn.huggingface import swapped
from ttt.learn.not_finite import require_finite
from ttt.learn.text import check_tokens
from ttt.nn import Capturing, Linear, LowRankLinear, Update
from ttt.nn.capture import refuse_or_warn_of_unreached
from ttt.nn.kronecker import MOMENTS, SIDES, Calibration, second_moment, set_directions, with_rows
from ttt.nn.many_updates import updates_from
from ttt.nn.rates import CALIBRATED
from ttt.nn.state import BASE
from ttt.nn.state_access import read_matrix, write_matrix
from ttt.ops.reference import LARGEST_SEEN
from ttt.signals import SignalsDeferred

if TYPE_CHECKING:
    from ttt.config import TTTConfig


def warn_if_none(config: TTTConfig, layers: Sequence[Linear | LowRankLinear]) -> None:
    """Warn if ``config`` protects, but no layer holds anything to protect with yet. To be called by a public method."""
    names = ("importance", "importance_m", "seen", "basis")
    held = (getattr(layer, name, None) for layer in layers for name in names)
    protects = config.ewc_lambda or config.replay_rows or config.orthogonal or config.kronecker
    if protects and not any(t is not None and bool(t.any()) for t in held):
        warnings.warn(
            "learning is unprotected: Learner.calibrate was not called (with data that the model knows or, without "
            "arguments, on text that it writes itself)",
            stacklevel=3,
        )


PAIRS_OF_A_DIRECTION = 4
"""Different pairs of neighbouring tokens that a text should have for each direction of `ttt.KroneckerFisher`."""


class SmallTextWarning(UserWarning):
    """Warns of a calibration text that is too small or too uniform for the moments that are taken of it."""


class Pairs:
    """Counts the different pairs of neighbouring tokens of the texts that pass through `counted`."""

    def __init__(self) -> None:
        self._found: Tensor | None = None

    def counted(self, texts: Iterable[Any]) -> Iterator[Any]:
        """``texts``; of those that are (B, T) tokens the pairs are counted."""
        for text in texts:
            if isinstance(text, Tensor) and text.dim() == 2 and not text.is_floating_point():
                pairs = torch.stack([text[:, :-1], text[:, 1:]], -1).flatten(0, 1).cpu()
                known = pairs if self._found is None else torch.cat([self._found, pairs.to(self._found.dtype)])
                self._found = known.unique(dim=0)
            yield text

    def warn_if_few(self, config: TTTConfig) -> None:
        """Warn if there are too few for the directions of ``config``. To be called by a public method."""
        few = PAIRS_OF_A_DIRECTION * config.kronecker
        count = 0 if self._found is None else len(self._found)
        if count < few:
            warnings.warn(
                f"calibrated on {count} different pairs of neighbouring tokens, and the directions of KroneckerFisher "
                f"need {few} at least: single updates may overshoot. Give more text that the model knows, or none: "
                "Learner.calibrate() then writes it itself",
                SmallTextWarning,
                stacklevel=3,
            )


def calibration_losses(model: Any, batches: Iterable[Tensor], config: TTTConfig, kind: str) -> Iterator[Tensor]:
    """The loss of each of ``batches``, (B, T) int64 tokens, whose gradients tell the importance; computed when drawn.

    For ``kind`` "mas" it is the sum of the squared logits (Aljundi et al., 2018). Otherwise it is the negative log
    likelihood of labels: of those drawn from the model's own output (``config.fisher`` "true"), or of the text's.

    Raises:
        FloatingPointError: if the model's output is not finite.
    """
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(config.seed)
    for batch in batches:
        ids = check_tokens(model, batch, name="each of batches").ids
        logits = model(input_ids=ids).logits.float()
        require_finite(model, logits)
        if kind == "mas":
            yield logits.square().sum()
            continue
        if config.fisher == "true":
            logits = logits.flatten(0, 1)
            labels = draw_tokens(logits.detach().softmax(-1), generator)
        else:
            logits, labels = logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        yield torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


def calibrate(layers: list[Linear], losses: Iterator[Tensor], kind: str) -> None:
    """Set importance and replay memory from the gradients of ``losses``; see `ttt.Learner.calibrate`.

    Args:
        losses: scalars, computed when they are drawn, so that their forward passes run while gradients are collected.
        kind: "mas" or "fisher", how gradients are summed up (`ttt.ops.commit`).

    Raises:
        ValueError: if a layer has learnt already, a gradient is not finite, or there is no loss or none with a gradient
            at a layer. Layers are written at the end: an error leaves them as they were.

    Warns:
        UserWarning: if there is no gradient at some layers.
    """
    if any(int(layer.step) or layer.pending or layer.base for layer in layers):
        raise ValueError("calibrate before learning: the model has already learnt; call reset() first")
    sums: list[Any] = [
        None if la.importance is None else torch.zeros_like(la.weight, dtype=la.win_eta.dtype) for la in layers
    ]
    memories = [None if la.memory is None else (la.memory.clone(), la.seen.clone()) for la in layers]
    pasts = [la.past_inputs for la in layers]
    moments = [None if la.moments is None or kind == "mas" else torch.zeros_like(la.moments[0]) for la in layers]
    softs = [Calibration(la) if la.config.kronecker else None for la in layers]
    step = torch.zeros((1,), dtype=torch.int64, device=layers[0].weight.device)
    drawn, rows = 0, [0] * len(layers)
    with Capturing(layers) as capturing, torch.enable_grad():
        for loss in losses:
            check_loss(loss)
            loss.backward()
            drawn += 1
            updates = updates_from(layers, [(pairs, None, None) for pairs in capturing.renew()])
            found = zip(layers, updates, sums, memories, moments, strict=True)
            for at, (layer, update, total, memory, moment) in enumerate(found):
                if update is None:
                    continue
                if not bool(update.finite):
                    raise ValueError(f"calibration got a gradient that is not finite at {layer.name or layer}")
                rows[at] += update.x.shape[0]
                if (soft := softs[at]) is not None:
                    soft.add(update.x, update.delta)
                if total is not None:
                    accumulate(layer, update, total, step, kind)
                if (past := pasts[at]) is not None:
                    pasts[at] = past.with_rows(update.x)
                if moment is not None and update.moments is not None:
                    moment += update.moments
                if memory is not None:
                    with torch.no_grad():
                        ops.reservoir_insert(*memory, update.x, seed=layer.seed)
    if not drawn:
        raise ValueError("batches must hold at least one batch of tokens, got none")
    refuse_or_warn_of_unreached(layers, rows)
    tokens = sum(rows)
    with _unchanged_on_error(layers):
        protected = [(layer, total) for layer, total in zip(layers, sums, strict=True) if total is not None]
        mean = mean_of(protected)
        for layer, total in protected:
            write_matrix(layer, "importance", total.div_(mean or 1.0))
            layer.unshare("importance_scale")
            layer.importance_scale.fill_(mean / (tokens / len(layers)))
        for layer, memory, past, moment, soft in zip(layers, memories, pasts, moments, softs, strict=True):
            layer.set_past_inputs(past)
            if soft is not None and int(soft.seen):  # a layer may have got no token
                moment = soft.write()
            if moment is not None:  # for MAS it is None: its gradients are not those of the loss
                layer.moments[CALIBRATED].copy_(moment)
            if memory is not None:
                layer.unshare("memory", "seen", copy=False)
                layer.memory.copy_(memory[0])
                layer.seen.copy_(memory[1])
                layer.refresh_basis()


def check_loss(loss: Tensor) -> None:
    """Raise TypeError unless ``loss`` is a scalar whose gradient can be taken."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        found = type(loss).__name__
        if isinstance(loss, Tensor):
            found = f"shape {tuple(loss.shape)}, {'with' if loss.requires_grad else 'without'} a graph"
        raise TypeError(f"loss must return a scalar tensor with a graph to the learning layers, got {found}")


@contextlib.contextmanager
def _unchanged_on_error(layers: list[Linear]) -> Iterator[None]:
    """Inside, what calibration sets is written; an exception leaves it as it was, and signals wait."""
    names = {*BASE, "moments"} - {"anchor"}
    before = [{name: t.clone() for name in names if (t := getattr(layer, name)) is not None} for layer in layers]
    with SignalsDeferred():
        try:
            yield
        except BaseException:
            for layer, state in zip(layers, before, strict=True):
                layer.load_state(state)
            raise


@torch.no_grad()
def accumulate(layer: Linear, update: Update, total: Tensor, step: Tensor, kind: str) -> None:
    """Add to ``total`` (m, n) the importance that ``update`` gives ``layer``'s weights, which do not change.

    ``step`` (1,) int64 counts the calls; ``kind`` as in `ttt.ops.commit`.
    """
    rates = torch.zeros_like(update.eta)  # with steps of 0 a commit writes the trace only
    ops.commit(layer.weight, None, None, total, update.x, update.delta, rates, step, kind=kind)


@torch.no_grad()
def consolidate(layers: list[Linear]) -> None:
    """Make what was learnt the anchor, and add its importance; see `ttt.Learner.consolidate`."""
    for layer in layers:
        layer.remember_base()
        layer.flush()
    protected = [layer for layer in layers if layer.importance is not None]
    # The new importance is computed twice, for its mean and for the sum, so that it is not held for all layers at once.
    mean = mean_of((layer, new_importance(layer)) for layer in protected)
    for layer in protected:
        si, scale = layer.config.importance == "si", float(layer.importance_scale)
        if not scale:
            layer.unshare("importance_scale")
            layer.importance_scale.fill_(mean)
        # The unit of SI (loss per squared distance) is not that of the Fisher information: it is measured anew.
        unit = mean if si or not scale else scale
        decay = 1.0 if si else layer.config.consolidate_decay
        write_matrix(
            layer,
            "importance",
            new_importance(layer).div_(unit or 1.0).add_(read_matrix(layer, "importance"), alpha=decay),
        )
    for layer in layers:
        layer.unshare("anchor", copy=False)
        layer.anchor.copy_(layer.weight)
        if layer.trace is not None:
            layer.trace.zero_()
        layer.tokens.zero_()
        if layer.drift is not None:
            layer.drift.zero_()
        layer.merge_present_inputs()
        if layer.config.kronecker:
            _merge_moments(layer)
        if layer.memory is not None:
            layer.unshare("memory", "seen")
            _merge_recent(layer)
            layer.refresh_basis()
        for name in ("recent", "recent_delta"):
            if (sample := getattr(layer, name)) is not None:
                sample.zero_()
        layer.recent_seen.zero_()


@contextlib.contextmanager
def anchored(layers: Iterable[Linear]) -> Iterator[None]:
    """Inside, the layers compute with their anchor weights, without a window and without a graph. Nothing is copied."""
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for layer in layers:
            linear = functools.partial(torch.nn.functional.linear, weight=layer.anchor, bias=layer.bias)
            stack.enter_context(swapped(layer, linear))
        yield


def new_importance(layer: Linear) -> Tensor:
    """The importance of the stream since the last consolidation, (m, n), before normalisation. A new tensor.

    It is F / tokens; for SI (Zenke et al., 2017) relu(F / ((W - W*)^2 + xi)).
    """
    trace = read_matrix(layer, "trace")
    if layer.config.importance != "si":
        return trace / layer.tokens.clamp_min(1)
    moved = layer.weight.to(trace.dtype) - layer.anchor.to(trace.dtype)
    return trace.div(moved.square_().add_(layer.config.si_xi)).relu_()


def mean_of(parts: Iterable[tuple[Linear, Tensor]]) -> float:
    """Mean over all elements of tensors (m, n), each given with the layer that it belongs to; 0 for none."""
    total, count = 0.0, 0
    for layer, part in parts:
        sides, (m, n) = layer.sharding, part.shape
        total += float(sides.sum(part.sum(dtype=torch.float64)))
        count += sides.output.size(m) * sides.input.size(n)
    return total / count if count else 0.0


def _merge_recent(layer: Linear) -> None:
    """Let ``layer.memory`` become a uniform sample of what it and ``layer.recent`` were samples of."""
    capacity, old, new = layer.memory.shape[0], int(layer.seen), int(layer.recent_seen)
    sample = layer.recent[: min(new, layer.recent.shape[0])]
    # Seeded by the state, so that a rolled-back or loaded layer consolidates alike.
    generator = torch.Generator(device=sample.device).manual_seed(layer.seed ^ int(layer.step))
    sample = sample[torch.randperm(len(sample), generator=generator, device=sample.device)]
    room = max(0, min(capacity - old, len(sample)))
    if room:
        layer.memory[old : old + room] = sample[:room]
    if old + room < capacity:
        layer.seen += room  # only rows that are filled count, as only those may be drawn
    else:
        rest = sample[room:]
        count = min(len(rest), round(capacity * (new - room) / (old + new)))
        slots = torch.randperm(capacity, generator=generator, device=rest.device)[:count]
        layer.memory[slots] = rest[:count]
        layer.seen.add_(new).clamp_(max=LARGEST_SEEN)


def _merge_moments(layer: Linear) -> None:
    """Add the recent inputs and gradients to the second moments of ``layer``, and renew its directions."""
    layer.unshare(*MOMENTS)
    seen, found = int(layer.recent_seen), []
    for side, sample in zip(SIDES, (layer.recent, layer.recent_delta), strict=True):
        factor, sums = getattr(layer, f"{side}_factor"), getattr(layer, f"{side}_sums")
        moment = second_moment(factor, sums, getattr(layer.sharding, side))
        moment = with_rows(moment, sample[: min(seen, len(sample))], seen)
        factor.copy_(moment.factor)
        sums.copy_(moment.moments)
        found.append(moment)
    set_directions(layer, *found)
