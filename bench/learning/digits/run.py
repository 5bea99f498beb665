"""One run of the suite: a method learns the tasks of a scenario in turn, and is scored on all of them after each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import ttt
from bench.learning.digits.methods import BUFFER, Options, fits, method
from bench.learning.digits.tasks import Scenario, Task, joined, scenario
from ttt.defences import Defence
from ttt.rules import ProgressiveNet, Rule, Trainer, configure, forward_task
from ttt.rules.task.progressive import Ones

HIDDEN, BATCH = 100, 32
EPOCHS = {"split-class": 20, "split-domain": 20, "split-task": 20, "permuted": 10}


def network(inputs: int, outputs: int, hidden: int = HIDDEN) -> nn.Module:
    """A multilayer perceptron whose biases are weights of a constant input, so that they learn and are protected."""
    return nn.Sequential(
        Ones(),
        nn.Linear(inputs + 1, hidden, bias=False),
        nn.ReLU(),
        Ones(),
        nn.Linear(hidden + 1, outputs, bias=False),
    )


def _trainer(found: Scenario, rules: Sequence[Rule | Defence], lr: float, seed: int) -> Trainer:
    # window=1: every batch is committed at once. The rate is constant, as the options give it.
    plain = ttt.TTTConfig(
        target_modules="all-linear", rate="constant", lr=lr, clip=None, window=1, replay_capacity=BUFFER, seed=seed
    )
    config = configure(plain, rules)
    torch.manual_seed(seed)
    if any(getattr(rule, "architecture", False) for rule in rules):
        net = ProgressiveNet((found.inputs, HIDDEN, found.outputs), config)
        return Trainer(net, rules, forward=forward_task)
    return Trainer(ttt.adapt_(network(found.inputs, found.outputs), config), rules)


def _row(trainer: Trainer, tasks: list[Task], columns: int | None = None) -> list[float | None]:
    return [trainer.accuracy(t.test) if columns is None or j < columns else None for j, t in enumerate(tasks)]


def run(
    scenario_name: str,
    method_name: str,
    seed: int,
    options: Options,
    *,
    epochs: int | None = None,
    tuning: bool = False,
) -> dict[str, Any]:
    """One run.

    Args:
        epochs: passes over the samples of each task; by default those of `EPOCHS`.
        tuning: score on training images instead of the test set, see `bench.learning.digits.tasks.scenario`.

    Returns:
        A dict of plain values.

        * ``matrix``: in row i the accuracy on each task after task i; None for a task for which the model has no column
        * ``untrained``: accuracy on each task before any learning
        * ``seconds``: processor time of learning
        * ``samples``: number of samples learnt from, counting each epoch
        * ``state_bytes``: bytes that learning keeps at the end

    Raises:
        ValueError: for an unknown scenario or method, or a method that cannot run there.
    """
    if not fits(method_name, scenario_name):
        raise ValueError(f"{method_name} must be told the task: it runs in 'split-task' only, got {scenario_name!r}")
    found = scenario(scenario_name, seed, tuning=tuning)
    epochs = EPOCHS[scenario_name] if epochs is None else epochs
    build = method(method_name).build
    order = torch.Generator().manual_seed(seed)
    trainer = _trainer(found, build(options, seed), options["lr"], seed)
    fresh = _trainer(found, [], options["lr"], seed)
    untrained = [fresh.accuracy(task.test) for task in found.tasks]
    matrix, seconds, samples = [], 0.0, 0
    for i, task in enumerate(found.tasks):
        data = task.train
        if method_name == "joint":
            trainer = _trainer(found, [], options["lr"], seed)
            data = joined(found.tasks[: i + 1])
        began = time.process_time()
        if method_name != "frozen" or i == 0:
            trainer.learn_task(data, epochs=epochs, batch_size=BATCH, generator=order)
            samples += epochs * len(data)
        seconds += time.process_time() - began
        grows = any(rule.architecture for rule in trainer.rules)
        matrix.append(_row(trainer, found.tasks, i + 1 if grows else None))
    return {
        "matrix": matrix,
        "untrained": untrained,
        "seconds": round(seconds, 4),
        "samples": samples,
        "state_bytes": trainer.state_bytes(),
    }
