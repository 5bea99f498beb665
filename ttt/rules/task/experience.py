"""Experience replay (ER) and dark experience replay (DER, DER++): remembered samples are learnt again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from ttt.checks import check_choice, check_number, check_whole
from ttt.rules.reservoir import SampleReservoir
from ttt.rules.task.base import Batch, Rule, task_loss

FILL = ("step", "task")


class ExperienceReplay(Rule):
    """Experience replay: every step also learns from samples drawn from a reservoir.

    Ratcliff 1990; Chaudhry et al., "On Tiny Episodic Memories in Continual Learning", 2019:

        loss += weight sum_r CE(f(x_r), y_r)

    Args:
        capacity: samples in the reservoir.
        rows: samples drawn for each step.
        weight: of a replayed sample against a new one, >= 0.
        fill: "step": samples enter after each step that uses them, once for each epoch, as in a stream;
            "task": each enters once, when its task ends.
        seed: of the reservoir and the draws.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self, capacity: int, *, rows: int = 32, weight: float = 1.0, fill: str = "step", seed: int = 0
    ) -> None:
        self.rows = check_whole("rows", rows, 1)
        self.weight = check_number("weight", weight, 0.0)
        self.fill = check_choice("fill", fill, FILL)
        self.reservoir = SampleReservoir(capacity, seed)

    def term(self, batch: Batch, logits: Tensor) -> Tensor | None:
        if self.fill == "step":
            self.reservoir.check(**batch.tensors())
        held = self.draw()
        return None if held is None else self.weight * task_loss(self.forward(self.model, held), held)

    def draw(self) -> Batch | None:
        """A batch of remembered samples; None while the reservoir is empty."""
        fields = self.reservoir.draw(self.rows)
        return Batch(**fields) if fields else None  # type: ignore[arg-type]

    def end_step(self, batch: Batch, logits: Tensor) -> None:
        if self.fill == "step":
            self.reservoir.insert(**batch.tensors())

    def check_end(self, batches: Sequence[Batch]) -> None:
        if self.fill == "task":
            for batch in batches:
                self.reservoir.check(**batch.tensors())

    def end_task(self, batches: Sequence[Batch]) -> None:
        if self.fill == "task":
            for batch in batches:
                self.reservoir.insert(**batch.tensors())

    def tensors(self) -> Iterable[Tensor]:
        return self.reservoir.tensors()


class DarkExperienceReplay(Rule):
    """Dark experience replay (DER, DER++): remembered samples come back with the logits that the model gave for them.

    Buzzega et al., "Dark Experience for General Continual Learning", NeurIPS 2020. With each sample x the reservoir
    keeps the logits z of the step in which x was learnt. Every step learns from two independent draws:

        loss += alpha sum_r |f(x_r) - z_r|^2  +  beta sum_s CE(f(x_s), y_s)        beta = 0: DER; beta > 0: DER++

    The squared error is summed over the K outputs; code that takes its mean has an alpha K times as large.

    Args:
        capacity: samples in the reservoir.
        alpha: at least 0.
        beta: at least 0.
        rows: samples in each draw.
        seed: of the reservoir and the draws.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(self, capacity: int, *, alpha: float = 0.1, beta: float = 0.5, rows: int = 32, seed: int = 0) -> None:
        self.rows = check_whole("rows", rows, 1)
        self.alpha = check_number("alpha", alpha, 0.0)
        self.beta = check_number("beta", beta, 0.0)
        self.reservoir = SampleReservoir(capacity, seed)

    def term(self, batch: Batch, logits: Tensor) -> Tensor | None:
        self.reservoir.check(**batch.tensors(), logits=logits)
        if not len(self.reservoir):
            return None
        total = None
        if self.alpha:
            held, stored = self.draw()
            total = self.alpha * (self.forward(self.model, held) - stored).square().sum()
        if self.beta:
            held, _ = self.draw()
            labels = self.beta * task_loss(self.forward(self.model, held), held)
            total = labels if total is None else total + labels
        return total

    def draw(self) -> tuple[Batch, Tensor]:
        """Remembered samples, and the logits (N, K) stored with them."""
        fields = self.reservoir.draw(self.rows)
        stored = fields.pop("logits")
        assert stored is not None
        return Batch(**fields), stored  # type: ignore[arg-type]

    def end_step(self, batch: Batch, logits: Tensor) -> None:
        self.reservoir.insert(**batch.tensors(), logits=logits)

    def tensors(self) -> Iterable[Tensor]:
        return self.reservoir.tensors()
