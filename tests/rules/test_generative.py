"""The mixture of Gaussians, and that generative replay learns the generator's labels."""

import pytest
import torch
from tiny_tasks import INPUTS, layers_of, samples, trainer_of

from ttt.rules import GaussianMixture, GenerativeReplay


def test_mixture_has_the_moments_of_what_it_was_fitted_to():
    mix = torch.randn(2, 6, dtype=torch.float64)
    data = torch.randn(4000, 2, dtype=torch.float64) @ mix + 0.1 * torch.randn(4000, 6, dtype=torch.float64) + 3
    mixture = GaussianMixture(1, rank=2)
    mixture.fit(data.view(4000, 2, 3))
    drawn = mixture.sample(20_000)
    assert drawn.shape == (20_000, 2, 3)
    drawn = drawn.flatten(1)
    torch.testing.assert_close(drawn.mean(0), data.mean(0), rtol=0.02, atol=0.05)
    difference = torch.cov(drawn.T) - torch.cov(data.T)
    assert float(difference.norm() / torch.cov(data.T).norm()) < 0.06
    assert sum(t.numel() for t in mixture.tensors()) == 6 + 12


def test_components_find_clusters_and_tasks_keep_their_share():
    centres = torch.tensor([[8.0, 0.0], [-8.0, 0.0], [0.0, 8.0]])
    first = centres[torch.randint(2, (300,))] + 0.1 * torch.randn(300, 2)
    mixture = GaussianMixture(2, rank=1)
    mixture.fit(first)
    means = sorted(round(float(m[0])) for m in mixture.means)
    assert means == [-8, 8]
    mixture.fit(centres[2] + 0.1 * torch.randn(100, 2))
    drawn = mixture.sample(8000)
    nearest = torch.cdist(drawn, centres)
    assert float(nearest.amin(1).max()) < 1
    assert float((nearest.argmin(1) == 2).double().mean()) == pytest.approx(0.25, abs=0.03)


def test_what_the_mixture_refuses():
    mixture = GaussianMixture(2, least=2)
    with pytest.raises(RuntimeError, match="call fit"):
        mixture.sample(3)
    with pytest.raises(ValueError, match=r"got \(0, 3\)"):
        mixture.fit(torch.zeros(0, 3))
    with pytest.raises(ValueError, match=r"x must be at least 2 inputs, got \(1, 3\)"):
        mixture.fit(torch.randn(1, 3))
    mixture.fit(torch.randn(2, 3))
    mixture.fit(torch.randn(9, 3))
    assert bool(torch.isfinite(mixture.sample(5)).all())
    with pytest.raises(ValueError, match=r"got \(4, 2\)"):
        mixture.fit(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="components must be a whole number"):
        GaussianMixture(0)
    with pytest.raises(ValueError, match="least must be a whole number of at least 2, got 1"):
        GaussianMixture(1, least=1)
    with pytest.raises(ValueError, match="temperature must be a number"):
        GenerativeReplay(temperature=0.0)


class Says(torch.nn.Module):
    """A model of fixed logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits, dtype=torch.float64)

    def forward(self, x):
        return self.logits.expand(len(x), -1)


@pytest.mark.parametrize("heads", [False, True])
def test_gradient_on_generated_inputs_is_towards_the_generators_labels(heads):
    rule = GenerativeReplay(components=2, rows=9, weight=0.5, temperature=2.0)
    trainer, _ = trainer_of([rule])
    old = samples(20, (0, 1), heads=(0, 1) if heads else None)
    new = samples(6, (2, 3), heads=(2, 3) if heads else None)
    trainer.learn_task(old, epochs=2)
    trainer.begin_task()
    trainer.step(new)
    drawn, draw = [], rule.draw
    rule.draw = lambda: drawn.append(draw()) or drawn[-1]
    top = layers_of(trainer)[1]
    learn, updates = top.learn, []
    top.learn = lambda update: updates.append(update) or learn(update)
    with torch.no_grad():
        plain = [layer.weight.clone() for layer in layers_of(trainer)]
    trainer.step(new)
    (batch, target), (update,) = drawn[0], updates
    hidden = torch.tanh(batch.x @ plain[0].T + layers_of(trainer)[0].bias)
    said = hidden @ plain[1].T + top.bias
    p = torch.zeros(9, 4, dtype=torch.float64)
    p[:, :2] = (target[:, :2] / 2).softmax(-1)  # the old model knows two classes; the later ones get no probability
    q = torch.zeros_like(p)
    if heads:
        q[:, :2] = (said[:, :2] / 2).softmax(-1)
    else:
        q = (said / 2).softmax(-1)
    assert update.x.shape[0] == 9 + 6  # backward meets the generated ones first
    torch.testing.assert_close(update.x[:9], hidden, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(update.delta[:9], 0.5 * 2 * (q - p), rtol=1e-9, atol=1e-11)
    assert torch.equal(batch.y, target.argmax(-1))


def test_it_learns_what_the_old_model_says_not_what_the_new_batch_is():
    """The old model is made to say 1 everywhere, the new batch is all 3: past inputs must be taken for 1."""
    rule = GenerativeReplay(components=1, rows=32, weight=1.0)
    trainer, _ = trainer_of([rule], lr=0.01)
    near = samples(64, (0, 1))
    near.x[:, 0] += 4
    trainer.learn_task(near)
    rule.teacher = Says([0.0, 9.0, 0.0, 0.0])
    far = samples(32, (3,))
    far.x[:, 0] -= 4
    trainer.begin_task()
    for _ in range(150):
        trainer.step(far)
    with torch.no_grad():
        past = trainer.model(rule.draw()[0].x).argmax(-1)
        assert bool((past == 1).double().mean() > 0.95)
        assert bool((trainer.model(far.x).argmax(-1) == 3).double().mean() > 0.95)


def test_an_input_far_from_all_others_is_no_component():
    near = torch.randn(40, 3)
    far = torch.tensor([[50.0, 0.0, 0.0]])
    mixture = GaussianMixture(5, rank=1, least=3)
    mixture.fit(torch.cat([near, far]))
    assert sum(mixture.counts) == 41
    assert min(mixture.counts) >= 3
    assert float(torch.cdist(torch.stack(mixture.means), far).min()) > 1
    mixture.fit(torch.zeros(7, 3))  # equal inputs are one component
    assert mixture.counts[-1] == 7


def test_no_sample_is_kept():
    rule = GenerativeReplay(components=3)
    trainer, _ = trainer_of([rule])
    with pytest.raises(RuntimeError, match="no earlier task"):
        rule.draw()
    data = samples(40)
    trainer.learn_task(data)
    for held in rule.tensors():
        rows = held.reshape(-1, INPUTS) if held.numel() % INPUTS == 0 else held.new_zeros(1, INPUTS)
        assert float(torch.cdist(rows, data.x).min()) > 1e-6
    drawn, _ = rule.draw()
    assert float(torch.cdist(drawn.x, data.x).min()) > 1e-6
    clamped = GenerativeReplay(low=-0.1, high=0.1)
    clamped.attach(trainer.model, rule.forward)
    clamped.end_task([data])
    assert float(clamped.draw()[0].x.abs().max()) <= 0.1
