"""The trainer: plain SGD without rules, rules that compose, and what it refuses."""

import copy

import pytest
import torch
from helpers import plain_config
from tiny_tasks import layers_of, plain_mlp, samples, trainer_of

import ttt
from ttt.rules import (
    EWC,
    MAS,
    Batch,
    DarkExperienceReplay,
    ExperienceReplay,
    GenerativeReplay,
    LayerReplay,
    LwF,
    SynapticIntelligence,
    Trainer,
    configure,
)


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


def state_of(trainer):
    """All that learning has written: weights, buffers of the layers, and what the rules keep."""
    state = {name: t.detach().clone() for name, t in trainer.model.state_dict().items()}
    kept = [t.clone() for rule in trainer.rules for t in rule.tensors()]
    return trainer.task, state, kept


def assert_unchanged(trainer, before):
    task, state, kept = state_of(trainer)
    assert task == before[0]
    assert [name for name, t in state.items() if not torch.equal(t, before[1][name])] == []
    assert len(kept) == len(before[2])
    assert all(map(torch.equal, kept, before[2]))


@pytest.mark.parametrize("kind", ["true", "empirical", "stream"])
def test_a_task_that_cannot_end_has_changed_nothing(kind):
    trainer, _ = trainer_of([EWC(0.1, fisher=kind), GenerativeReplay()])
    trainer.learn_task(samples(40))
    trainer.begin_task()
    few = samples(3)
    trainer.step(few)
    before, groups = state_of(trainer), len(trainer.rules[1].seen.groups)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"x must be at least 4 inputs of shape \(5,\), got \(3, 5\)"):
            trainer.end_task([few])
        with pytest.raises(ValueError, match="batches must hold at least one sample, got none"):
            trainer.end_task([])
        with pytest.raises(ValueError, match="x must be finite"):
            trainer.end_task([Batch(torch.full((4, 5), torch.nan).double(), torch.zeros(4, dtype=torch.int64))])
    assert_unchanged(trainer, before)
    assert len(trainer.rules[1].seen.groups) == groups
    trainer.end_task([samples(12)])
    before = state_of(trainer)
    with pytest.raises(ValueError, match="x must be at least 4 inputs"):
        trainer.learn_task(few)
    assert_unchanged(trainer, before)


@pytest.mark.parametrize("rules", [lambda: [], lambda: [EWC(0.1)], lambda: [LwF(), ExperienceReplay(9, fill="task")]])
def test_a_task_ends_once_after_it_has_begun(rules):
    trainer, _ = trainer_of(rules())
    data, before = samples(8), state_of(trainer)
    with pytest.raises(RuntimeError, match=r"call begin_task\(\) before end_task\(\)"):
        trainer.end_task([data])
    assert_unchanged(trainer, before)
    trainer.begin_task()
    for nothing in ([], [data[:0]]):
        with pytest.raises(ValueError, match="batches must hold at least one sample, got none"):
            trainer.end_task(nothing)
    trainer.end_task([data])
    before = state_of(trainer)
    with pytest.raises(RuntimeError, match="once for each task"):
        trainer.end_task([data])
    assert_unchanged(trainer, before)


def test_what_learn_task_refuses_has_changed_nothing():
    trainer, _ = trainer_of([EWC(0.1)])
    data, before = samples(8), state_of(trainer)
    for name, value in [("epochs", 0), ("epochs", -1), ("epochs", "2"), ("batch_size", 0), ("batch_size", 1.5)]:
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got {value!r}"):
            trainer.learn_task(data, **{name: value})
    with pytest.raises(ValueError, match="samples must hold at least one sample"):
        trainer.learn_task(data[:0])
    assert_unchanged(trainer, before)


def test_a_label_that_is_not_allowed_is_refused():
    trainer, _ = trainer_of([ExperienceReplay(9)])
    trainer.begin_task()
    data = samples(6, (1, 2), heads=(1, 2))
    trainer.step(data)
    data.y[3], before = 0, state_of(trainer)
    message = r"y must be labels that allowed permits: y\[3\] is 0, and allowed has \[1, 2\]"
    with pytest.raises(ValueError, match=message):
        trainer.step(data)
    with pytest.raises(ValueError, match=message):
        trainer.end_task([data])
    with pytest.raises(ValueError, match=message):
        trainer.learn_task(data)
    assert_unchanged(trainer, before)


@pytest.mark.parametrize("rule", [lambda: ExperienceReplay(9), lambda: DarkExperienceReplay(9)])
def test_a_batch_that_a_reservoir_cannot_keep_is_not_learnt(rule):
    trainer, _ = trainer_of([rule()])
    trainer.begin_task()
    trainer.step(samples(6))
    before = state_of(trainer)
    with pytest.raises(ValueError, match=r"fields must be .* as before"):
        trainer.step(samples(6, heads=(0, 1, 2, 3)))
    assert_unchanged(trainer, before)


@pytest.mark.parametrize("rule", [lambda: ExperienceReplay(9), lambda: DarkExperienceReplay(9), GenerativeReplay])
def test_gradients_that_are_not_finite_change_no_weight_and_no_memory(rule):
    trainer, _ = trainer_of([rule()])
    trainer.learn_task(samples(8))
    trainer.begin_task()
    before, bad = state_of(trainer), samples(4)
    bad.x[1] = torch.nan
    with pytest.raises(FloatingPointError, match="nothing was learnt"):
        trainer.step(bad)
    assert_unchanged(trainer, before)


def test_an_optimizer_trains_what_was_not_adapted_and_nothing_else_does():
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 4)).double()
    trainer, start = trainer_of([EWC(0.1)], model=model)
    norm, data = model[1], samples(16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.learn_task(data, epochs=3)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed <= {"0.weight", "2.weight"}
    assert not any(map(torch.equal, (la.weight for la in layers_of(trainer)), start))
    norm.requires_grad_(True)
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
    scale = norm.weight.detach().clone()
    trainer.begin_task()
    trainer.step(data)
    gradient = norm.weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(norm.weight.detach(), scale - 0.1 * gradient)
    assert bool(gradient.any())


def test_accuracy_counts_only_open_outputs():
    trainer, _ = trainer_of([])
    data = samples(50, (1, 3), heads=(1, 3))
    with torch.no_grad():
        logits = trainer.model(data.x)
    chosen = torch.where(logits[:, 3] > logits[:, 1], 3, 1)
    assert trainer.accuracy(data) == pytest.approx(float((chosen == data.y).double().mean()))
    assert bool((logits.argmax(1) != chosen).any())
