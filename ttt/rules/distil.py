"""Learning without Forgetting, and the distillation that it shares with generative replay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ttt.checks import check_number
from ttt.fork import fork
from ttt.rules.base import Batch, Rule


def distillation(student: Tensor, teacher: Tensor, temperature: float, groups: Sequence[Tensor]) -> Tensor:
    """T^2 sum over samples and groups of KL(softmax(teacher / T) || softmax(student / T)).

    Without the factor T^2 the gradient would fall as 1/T^2 (Hinton, Vinyals & Dean, 2015); with it, it tends to the
    gradient of half the squared difference of the centred logits, divided by the size of the group.

    Args:
        student: (N, K) logits; gradients reach these alone.
        teacher: (N, K) logits; -inf for an output that it rules out.
        temperature: T > 0.
        groups: of (k,) int64: the outputs over which one softmax runs; a group for each head.
    """
    total = student.new_zeros(())
    for group in groups:
        p = (teacher.detach()[:, group] / temperature).softmax(-1)  # not its logarithm, which may be -inf
        q = (student[:, group] / temperature).log_softmax(-1)
        total = total + nn.functional.kl_div(q, p, reduction="sum")
    return temperature**2 * total


class SeenOutputs:
    """The outputs that earlier tasks taught, in groups that share a softmax.

    With heads (`Batch.allowed`) each head is a group; without, all labels seen so far are one.
    """

    def __init__(self) -> None:
        self.groups: list[Tensor] = []
        self.heads = True

    def add(self, batches: Iterable[Batch]) -> None:
        """Note the outputs of ``batches``."""
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
    """Learning without Forgetting (Li & Hoiem, ECCV 2016): on the new task's inputs, answer as the old model did.

    loss += weight T^2 KL(softmax(f*(x) / T) || softmax(f(x) / T)), f* being the model as the last task left it, over
    the outputs that earlier tasks taught: head by head where there are heads, else one softmax over the labels seen.

    It keeps a fork of the model, which has weights of its own and shares the rest.

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
        self.teacher = fork(self.model)

    def tensors(self) -> Iterable[Tensor]:
        return () if self.teacher is None else [p.detach() for p in self.teacher.parameters()]
