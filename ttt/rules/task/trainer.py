"""`Trainer`: a model that learns one task after another, under any rules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ttt.adapt.convert import learning_layers, refuse_sharded, require_layers
from ttt.checks import check_whole
from ttt.defences import Defence
from ttt.learn import protection
from ttt.learn.any_loss import learning
from ttt.rules.task.base import (
    Batch,
    Forward,
    Rule,
    as_rules,
    check_labels,
    evaluating,
    forward_inputs,
    masked,
    task_loss,
)
from ttt.rules.task.progressive import ProgressiveNet


class Trainer:
    """Steps through tasks; every step is one `ttt.learning` block, so weights change by the fused commit alone.

    Each step minimises cross entropy plus the rules' terms, all summed over samples: ``lr`` is a step per sample.

    Only the weights of layers that `ttt.adapt_` converts, or of `ttt.nn.Linear`, learn. Biases, the parameters of
    BatchNorm and LayerNorm, weights of convolutions and all others keep their values. An optimizer can train
    parameters of modules that were not adapted: make them require grad after `ttt.adapt_`, and call its ``zero_grad()``
    before each `step` and its ``step()`` after it. No rule protects what it writes.

        rules = [EWC(lam=0.1), ExperienceReplay(200)]
        ttt.adapt_(model, ttt.rules.configure(config, rules))
        trainer = ttt.rules.Trainer(model, rules)
        for task in tasks:
            trainer.learn_task(samples_of(task), epochs=5)

    Args:
        model: adapted by `ttt.adapt_`, or made of `ttt.nn.Linear`, under ``configure(config, rules)``.
        rules: none for plain SGD.
        forward: (model, batch) -> (N, K) logits. Default: ``model(batch.x)``.

    Raises:
        ValueError: if the model's configuration is not what the rules need, if a rule serves another model already, or
            if ``rules`` name one object twice.
    """

    def __init__(
        self, model: nn.Module, rules: Sequence[Rule | Defence] = (), *, forward: Forward = forward_inputs
    ) -> None:
        refuse_sharded(model, "a Trainer of tasks")
        self.model, self.rules, self.forward = model, as_rules(rules), forward
        self.task = -1
        self._begun = False
        if len({id(rule) for rule in self.rules}) < len(self.rules):
            raise ValueError(f"rules must be different objects, got {[rule.name for rule in self.rules]}")
        configs = [layer.config for _, layer in learning_layers(model)]
        if isinstance(model, ProgressiveNet):
            configs.append(model.config)  # of columns to come
        for rule in self.rules:
            rule.check_model(model)
            for config in configs:
                for name, value in rule.options().items():
                    held = getattr(config, name)
                    if held != value:
                        raise ValueError(
                            f"{rule.name} needs {name} = {value!r}, but the model was adapted with {held!r}; "
                            "adapt it under ttt.rules.configure(config, rules)"
                        )
        for rule in self.rules:
            rule.attach(model, forward)

    def begin_task(self) -> None:
        """To be called before a task's first step."""
        self.task += 1
        self._begun = True
        for rule in self.rules:
            rule.begin_task(self.task)

    def step(self, batch: Batch) -> float:
        """Learn from ``batch``; returns its mean loss from before.

        Raises:
            RuntimeError: before the first `begin_task`.
            ValueError: if nothing may learn from ``batch``, if a rule cannot keep it, or if ``batch.allowed`` forbids a
                label. No weight and no memory has changed then.
            FloatingPointError: if a gradient is not finite; no weight and no memory has changed then. Random draws of
                the rules, as of what they replay, have gone on: otherwise samples that cause the error would be drawn
                again. So have statistics that a forward pass in training mode collects, as those of BatchNorm.
        """
        if self.task < 0:
            raise RuntimeError("call begin_task() before the first step")
        check_labels(batch)
        with learning(self.model):
            logits = self.forward(self.model, batch)
            own = loss = task_loss(logits, batch)
            for rule in self.rules:
                term = rule.term(batch, logits)
                if term is not None:
                    loss = loss + term
            if not loss.requires_grad:
                raise ValueError("batch passes no layer that may learn, as where its task's column is an old one")
            loss.backward()
        logits = logits.detach()
        for rule in self.rules:
            rule.end_step(batch, logits)
        return float(own.detach()) / max(1, len(batch))

    def end_task(self, batches: Iterable[Batch]) -> None:
        """End a task: measure importance and move the anchors, so that what was learnt is protected from then on.

        Importance is measured with the model in eval mode.

        Args:
            batches: each sample of the task once.

        Raises:
            RuntimeError: without a `begin_task` since the last task ended.
            ValueError: if ``batches`` hold no sample, or a rule cannot end a task with them. No anchor, importance or
                memory of a rule has changed in either case.
        """
        if not self._begun:
            raise RuntimeError("call begin_task() before end_task(), once for each task")
        batches = list(batches)
        self._check_end(batches)
        with evaluating(self.model):
            for rule in self.rules:
                rule.measure(batches)
        protection.consolidate(require_layers(self.model))
        for rule in self.rules:
            rule.end_task(batches)
        self._begun = False

    def _check_end(self, batches: Sequence[Batch]) -> None:
        """Raise ValueError if a task cannot end with ``batches``. Nothing is changed."""
        if not sum(map(len, batches)):
            raise ValueError("batches must hold at least one sample, got none")
        for batch in batches:
            check_labels(batch)
        for rule in self.rules:
            rule.check_end(batches)

    def learn_task(
        self, samples: Batch, *, epochs: int = 1, batch_size: int = 32, generator: torch.Generator | None = None
    ) -> None:
        """A whole task: ``epochs`` passes over ``samples`` in random order, then its end.

        Raises:
            ValueError: for ``epochs`` or ``batch_size`` below 1, or ``samples`` with which a task cannot end. Nothing
                has changed then. Otherwise as `step`.
        """
        check_whole("epochs", epochs, 1)
        check_whole("batch_size", batch_size, 1)
        if not len(samples):
            raise ValueError("samples must hold at least one sample, got none")
        batches = [samples[rows] for rows in torch.arange(len(samples)).split(256)]
        self._check_end(batches)
        self.begin_task()
        for _ in range(epochs):
            for rows in torch.randperm(len(samples), generator=generator).split(batch_size):
                self.step(samples[rows])
        self.end_task(batches)

    @torch.no_grad()
    def accuracy(self, samples: Batch) -> float:
        """Share of ``samples`` whose largest allowed logit is the label's, with the model in eval mode."""
        with evaluating(self.model):
            chosen = masked(self.forward(self.model, samples), samples.allowed).argmax(-1)
        return float((chosen == samples.y).double().mean())

    def state_bytes(self) -> int:
        """Bytes that learning keeps: the layers' buffers and what the rules store; not the weights themselves."""
        held: list[Tensor] = [b for _, layer in learning_layers(self.model) for b in layer.buffers(recurse=False)]
        held += [t for rule in self.rules for t in rule.tensors()]
        return sum(t.numel() * t.element_size() for t in held)
