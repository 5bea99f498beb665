"""The trainer: plain SGD without rules, rules that compose, and what it refuses."""

import copy

import pytest
import torch
from helpers import plain_config
from tiny_tasks import layers_of, plain_mlp, samples, trainer_of

import ttt
from ttt.rules import EWC, MAS, ExperienceReplay, LayerReplay, LwF, SynapticIntelligence, Trainer, configure


def test_without_rules_a_step_is_sgd_on_the_summed_loss():
    model, data = plain_mlp(), samples(16, (1, 2), heads=(1, 2))
    trainer, _ = trainer_of([], lr=0.03, model=copy.deepcopy(model))
    trainer.begin_task()
    weights = [model[0].weight, model[2].weight]
    for _ in range(3):
        said = trainer.step(data)
        loss = torch.nn.functional.cross_entropy(model(data.x)[:, 1:3], data.y - 1, reduction="sum")
        assert said == pytest.approx(float(loss.detach()) / 16, rel=1e-10)
        for w, g in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            w.data.sub_(0.03 * g)
    for layer, w in zip(layers_of(trainer), weights, strict=True):
        torch.testing.assert_close(layer.weight.detach(), w.detach(), rtol=1e-10, atol=1e-12)


def test_rules_compose():
    rules = [EWC(0.1, seed=1), LwF(0.1), ExperienceReplay(30, seed=2)]
    torch.manual_seed(0)
    trainer, _ = trainer_of(rules)
    alone, _ = trainer_of([EWC(0.1, seed=1)])
    data = [samples(30), samples(30)]
    for each in (trainer, alone):
        for task in data:
            each.learn_task(task, epochs=2, generator=torch.Generator().manual_seed(1))
    assert len(rules[2].reservoir) == 30
    assert all(float(la.importance.sum()) > 0 for la in layers_of(trainer))
    assert trainer.state_bytes() > alone.state_bytes()
    assert 0 <= trainer.accuracy(data[1]) <= 1


def test_rules_that_need_different_commits_are_refused():
    config = plain_config()
    with pytest.raises(ValueError, match="EWC and SynapticIntelligence need importance = 'fisher' and 'si'"):
        configure(config, [EWC(0.1), SynapticIntelligence(0.1)])
    with pytest.raises(ValueError, match=r"need ewc_lambda = 0\.1 and 0\.2"):
        configure(config, [EWC(0.1), EWC(0.2)])
    with pytest.raises(ValueError, match="EWC and LayerReplay need replay_rows = 0 and 16"):
        configure(config, [EWC(0.1, mode="separate"), LayerReplay(16)])
    assert configure(config, [EWC(0.1), LayerReplay(16)]).replay_rows == 16
    plain = configure(config, [])
    assert (plain.ewc_lambda, plain.replay_rows) == (0.0, 0)


def test_a_model_adapted_for_other_rules_is_refused():
    model = ttt.adapt_(plain_mlp(), configure(plain_config(target_modules="all-linear"), [EWC(0.1)]))
    with pytest.raises(ValueError, match="MAS needs importance = 'mas', but the model was adapted with 'fisher'"):
        Trainer(model, [MAS(0.1)])


@pytest.mark.parametrize("make", [lambda: EWC(0.1), LwF, lambda: ExperienceReplay(20)])
def test_a_rule_that_serves_another_model_is_refused(make):
    rule = make()
    trainer, _ = trainer_of([rule])
    with pytest.raises(ValueError, match=f"{rule.name} serves another model already"):
        trainer_of([make(), rule] if rule.options() == {} else [rule])
    assert rule.model is trainer.model
    assert Trainer(trainer.model, [rule]).rules == [rule]


def test_a_rule_that_was_refused_may_serve_another_model():
    rule, model = LwF(), ttt.adapt_(plain_mlp(), configure(plain_config(target_modules="all-linear"), [EWC(0.1)]))
    with pytest.raises(ValueError, match="MAS needs importance"):
        Trainer(model, [rule, MAS(0.1)])
    assert trainer_of([rule])[0].rules == [rule]


def test_one_rule_given_twice_is_refused():
    rule = LwF()
    with pytest.raises(ValueError, match=r"rules must be different objects, got \['LwF', 'LwF'\]"):
        trainer_of([rule, rule])


def test_a_step_before_the_first_task_and_bad_gradients_are_refused():
    trainer, start = trainer_of([])
    with pytest.raises(RuntimeError, match="begin_task"):
        trainer.step(samples())
    trainer.begin_task()
    bad = samples(4)
    bad.x[1] = torch.nan
    with pytest.raises(FloatingPointError, match="nothing was learnt"):
        trainer.step(bad)
    for layer, w in zip(layers_of(trainer), start, strict=True):
        assert torch.equal(layer.weight, w)


def test_accuracy_counts_only_open_outputs():
    trainer, _ = trainer_of([])
    data = samples(50, (1, 3), heads=(1, 3))
    with torch.no_grad():
        logits = trainer.model(data.x)
    chosen = torch.where(logits[:, 3] > logits[:, 1], 3, 1)
    assert trainer.accuracy(data) == pytest.approx(float((chosen == data.y).double().mean()))
    assert bool((logits.argmax(1) != chosen).any())
