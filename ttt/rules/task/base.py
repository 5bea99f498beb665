"""`Batch` and `Rule`, the parts of every learning rule for tasks, and the losses that rules share."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ttt.checks import check_type
from ttt.config import TTTConfig
from ttt.defences import SWITCHES, Defence


@dataclasses.dataclass(frozen=True)
class Batch:
    """N samples.

    Attributes:
        x: (N, ...) inputs.
        y: (N,) int64, the output each sample should choose.
        task: (N,) int64, the task each sample belongs to; None where nobody says (class- and domain-incremental).
        allowed: (N, K) bool, the outputs each sample may choose among; None for all of them. A model that is told
            the task at test time (task-incremental) gets its heads this way.
    """

    x: Tensor
    y: Tensor
    task: Tensor | None = None
    allowed: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor | slice) -> Batch:
        return Batch(**{name: None if t is None else t[rows] for name, t in self.tensors().items()})  # type: ignore[arg-type]

    def tensors(self) -> dict[str, Tensor | None]:
        """The fields by name."""
        return {"x": self.x, "y": self.y, "task": self.task, "allowed": self.allowed}


Forward = Callable[[nn.Module, Batch], Tensor]


def forward_inputs(model: nn.Module, batch: Batch) -> Tensor:
    """The usual forward pass: logits (N, K) from ``batch.x`` alone."""
    return model(batch.x)


def masked(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """(N, K) logits, -inf where an output is not allowed."""
    return logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)


def check_labels(batch: Batch) -> Batch:
    """``batch``, if each of its labels is among the outputs that its sample is allowed.

    Raises:
        ValueError: otherwise.
    """
    if batch.allowed is None or not len(batch):
        return batch
    y = batch.y
    known = (y >= 0) & (y < batch.allowed.shape[1])  # cross entropy refuses others, or leaves them out (-100)
    allowed = batch.allowed.gather(1, torch.where(known, y, 0)[:, None])[:, 0]
    if bool((known & ~allowed).any()):
        row = int((known & ~allowed).nonzero()[0])
        outputs = batch.allowed[row].nonzero().flatten().tolist()
        raise ValueError(f"y must be labels that allowed permits: y[{row}] is {int(y[row])}, and allowed has {outputs}")
    return batch


def task_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross entropy of (N, K) logits, summed over the samples, among the outputs each sample is allowed."""
    return nn.functional.cross_entropy(masked(logits, batch.allowed), batch.y, reduction="sum")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run ``model`` in eval mode inside of the block: without dropout, and without new statistics of its batches.

    Afterwards every module is in the mode that it was in, also one whose mode is not that of ``model``.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Rule:
    """A rule against forgetting. Rules compose: a `Trainer` takes any number of them.

    A rule can act in three places: settings of the `TTTConfig` (what the fused commit does), terms of the loss, and
    the boundary between tasks. One object serves one model.
    """

    architecture: ClassVar[bool] = False
    """Whether the rule changes the model's shape."""

    model: nn.Module
    forward: Forward

    @property
    def name(self) -> str:
        """What errors call this rule."""
        return type(self).__name__

    def options(self) -> dict[str, Any]:
        """Settings that this rule needs: fields of `TTTConfig`, or flat names of its defences (`ttt.defences`)."""
        return {}

    def check_model(self, model: nn.Module) -> None:
        """Called before any rule is attached to ``model``.

        Raises:
            ValueError: if the rule serves another model.
        """
        if getattr(self, "model", model) is not model:
            raise ValueError(f"{self.name} serves another model already; models must have rules of their own")

    def attach(self, model: nn.Module, forward: Forward) -> None:
        """Called by the `Trainer`, after `check_model`."""
        self.check_model(model)
        self.model, self.forward = model, forward

    def begin_task(self, task: int) -> None:
        """Before the first step of task number ``task``, counted from 0."""

    def term(self, batch: Batch, logits: Tensor) -> Tensor | None:
        """A term of the loss, summed over samples; called where gradients are captured. ``logits`` (N, K)."""
        return None

    def end_step(self, batch: Batch, logits: Tensor) -> None:
        """After a step: what the model said about ``batch`` before it learnt from it."""

    def check_end(self, batches: Sequence[Batch]) -> None:
        """Before a task that ends with ``batches`` changes anything.

        Raises:
            ValueError: if the task cannot end with them.
        """

    def measure(self, batches: Sequence[Batch]) -> None:
        """After the last step of a task, before anchors move: ``batches`` holds each of its samples once.

        The model is in eval mode while this runs.
        """

    def end_task(self, batches: Sequence[Batch]) -> None:
        """After anchors and importance have moved."""

    def tensors(self) -> Iterable[Tensor]:
        """What the rule itself keeps between steps, for counting bytes."""
        return ()


class _Configured(Rule):
    """A defence of `TTTConfig` as a rule: it only sets options."""

    def __init__(self, defence: Defence) -> None:
        self.defence = defence

    @property
    def name(self) -> str:
        return type(self.defence).__name__

    def options(self) -> dict[str, Any]:
        return {flat: getattr(self.defence, own) for own, flat in self.defence.flat.items()}


def as_rules(rules: Iterable[Rule | Defence]) -> list[Rule]:
    """The rules, with each defence made a rule that sets its options.

    Raises:
        TypeError: if ``rules`` is no iterable.
        ValueError: for a defence whose importance has to be measured when a task ends, or something that is neither.
    """
    out: list[Rule] = []
    for rule in check_type("rules", rules, Iterable, "a list of ttt.rules.Rule or defences"):
        if isinstance(rule, Defence):
            if rule.switch == "ewc_lambda":
                name = type(rule).__name__
                instead = {"SI": "SynapticIntelligence"}.get(name, name)
                raise ValueError(
                    f"rules must measure importance when a task ends: use ttt.rules.{instead} instead of ttt.{name}"
                )
            rule = _Configured(rule)
        if not isinstance(rule, Rule):
            raise ValueError(f"rules must hold ttt.rules.Rule objects or defences, got {rule!r}")
        out.append(rule)
    return out


def configure(config: TTTConfig, rules: Iterable[Rule | Defence]) -> TTTConfig:
    """``config`` with the defences and settings that ``rules`` need, and with all other defences switched off.

    Raises:
        ValueError: if two rules need different values of one setting.
    """
    wanted: dict[str, Any] = {}
    source: dict[str, str] = {}
    for rule in as_rules(rules):
        for name, value in rule.options().items():
            if wanted.get(name, value) != value:
                pair = f"{source[name]} and {rule.name}"
                raise ValueError(f"rules cannot be combined: {pair} need {name} = {wanted[name]!r} and {value!r}")
            wanted[name], source[name] = value, rule.name
    return config.with_flat(**{**SWITCHES, "momentum": 0.0, **wanted})
