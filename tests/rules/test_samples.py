"""The reservoir of samples, experience replay, dark experience replay, replay of layer inputs."""

import pytest
import torch
from tiny_tasks import layers_of, plain_mlp, samples, trainer_of

from ttt import ops
from ttt.rules import DarkExperienceReplay, ExperienceReplay, LayerReplay, SampleReservoir


def test_reservoir_keeps_the_samples_that_the_layers_memory_keeps():
    x = torch.randn(300, 3)
    memory, seen = torch.zeros(16, 3), torch.zeros(1, dtype=torch.int64)
    reservoir = SampleReservoir(16, seed=77)
    for part in x.split([1, 20, 79, 200]):
        ops.reservoir_insert(memory, seen, part, seed=77)
        reservoir.insert(x=part, y=part[:, 0] * 2, task=None)
    assert torch.equal(reservoir.fields["x"], memory)
    assert torch.equal(reservoir.fields["y"], memory[:, 0] * 2)
    assert reservoir.fields["task"] is None
    assert (reservoir.seen, len(reservoir)) == (300, 16)


def test_reservoir_is_uniform_and_draws_are_distinct():
    held = torch.zeros(60)
    for seed in range(400):
        reservoir = SampleReservoir(6, seed=seed)
        for part in torch.arange(60).split(25):
            reservoir.insert(i=part)
        held[reservoir.fields["i"]] += 1
    # 400 draws with probability .1: 40 +- 6 each; early, middle and late thirds 800 +- 27 each
    assert float(held.sum()) == 2400
    for third in held.split(20):
        assert abs(float(third.sum()) - 800) < 100
    drawn = reservoir.draw(6)["i"]
    assert sorted(drawn.tolist()) == sorted(reservoir.fields["i"].tolist())
    assert len(reservoir.draw(4)["i"].unique()) == 4
    assert len(reservoir.draw(50)["i"]) == 6
    assert SampleReservoir(3).draw(2) == {}


def test_reservoir_refuses_other_fields():
    reservoir = SampleReservoir(4)
    reservoir.insert(x=torch.zeros(2, 3), y=torch.zeros(2))
    with pytest.raises(ValueError, match=r"fields must be \['x', 'y'\] as before, got \['x'\]"):
        reservoir.insert(x=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="fields must have one length"):
        reservoir.insert(x=torch.zeros(2, 3), y=torch.zeros(1))
    for shape in [(2, 1), (2, 5), (2,), (2, 3, 1)]:
        with pytest.raises(ValueError, match=r"x must have shape \(N, 3\) as before, got \(2"):
            reservoir.insert(x=torch.ones(shape), y=torch.ones(2))
    assert reservoir.seen == 2
    assert not reservoir.fields["y"].any()
    with pytest.raises(ValueError, match="capacity must be a whole number of at least 1, got 0"):
        SampleReservoir(0)


def sgd_step(model, loss, lr):
    weights = [model[0].weight, model[2].weight]
    return [(w - lr * g).detach() for w, g in zip(weights, torch.autograd.grad(loss, weights), strict=True)]


def as_plain(trainer):
    model = plain_mlp()
    with torch.no_grad():
        for mine, other in zip(layers_of(trainer), (model[0], model[2]), strict=True):
            other.weight.copy_(mine.weight)
            other.bias.copy_(mine.bias)
    return model


def replayed(rule):
    """Makes ``rule``'s draws visible."""
    drawn, draw = [], rule.draw

    def spy():
        drawn.append(draw())
        return drawn[-1]

    rule.draw = spy
    return drawn


