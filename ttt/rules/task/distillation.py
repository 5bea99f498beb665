"""Learning without Forgetting (LwF), and the distillation loss that it shares with generative replay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ttt.adapt.fork import fork
from ttt.checks import check_number
from ttt.ops.dtypes import accumulation
from ttt.rules.task.base import Batch, Rule


def distillation(student: Tensor, teacher: Tensor, temperature: float, groups: Sequence[Tensor | slice]) -> Tensor:
    """T^2 sum over samples and groups of KL(softmax(teacher / T) || softmax(student / T)).

    Without the factor T^2 the gradient would fall as 1/T^2 (Hinton, Vinyals & Dean, 2015); with it, it tends to the
    gradient of half the squared difference of the centred logits, divided by the size of the group.

    Args:
        student: (N, K) logits; gradients reach these alone.
        teacher: (N, K) logits; -inf for an output that it rules out.
        temperature: T > 0.
        groups: of (k,) int64, or slices: the outputs over which one softmax runs; a group for each head.
    """
    total = student.new_zeros(())
    for group in groups:
        p = (teacher.detach()[:, group] / temperature).softmax(-1)  # not its logarithm, which may be -inf
        q = (student[:, group] / temperature).log_softmax(-1)
        total = total + nn.functional.kl_div(q, p, reduction="sum")
    return temperature**2 * total


class TopLogits(NamedTuple):
    """A teacher's softmax(z / T): the k likeliest outputs, and all others together.

    ``outputs`` (..., k) int32; ``logp`` (..., k + 1) float: their log-probabilities, then that of the rest together.
    """

    outputs: Tensor
    logp: Tensor


@torch.no_grad()
def top_logits(logits: Tensor, k: int, temperature: float) -> TopLogits:
    """`TopLogits` of ``logits`` (..., V) at ``temperature``; at most V outputs are kept one by one."""
    wide = accumulation(logits.dtype)
    logp = (logits.to(wide) / temperature).log_softmax(-1)
    values, index = logp.topk(min(k, logp.shape[-1]), dim=-1)
    return TopLogits(index.int(), torch.cat([values, _rest(logp, index)], -1))


def top_distillation(student: Tensor, teacher: TopLogits, temperature: float) -> Tensor:
    """Distillation from a teacher's k likeliest outputs: T^2 times the divergence over k + 1 outputs, summed.

    The last output stands for all the rest: the student is told how much probability they have together, not how to
    share it. The value is a lower bound of the divergence over all outputs (log sum inequality), and equals it for
    k = V. A squared error of the kept logits would leave the others free to grow.

    Args:
        student: (..., V) logits; gradients reach these alone.
        teacher: at the same ``temperature``.
        temperature: T > 0.
    """
    index, logp = teacher.outputs.long(), teacher.logp
    q = (student / temperature).log_softmax(-1)
    kept = q.gather(-1, index)
    if index.shape[-1] < student.shape[-1]:
        kept = torch.cat([kept, _rest(q, index)], -1)
    p = logp[..., : kept.shape[-1]].exp()
    return temperature**2 * nn.functional.kl_div(kept, p, reduction="sum")


def _rest(logp: Tensor, index: Tensor) -> Tensor:
    """Log-probability, (..., 1), of all outputs that are not in ``index`` (..., k)."""
    return logp.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True)


class SeenOutputs:
    """The outputs that earlier tasks taught, in groups that share a softmax.

    With heads (`Batch.allowed`) each head is a group. Without heads, all labels seen so far form one group.
    """

    def __init__(self) -> None:
        self.groups: list[Tensor] = []
        self.heads = True

    def add(self, batches: Iterable[Batch]) -> None:
        """Add the outputs of ``batches``."""
        for batch in batches:
            if batch.allowed is None:
                self.heads = False
                labels = torch.cat([*self.groups[:1], batch.y]).unique()
                self.groups[:1] = [labels]
                continue
            for head in batch.allowed.unique(dim=0):
                outputs = head.nonzero().flatten()
                if not any(torch.equal(outputs, known) for known in self.groups):
                    self.groups.append(outputs)


class LwF(Rule):
    """Learning without Forgetting: on the new task's inputs the model is to answer as the old model did.

    Li & Hoiem, ECCV 2016:

        loss += weight T^2 KL(softmax(f*(x) / T) || softmax(f(x) / T))

    f* is the model at the end of the last task, in eval mode. The softmax runs over the outputs that earlier tasks
    taught, head by head where there are heads. The rule keeps a fork of the model, which shares all that learning does
    not write.

    Args:
        weight: of the distillation against the loss, both summed over samples; >= 0.
        temperature: T > 0.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(self, weight: float = 1.0, *, temperature: float = 2.0) -> None:
        self.weight = check_number("weight", weight, 0.0)
        self.temperature = check_number("temperature", temperature, 0.0, above=True)
        self.seen = SeenOutputs()
        self.teacher: nn.Module | None = None

    def term(self, batch: Batch, logits: Tensor) -> Tensor | None:
        if self.teacher is None:
            return None
        with torch.no_grad():
            target = self.forward(self.teacher, batch)
        return self.weight * distillation(logits, target, self.temperature, self.seen.groups)

    def end_task(self, batches: Sequence[Batch]) -> None:
        self.seen.add(batches)
        self.teacher = fork(self.model).eval()

    def tensors(self) -> Iterable[Tensor]:
        return () if self.teacher is None else [p.detach() for p in self.teacher.parameters()]
