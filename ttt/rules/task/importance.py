"""Regularisation: weights that matter to earlier tasks are held near where those tasks left them.

All rules here share one penalty, which the fused commit takes as a proximal step (`ttt.ops.commit`):

    lambda/2 sum_ij Omega_ij (W_ij - W*_ij)^2        per sample, beside the loss of that sample

The factor 1/2 is part of the convention (van de Ven; others leave it out). What a task adds to Omega is divided by its
mean over all weights, so that every task weighs alike and lambda has the same meaning for every rule and model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ttt.adapt.convert import require_layers
from ttt.checks import check_choice, check_number
from ttt.learn.draw import draw_tokens
from ttt.learn.protection import accumulate, mean_of, new_importance
from ttt.nn import Capturing, Linear
from ttt.nn.state_access import read_matrix, write_matrix
from ttt.rules.task.base import Batch, Rule, evaluating, masked, task_loss

FISHER = ("true", "exact", "empirical", "stream")


def measure_importance(model: nn.Module, losses: Iterator[Tensor], kind: str = "fisher", passes: int = 1) -> None:
    """Replace the trace F of every learning layer by what ``losses`` say of the present weights.

    For each row (a sample; a token, where inputs are (batch, time, features)), with x its input and delta the
    gradient of the summed loss at the layer's output:

        fisher   F = sum (delta*delta)^T (x*x)           squares of per-row gradients, not of their sum
        mas      F = sum |delta|^T |x|

    The next consolidation takes F / rows divided by its mean over all weights of the model. The model is in eval mode
    while the losses are drawn.

    Args:
        model: its learning layers' (m, n) traces are written; its windows are committed first.
        losses: summed losses, computed as they are drawn.
        kind: "fisher" or "mas".
        passes: losses drawn for each row; they add up to one measurement.

    Raises:
        ValueError: if there is no loss, or a gradient is not finite.
    """
    check_choice("kind", kind, ("fisher", "mas"))
    layers = require_layers(model)
    for layer in layers:
        layer.flush()
    step = torch.zeros((1,), dtype=torch.int64, device=layers[0].weight.device)
    sums = [torch.zeros_like(layer.weight, dtype=layer.win_eta.dtype) for layer in layers]
    rows = [0] * len(layers)
    with evaluating(model), Capturing(layers) as capturing, torch.enable_grad():
        for loss in losses:
            loss.backward()
            for k, (layer, pairs) in enumerate(zip(layers, capturing.renew(), strict=True)):
                update = layer.update_from(pairs)
                if update is None:  # a frozen part of the model
                    continue
                if not bool(update.finite):
                    raise ValueError(f"the loss gave a gradient at {layer.name or layer} that is not finite")
                accumulate(layer, update, sums[k], step, kind)
                rows[k] += update.x.shape[0]
    if not any(rows):
        raise ValueError("batches must hold at least one sample, got none")
    total, count = 0.0, 0
    for layer, value, n in zip(layers, sums, rows, strict=True):
        n = max(1, n // passes)
        write_matrix(layer, "trace", value)
        layer.tokens.fill_(n)
        total, count = total + float(value.sum(dtype=torch.float64)) / n, count + value.numel()
    for layer in layers:
        layer.unshare("importance_scale")
        layer.importance_scale.fill_(total / count)


class _Penalty(Rule):
    """What EWC, SI and MAS share."""

    kind = "fisher"

    def __init__(self, lam: float) -> None:
        self.lam = check_number("lam", lam, 0.0, above=True)

    def options(self) -> dict[str, Any]:
        return {"importance": self.kind, "ewc_lambda": self.lam}


class EWC(_Penalty):
    """Elastic Weight Consolidation: Omega is the diagonal of the Fisher information.

    ``mode="separate"`` (Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017): a
    penalty for each task k, around the weights it ended with. The sum of these parabolas is one parabola but for a
    constant, so one Omega and one anchor hold any number of tasks:

        sum_k Omega_k (W - W_k)^2 = Omega (W - W*)^2 + const
        Omega = sum_k Omega_k        W* = sum_k Omega_k W_k / Omega    (the present W where Omega = 0)

    ``mode="online"`` (Schwarz et al., "Progress & Compress", ICML 2018): Omega <- decay Omega + Omega_k, W* <- W_k.

    Omega_k is measured per sample (per token on sequences) when task k ends, over all its samples:

    * ``fisher="true"``: labels drawn from the model's own output, one a sample;
    * ``"exact"``: the expectation over all labels, sum_c p_c (d log p_c)^2, at one backward pass an output;
    * ``"empirical"``: the given labels;
    * ``"stream"``: the given labels, as gradients came while the weights moved; costs no further pass.

    Args:
        lam: lambda > 0 of the penalty lambda/2 sum Omega (W - W*)^2 per sample, Omega_k having mean 1.
        mode: "separate" or "online".
        fisher: see above.
        decay: gamma in [0, 1]; online only.
        seed: of the labels drawn for "true".

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self, lam: float, *, mode: str = "online", fisher: str = "true", decay: float = 1.0, seed: int = 0
    ) -> None:
        super().__init__(lam)
        self.mode = check_choice("mode", mode, ("separate", "online"))
        self.fisher = check_choice("fisher", fisher, FISHER)
        self.decay = check_number("decay", decay, 0.0, 1.0)
        if mode == "separate" and decay != 1.0:
            raise ValueError(f"decay must be 1.0 for mode='separate', got {decay!r}")
        self.generator = torch.Generator().manual_seed(seed)
        self._before: list[tuple[Linear, Tensor, Tensor]] = []

    def options(self) -> dict[str, Any]:
        options = super().options() | {"consolidate_decay": self.decay}
        # One weight matrix cannot be both the centre of all parabolas and the model whose outputs are replayed.
        none = dict.fromkeys(("replay_rows", "distill_rows", "generated_rows"), 0)
        return options | (none if self.mode == "separate" else {})

    def measure(self, batches: Sequence[Batch]) -> None:
        layers = require_layers(self.model)
        if self.fisher == "stream":
            for layer in layers:
                layer.flush()
            _scale_to_mean(layers)
        else:
            passes = self._outputs(batches[0]) if self.fisher == "exact" and batches else 1
            measure_importance(self.model, self._losses(batches), "fisher", passes)
        if self.mode == "separate":
            self._before = [
                (la, read_matrix(la, "importance").clone(), la.anchor.to(la.win_eta.dtype, copy=True)) for la in layers
            ]

    @torch.no_grad()
    def end_task(self, batches: Sequence[Batch]) -> None:
        for layer, old, anchor in self._before:
            total = read_matrix(layer, "importance")
            weight = layer.weight.to(total.dtype)
            centre = weight + old * (anchor - weight) / total.clamp_min(torch.finfo(total.dtype).tiny)
            layer.unshare("anchor", copy=False)
            layer.anchor.copy_(centre)
        self._before = []

    def _outputs(self, batch: Batch) -> int:
        with torch.no_grad():
            return self.forward(self.model, batch[:1]).shape[-1]

    def _losses(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        for batch in batches:
            if self.fisher == "empirical":
                yield task_loss(self.forward(self.model, batch), batch)
            elif self.fisher == "true":
                logits = masked(self.forward(self.model, batch), batch.allowed)
                labels = draw_tokens(logits.detach().softmax(-1), self.generator)
                yield nn.functional.cross_entropy(logits, labels, reduction="sum")
            else:
                for output in range(self._outputs(batch)):
                    logp = masked(self.forward(self.model, batch), batch.allowed).log_softmax(-1)[:, output]
                    # A gradient times sqrt(p) has p times its square. Outputs that are not allowed have p = 0.
                    root = logp.detach().div(2).exp()
                    yield -(torch.where(root > 0, logp, 0.0) * root).sum()


class SynapticIntelligence(_Penalty):
    """Synaptic Intelligence (Zenke, Poole & Ganguli, "Continual Learning Through Synaptic Intelligence", ICML 2017).

    Along the path of task k each weight is credited with the loss that its movement saved:

        F <- F - (dL/dW) (W_new - W_old)                 at every commit
        Omega <- Omega + relu(F / ((W - W*)^2 + xi));  W* <- W;  F <- 0      when the task ends

    dL/dW is the gradient of the loss alone, never of the penalty, while W_new - W_old is the whole movement. A term
    that another rule adds to the loss (replay, distillation) counts as loss. What a task adds has mean 1.

    Args:
        lam: lambda > 0 of lambda/2 sum Omega (W - W*)^2 per sample.
        xi: the damping, > 0, in units of a squared weight.

    Raises:
        ValueError: for a value out of range.
    """

    kind = "si"

    def __init__(self, lam: float, *, xi: float = 1e-3) -> None:
        super().__init__(lam)
        self.xi = check_number("xi", xi, 0.0, above=True)

    def options(self) -> dict[str, Any]:
        return super().options() | {"si_xi": self.xi}


class MAS(_Penalty):
    """Memory Aware Synapses (Aljundi et al., ECCV 2018): how much each weight moves the output.

    Omega_k = mean over the samples of |d ||f(x)||^2 / dW|, with f the logits (those allowed); no labels are used.
    Measured when task k ends; Omega <- Omega + Omega_k / its mean, W* <- W.

    Args:
        lam: lambda > 0 of lambda/2 sum Omega (W - W*)^2 per sample.

    Raises:
        ValueError: for a value out of range.
    """

    kind = "mas"

    def measure(self, batches: Sequence[Batch]) -> None:
        measure_importance(self.model, self._losses(batches), "mas")

    def _losses(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        for batch in batches:
            logits = self.forward(self.model, batch)
            if batch.allowed is not None:
                logits = torch.where(batch.allowed, logits, 0.0)
            yield logits.square().sum()


def _scale_to_mean(layers: list[Linear]) -> None:
    """Make the mean of what the traces hold the unit of the next consolidation."""
    mean = mean_of((layer, new_importance(layer)) for layer in layers)
    for layer in layers:
        layer.unshare("importance_scale")
        layer.importance_scale.fill_(mean)
