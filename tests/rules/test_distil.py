"""Learning without Forgetting: the distillation, its scale over T, and what it runs over."""

import pytest
import torch
from tiny_tasks import layers_of, samples, trainer_of

from ttt.rules import LwF, SeenOutputs, distillation


def gradient(student, teacher, temperature, groups):
    student = student.clone().requires_grad_()
    distillation(student, teacher, temperature, groups).backward()
    return student.grad


def test_gradient_of_the_distillation_does_not_fall_with_the_temperature():
    student, teacher = torch.randn(6, 5).double(), torch.randn(6, 5).double()
    groups = [torch.arange(5)]
    for t in (1.0, 2.0, 7.0):
        expected = t * ((student / t).softmax(-1) - (teacher / t).softmax(-1))
        torch.testing.assert_close(gradient(student, teacher, t, groups), expected, rtol=1e-10, atol=1e-12)
    hot = [float(gradient(student, teacher, t, groups).norm()) for t in (50.0, 100.0)]
    assert hot[1] / hot[0] == pytest.approx(1.0, abs=0.02)  # a quarter, without T^2
    centred = [z - z.mean(-1, keepdim=True) for z in (student, teacher)]
    torch.testing.assert_close(
        gradient(student, teacher, 1e4, groups), (centred[0] - centred[1]) / 5, rtol=1e-3, atol=1e-4
    )


def test_value_is_t_squared_times_the_divergence_of_each_head():
    student, teacher, t = torch.randn(3, 5).double(), torch.randn(3, 5).double(), 2.5
    groups = [torch.tensor([0, 3]), torch.tensor([1, 2, 4])]
    expected = 0.0
    for group in groups:
        for row in range(3):
            p, q = (teacher[row, group] / t).softmax(0), (student[row, group] / t).softmax(0)
            expected += float((p * (p / q).log()).sum())
    assert float(distillation(student, teacher, t, groups)) == pytest.approx(t * t * expected, rel=1e-10)
    assert float(distillation(teacher, teacher, t, groups)) == pytest.approx(0.0, abs=1e-12)


def test_an_output_that_the_teacher_rules_out_gets_no_probability():
    student = torch.zeros(1, 3, dtype=torch.float64)
    teacher = torch.tensor([[0.0, 0.0, -torch.inf]], dtype=torch.float64)
    torch.testing.assert_close(
        gradient(student, teacher, 1.0, [torch.arange(3)]), torch.tensor([[-1 / 6, -1 / 6, 1 / 3]]).double()
    )


def test_outputs_seen_are_one_group_or_a_group_a_head():
    seen = SeenOutputs()
    seen.add([samples(30, (2, 0))])
    seen.add([samples(30, (3, 2))])
    assert [g.tolist() for g in seen.groups] == [[0, 2, 3]]
    heads = SeenOutputs()
    for head in ((0, 1), (2, 3), (0, 1)):
        heads.add([samples(4, head, heads=head)])
    assert [g.tolist() for g in heads.groups] == [[0, 1], [2, 3]]
    assert heads.heads
    assert not seen.heads


def test_lwf_distils_the_model_as_the_last_task_left_it():
    rule = LwF(0.5, temperature=3.0)
    trainer, _ = trainer_of([rule])
    first, second = samples(20, (0, 1)), samples(20, (2, 3))
    assert rule.term(first, trainer.model(first.x)) is None
    trainer.learn_task(first, epochs=3)
    with torch.no_grad():
        old = trainer.model(second.x)
    trainer.begin_task()
    for _ in range(3):
        trainer.step(second)
    with torch.no_grad():
        now = trainer.model(second.x)
    expected = 0.5 * distillation(now, old, 3.0, [torch.tensor([0, 1])])
    assert float(expected) > 1e-4
    torch.testing.assert_close(rule.term(second, now), expected, rtol=1e-10, atol=1e-12)


def test_a_step_with_lwf_is_a_gradient_step_on_the_sum():
    rule = LwF(2.0, temperature=2.0)
    trainer, _ = trainer_of([rule], lr=0.05)
    first, second = samples(10, (0, 1)), samples(10, (2, 3))
    trainer.learn_task(first, epochs=5)
    trainer.begin_task()
    trainer.step(second)
    layers = layers_of(trainer)
    weights = [la.weight.detach().clone().requires_grad_() for la in layers]

    def forward(w):
        hidden = torch.tanh(torch.nn.functional.linear(second.x, w[0], layers[0].bias))
        return torch.nn.functional.linear(hidden, w[1], layers[1].bias)

    with torch.no_grad():
        old = rule.teacher(second.x)
    logits = forward(weights)
    loss = torch.nn.functional.cross_entropy(logits, second.y, reduction="sum")
    loss = loss + 2.0 * 4.0 * torch.nn.functional.kl_div(
        (logits[:, :2] / 2).log_softmax(-1), (old[:, :2] / 2).softmax(-1), reduction="sum"
    )
    gradients = torch.autograd.grad(loss, weights)
    trainer.step(second)
    for layer, w, g in zip(layers, weights, gradients, strict=True):
        torch.testing.assert_close(layer.weight.detach(), (w - 0.05 * g).detach(), rtol=1e-9, atol=1e-11)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="weight must be a number"):
        LwF(-1.0)
    with pytest.raises(ValueError, match="temperature must be a number"):
        LwF(1.0, temperature=0.0)
