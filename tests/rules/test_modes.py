"""In which mode the model runs: tasks are learnt in the user's, and everything that only measures runs in eval mode."""

import pytest
import torch
from helpers import plain_config
from tiny_tasks import HIDDEN, INPUTS, OUTPUTS, samples

import ttt
from ttt.rules import EWC, MAS, GenerativeReplay, LwF, Trainer, configure, measure_importance


def trainer_of(rules):
    """A trainer of a model whose outputs depend on its mode, and whose second half has a mode of its own."""
    half = torch.nn.Sequential(torch.nn.BatchNorm1d(HIDDEN), torch.nn.Dropout(0.5)).double()
    model = torch.nn.Sequential(
        torch.nn.Linear(INPUTS, HIDDEN).double(),
        torch.nn.BatchNorm1d(HIDDEN).double(),
        torch.nn.Dropout(0.5),
        half.eval(),
        torch.nn.Linear(HIDDEN, OUTPUTS).double(),
    )
    config = configure(plain_config(target_modules="all-linear", lr=0.01, window=1), rules)
    trainer = Trainer(ttt.adapt_(model, config), rules)
    assert [m.training for m in trainer.model.modules()].count(False) == 3
    return trainer


def running(trainer):
    """The buffers that batch normalisation writes in training mode."""
    return [b.clone() for n, b in trainer.model.named_buffers() if "running" in n or "batches" in n]


def unchanged(trainer, before, modes):
    assert [m.training for m in trainer.model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(running(trainer), before, strict=True))


@pytest.mark.parametrize("rule", [LwF, GenerativeReplay])
def test_a_teacher_answers_in_eval_mode(rule):
    rule = rule()
    trainer = trainer_of([rule])
    first = samples(40)
    trainer.learn_task(first)
    assert trainer.model.training
    assert not any(module.training for module in rule.teacher.modules())
    held = [b.clone() for b in rule.teacher.buffers()]
    trainer.begin_task()
    trainer.step(samples(40))
    assert all(torch.equal(a, b) for a, b in zip(rule.teacher.buffers(), held, strict=True))
    assert torch.equal(rule.teacher(first.x), rule.teacher(first.x))


def test_accuracy_is_that_of_the_model_in_eval_mode():
    trainer = trainer_of([])
    data = samples(200)
    trainer.learn_task(data, epochs=3)
    before, modes = running(trainer), [m.training for m in trainer.model.modules()]
    said = trainer.accuracy(data)
    unchanged(trainer, before, modes)
    trainer.model.eval()
    with torch.no_grad():
        expected = float((trainer.model(data.x).argmax(-1) == data.y).double().mean())
    assert said == expected


@pytest.mark.parametrize("make", [lambda: EWC(0.1, fisher="empirical"), lambda: EWC(0.1, fisher="exact"),
                                  lambda: MAS(0.1)])  # fmt: skip
def test_importance_is_that_of_the_model_in_eval_mode(make):
    found = []
    for training in (True, False):
        torch.manual_seed(0)
        trainer = trainer_of([make()])
        data = samples(20)
        trainer.begin_task()
        if not training:
            trainer.model.eval()
        before, modes = running(trainer), [m.training for m in trainer.model.modules()]
        trainer.end_task([data[:12], data[12:]])
        unchanged(trainer, before, modes)
        found.append([layer.importance.clone() for _, layer in ttt.learning_layers(trainer.model)])
    assert all(torch.equal(a, b) and float(a.sum()) > 0 for a, b in zip(*found, strict=True))


def test_losses_of_measure_importance_are_drawn_in_eval_mode_also_where_one_raises():
    trainer = trainer_of([EWC(0.1)])
    data, modes = samples(8), [m.training for m in trainer.model.modules()]

    def losses():
        assert not any(module.training for module in trainer.model.modules())
        yield trainer.model(data.x).square().sum()
        raise KeyError("no more")

    with pytest.raises(KeyError):
        measure_importance(trainer.model, losses())
    assert [m.training for m in trainer.model.modules()] == modes