def test_er_learns_from_remembered_samples_with_their_own_heads():
    rule = ExperienceReplay(10, rows=6, weight=0.5)
    trainer, _ = trainer_of([rule], lr=0.03)
    old, new = samples(10, (0, 1), heads=(0, 1)), samples(8, (2, 3), heads=(2, 3))
    trainer.begin_task()
    trainer.step(old)
    assert torch.equal(rule.reservoir.fields["x"], old.x)
    drawn, model = replayed(rule), as_plain(trainer)
    trainer.step(new)
    (held,) = drawn
    assert len(held) == 6
    ce = torch.nn.functional.cross_entropy
    loss = ce(model(new.x)[:, 2:], new.y - 2, reduction="sum")
    loss = loss + 0.5 * ce(model(held.x)[:, :2], held.y, reduction="sum")
    for layer, w in zip(layers_of(trainer), sgd_step(model, loss, 0.03), strict=True):
        torch.testing.assert_close(layer.weight.detach(), w, rtol=1e-9, atol=1e-11)


def test_er_can_fill_its_reservoir_when_tasks_end():
    rule = ExperienceReplay(50, fill="task")
    trainer, _ = trainer_of([rule])
    first = samples(20)
    trainer.begin_task()
    trainer.step(first)
    assert rule.draw() is None
    trainer.end_task([first[:12], first[12:]])
    assert torch.equal(rule.reservoir.fields["x"][:20], first.x)
    assert rule.reservoir.seen == 20


@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.0), (0.3, 0.7), (0.0, 0.7)])
def test_der_pulls_to_the_logits_that_were_given_when_the_sample_was_met(alpha, beta):
    rule = DarkExperienceReplay(10, alpha=alpha, beta=beta, rows=6)
    trainer, _ = trainer_of([rule], lr=0.03)
    old, new = samples(10), samples(8)
    met = as_plain(trainer)(old.x).detach()
    trainer.begin_task()
    trainer.step(old)
    torch.testing.assert_close(rule.reservoir.fields["logits"], met, rtol=1e-10, atol=1e-12)
    drawn, model = replayed(rule), as_plain(trainer)
    trainer.step(new)
    ce = torch.nn.functional.cross_entropy
    loss = ce(model(new.x), new.y, reduction="sum")
    draws = iter(drawn)
    if alpha:
        held, stored = next(draws)
        loss = loss + alpha * (model(held.x) - stored).square().sum()
        assert not torch.equal(stored, model(held.x))
    if beta:
        held, _ = next(draws)
        loss = loss + beta * ce(model(held.x), held.y, reduction="sum")
    assert next(draws, None) is None
    for layer, w in zip(layers_of(trainer), sgd_step(model, loss, 0.03), strict=True):
        torch.testing.assert_close(layer.weight.detach(), w, rtol=1e-9, atol=1e-11)


def test_layer_replay_keeps_the_outputs_of_the_past():
    old, new = samples(60, (0, 1)), samples(60, (2, 3))
    moved = {}
    start = plain_mlp().state_dict()
    for name, rules in (("naive", []), ("replay", [LayerReplay(32, strength=1.0)])):
        model = plain_mlp()
        model.load_state_dict(start)
        trainer, _ = trainer_of(rules, model=model)
        trainer.learn_task(old, epochs=5, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            before = trainer.model(old.x)
            trainer.learn_task(new, epochs=5, generator=torch.Generator().manual_seed(0))
            moved[name] = float((trainer.model(old.x) - before).norm())
        if rules:
            assert int(layers_of(trainer)[0].seen) == 600  # of both tasks, each sample five times
    assert moved["replay"] < 0.5 * moved["naive"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExperienceReplay(0), "capacity must be a whole number of at least 1, got 0"),
        (lambda: ExperienceReplay(5, rows=0), "rows must be a whole number of at least 1, got 0"),
        (lambda: ExperienceReplay(5, fill="never"), r"fill must be one of \('step', 'task'\), got 'never'"),
        (lambda: DarkExperienceReplay(5, alpha=-1.0), "alpha must be a number"),
        (lambda: DarkExperienceReplay(5, beta=-1.0), "beta must be a number"),
        (lambda: LayerReplay(65), r"LayerReplay.rows must be a whole number in \[0, 64\], got 65"),
        (lambda: LayerReplay(4, strength=-1.0), r"LayerReplay.strength must be a number in \[0.0, inf\), got -1.0"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
