"""The tasks of the suite "digits": scikit-learn's 8x8 digits, split by class or with permuted pixels.

One fifth of the 1797 images is the test set, the same for every seed. A seed draws the order of the classes, the
permutations, the network and the batches. Tuning does not use the test set: it scores on a fifth of the other images.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from ttt.rules.task.base import Batch

SCENARIOS = ("split-class", "split-domain", "split-task", "permuted")
CLASSES, PER_TASK, PERMUTED_TASKS = 10, 2, 10


@dataclasses.dataclass(frozen=True)
class Task:
    """The training and test samples of one task."""

    train: Batch
    test: Batch


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A sequence of tasks for a model of ``inputs`` features and ``outputs`` logits."""

    name: str
    tasks: list[Task]
    inputs: int
    outputs: int


@functools.cache
def _images() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'ttt[bench]'") from error
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y, dtype=torch.int64)


def _fifth(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """(indices of four fifths of each class, drawn at random; indices of the other fifth)."""
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        cut = len(rows) // 5
        parts[0].append(rows[cut:])
        parts[1].append(rows[:cut])
    return torch.cat(parts[0]), torch.cat(parts[1])


def scenario(name: str, seed: int, *, tuning: bool = False) -> Scenario:
    """The tasks of the scenario ``name`` for ``seed``.

    * ``split-class``: five tasks of two classes each; 10 outputs, all of which are always allowed.
    * ``split-domain``: the same tasks; 2 outputs, which say which of the task's two classes an image belongs to.
    * ``split-task``: the same tasks; 10 outputs, of which only the task's two are allowed: the model is told the task.
    * ``permuted``: ten tasks of all classes; each permutes the 64 pixels in its own way, except the first.

    Args:
        tuning: train on four fifths of the training images and score on the others, instead of the test set.

    Raises:
        ValueError: for a name not in `SCENARIOS`.
    """
    if name not in SCENARIOS:
        raise ValueError(f"scenario must be one of {SCENARIOS}, got {name!r}")
    x, y = _images()
    train, test = _fifth(y, 0)
    if tuning:
        kept, held = _fifth(y[train], 1)
        train, test = train[kept], train[held]
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    if name == "permuted":
        for t in range(PERMUTED_TASKS):
            pixels = torch.randperm(x.shape[1], generator=generator) if t else torch.arange(x.shape[1])
            tasks.append(Task(*(Batch(x[rows][:, pixels], y[rows]) for rows in (train, test))))
        return Scenario(name, tasks, x.shape[1], CLASSES)
    order = torch.randperm(CLASSES, generator=generator)
    for t, classes in enumerate(order.split(PER_TASK)):
        tasks.append(Task(*(_split(name, x, y, rows, t, classes) for rows in (train, test))))
    return Scenario(name, tasks, x.shape[1], PER_TASK if name == "split-domain" else CLASSES)


def _split(name: str, x: Tensor, y: Tensor, rows: Tensor, task: int, classes: Tensor) -> Batch:
    """The images among ``rows`` that belong to ``classes``, labelled as the scenario ``name`` does."""
    mine = rows[torch.isin(y[rows], classes)]
    if name == "split-domain":
        return Batch(x[mine], (y[mine] == classes[1]).long())
    if name == "split-class":
        return Batch(x[mine], y[mine])
    allowed = torch.zeros(CLASSES, dtype=torch.bool)
    allowed[classes] = True
    return Batch(x[mine], y[mine], torch.full_like(mine, task), allowed.expand(len(mine), -1).contiguous())


def joined(tasks: list[Task]) -> Batch:
    """The training samples of several tasks as one."""
    parts = [task.train for task in tasks]
    fields = {}
    for name in parts[0].tensors():
        held = [t for part in parts if (t := part.tensors()[name]) is not None]
        fields[name] = torch.cat(held) if held else None
    return Batch(**fields)  # type: ignore[arg-type]
