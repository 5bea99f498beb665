"""EWC, SI and MAS against BackPACK, torch.func and loops written out by hand."""

import copy

import pytest
import torch
from tiny_tasks import layers_of, plain_mlp, samples, trainer_of
from torch.func import functional_call, grad, vmap

from ttt.rules import EWC, MAS, SynapticIntelligence

EXACT = {"rtol": 1e-12, "atol": 1e-14}


def per_sample(model, scalar, x, *more):
    """Per-sample gradients of scalar(logits, ...) at the two weights, (N, m, n) each."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x, *more):
        return scalar(functional_call(model, parameters, (x.unsqueeze(0),))[0], *more)

    found = vmap(grad(loss), in_dims=(None, 0, *[0] * len(more)))(parameters, x, *more)
    return [found["0.weight"], found["2.weight"]]


def measured(rule, batches, model):
    """Traces divided by their rows, before consolidation."""
    trainer, _ = trainer_of([rule], model=copy.deepcopy(model))
    trainer.begin_task()
    rule.measure(batches)
    return [layer.trace / layer.tokens for layer in layers_of(trainer)], trainer


def test_empirical_fisher_is_the_mean_of_squared_per_sample_gradients():
    model, data = plain_mlp(), samples(23)
    found, _ = measured(EWC(1.0, fisher="empirical"), [data[:10], data[10:]], model)
    gradients = per_sample(model, lambda z, y: torch.nn.functional.cross_entropy(z, y), data.x, data.y)
    for mine, g in zip(found, gradients, strict=True):
        torch.testing.assert_close(mine, g.square().mean(0), **EXACT)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_empirical_fisher_is_backpacks_sum_of_squared_gradients():
    pytest.importorskip("backpack")
    from backpack import backpack, extend
    from backpack.extensions import SumGradSquared

    model, data = plain_mlp(), samples(23)
    found, _ = measured(EWC(1.0, fisher="empirical"), [data[:10], data[10:]], model)
    other = extend(copy.deepcopy(model))
    loss = extend(torch.nn.CrossEntropyLoss(reduction="sum"))(other(data.x), data.y)
    with backpack(SumGradSquared()):
        loss.backward()
    for mine, layer in zip(found, (other[0], other[2]), strict=True):
        torch.testing.assert_close(mine, layer.weight.sum_grad_squared / 23, **EXACT)


@pytest.mark.parametrize("heads", [None, (1, 3)])
def test_exact_fisher_is_the_expectation_over_all_labels(heads):
    model, data = plain_mlp(), samples(9, heads or (0, 1, 2, 3), heads)
    found, _ = measured(EWC(1.0, fisher="exact"), [data[:4], data[4:]], model)
    allowed = list(heads or range(4))
    with torch.no_grad():
        p = model(data.x)[:, allowed].softmax(-1)
    expected = [0, 0]
    for i in range(len(allowed)):
        gradients = per_sample(model, lambda z, i=i: z[allowed].log_softmax(-1)[i], data.x)
        for k, g in enumerate(gradients):
            expected[k] = expected[k] + (p[:, i, None, None] * g.square()).mean(0)
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right, **EXACT)
    if heads:
        assert float(found[1][[0, 2]].abs().sum()) == 0  # closed outputs do not matter


def test_labels_of_the_true_fisher_come_from_the_models_output():
    model, one = plain_mlp(), samples(1)
    exact, _ = measured(EWC(1.0, fisher="exact"), [one], model)
    many = one[torch.zeros(20_000, dtype=torch.long)]
    drawn, _ = measured(EWC(1.0, fisher="true"), [many], model)
    wrong, _ = measured(EWC(1.0, fisher="empirical"), [many], model)
    for a, b, c in zip(exact, drawn, wrong, strict=True):
        assert float((b - a).norm() / a.norm()) < 0.05
        assert float((c - a).norm() / a.norm()) > 0.1


@pytest.mark.parametrize("heads", [None, (0, 2)])
def test_mas_is_the_mean_absolute_gradient_of_the_squared_output(heads):
    model, data = plain_mlp(), samples(11, heads or (0, 1, 2, 3), heads)
    found, _ = measured(MAS(1.0), [data[:5], data[5:]], model)
    open_ = list(heads or range(4))
    for mine, g in zip(found, per_sample(model, lambda z: z[open_].square().sum(), data.x), strict=True):
        torch.testing.assert_close(mine, g.abs().mean(0), **EXACT)


def test_stream_fisher_is_what_came_while_learning():
    model, data = plain_mlp(), samples(6)
    trainer, _ = trainer_of([EWC(1.0, fisher="stream")], model=copy.deepcopy(model))
    trainer.begin_task()
    expected = [0, 0]
    for row in range(6):
        now = copy.deepcopy(model)
        for layer, mine in zip((now[0], now[2]), layers_of(trainer), strict=True):
            layer.weight.data.copy_(mine.weight)
        g = per_sample(
            now, lambda z, y: torch.nn.functional.cross_entropy(z, y), data.x[row : row + 1], data.y[row:][:1]
        )
        expected = [e + a[0].square() for e, a in zip(expected, g, strict=True)]
        trainer.step(data[row : row + 1])
    trainer.end_task([data])
    mean = sum(float(e.sum()) for e in expected) / sum(e.numel() for e in expected)
    for layer, e in zip(layers_of(trainer), expected, strict=True):
        torch.testing.assert_close(layer.importance, e / mean, rtol=1e-9, atol=1e-12)


def mean_importance(trainer):
    layers = layers_of(trainer)
    return sum(float(la.importance.sum()) for la in layers) / sum(la.importance.numel() for la in layers)


@pytest.mark.parametrize(
    ("rule", "after"),
    [
        (EWC(0.1, mode="separate"), [1, 2, 3]),
        (EWC(0.1, fisher="exact"), [1, 2, 3]),
        (EWC(0.1, fisher="empirical", decay=0.5), [1, 1.5, 1.75]),
        (EWC(0.1, fisher="stream"), [1, 2, 3]),
        (SynapticIntelligence(0.1), [1, 2, 3]),
        (MAS(0.1), [1, 2, 3]),
    ],
)
def test_every_task_adds_importance_of_mean_one(rule, after):
    trainer, _ = trainer_of([rule])
    for expected in after:
        trainer.learn_task(samples(40), epochs=2, batch_size=8)
        assert mean_importance(trainer) == pytest.approx(expected, rel=1e-6)


def test_separate_anchors_are_a_penalty_for_each_task():
    """Omega (W - W*) is the gradient of sum_k 1/2 Omega_k (W - W_k)^2, at any W; online it is not."""
    outcome = {}
    for mode in ("separate", "online"):
        torch.manual_seed(5)
        trainer, _ = trainer_of([EWC(0.05, mode=mode, fisher="empirical")])
        layers, tasks = layers_of(trainer), []
        for _ in range(3):
            data = samples(30)
            trainer.learn_task(data, epochs=3, batch_size=5)
            plain = plain_mlp()
            with torch.no_grad():
                for mine, other in zip(layers, (plain[0], plain[2]), strict=True):
                    other.weight.copy_(mine.weight)
                    other.bias.copy_(mine.bias)
            g = per_sample(plain, lambda z, y: torch.nn.functional.cross_entropy(z, y), data.x, data.y)
            fisher = [a.square().sum(0) for a in g]
            mean = sum(float(f.sum()) for f in fisher) / sum(f.numel() for f in fisher)
            tasks.append([(f / mean, la.weight.detach().clone()) for f, la in zip(fisher, layers, strict=True)])
        for k, layer in enumerate(layers):
            w = torch.randn_like(layer.weight)
            right = sum(omega * (w - centre) for omega, centre in (task[k] for task in tasks))
            outcome[mode, k] = float((layer.importance * (w - layer.anchor) - right).norm() / right.norm())
    assert outcome["separate", 0] < 1e-10
    assert outcome["separate", 1] < 1e-10
    assert outcome["online", 0] > 1e-3


def test_the_penalty_is_half_lambda_per_sample():
    """A step with no gradient of the loss minimises lambda/2 eta N Omega (W - W*)^2 + 1/2 (W - W_old)^2."""
    trainer, _ = trainer_of([EWC(0.7, fisher="empirical")], lr=0.1)
    trainer.learn_task(samples(20))
    for layer in layers_of(trainer):
        with torch.no_grad():
            layer.weight.add_(torch.randn_like(layer.weight))
        before, anchor, omega = layer.weight.detach().clone(), layer.anchor.clone(), layer.importance.clone()
        rows = 3
        zero = torch.zeros(rows, layer.out_features, dtype=torch.float64)
        layer.learn(layer.update_from([(torch.randn(rows, layer.in_features).double(), zero)]))
        w = layer.weight.detach()
        slope = 0.7 * 0.1 * rows * omega * (w - anchor) + (w - before)
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-12)
        assert float((w - before).norm()) > 0.01


def si_by_hand(model, tasks, lr, lam, xi, batch_size, regularised=False):
    """Synaptic Intelligence step by step; with ``regularised`` the mistake of crediting the penalty's gradient."""
    model = copy.deepcopy(model)
    weights = [model[0].weight, model[2].weight]
    omega = [torch.zeros_like(w) for w in weights]
    anchors = [w.detach().clone() for w in weights]
    for data in tasks:
        path = [torch.zeros_like(w) for w in weights]
        for rows in torch.arange(len(data)).split(batch_size):
            loss = torch.nn.functional.cross_entropy(model(data.x[rows]), data.y[rows], reduction="sum")
            gradients = torch.autograd.grad(loss, weights)
            for k, (w, g) in enumerate(zip(weights, gradients, strict=True)):
                strength = lam * lr * len(rows) * omega[k]
                drift = w.detach() - anchors[k]
                new = anchors[k] + (drift - lr * g) / (1 + strength)
                credited = g + lam * len(rows) * omega[k] * drift if regularised else g
                path[k] -= credited * (new - w.detach())
                w.data.copy_(new)
        grown = [
            torch.relu(p / ((w.detach() - a).square() + xi)) for p, w, a in zip(path, weights, anchors, strict=True)
        ]
        mean = sum(float(g.sum()) for g in grown) / sum(g.numel() for g in grown)
        omega = [o + g / mean for o, g in zip(omega, grown, strict=True)]
        anchors = [w.detach().clone() for w in weights]
    return [w.detach() for w in weights], omega


def test_synaptic_intelligence_is_the_loop_by_hand():
    model, lr, lam, xi = plain_mlp(), 0.05, 0.3, 1e-2
    tasks = [samples(32) for _ in range(3)]
    trainer, _ = trainer_of([SynapticIntelligence(lam, xi=xi)], lr=lr, model=copy.deepcopy(model))
    naive, _ = trainer_of([], lr=lr, model=copy.deepcopy(model))
    for each in (trainer, naive):
        for data in tasks:
            each.begin_task()
            for rows in torch.arange(len(data)).split(8):
                each.step(data[rows])
            each.end_task([data])
    weights, omega = si_by_hand(model, tasks, lr, lam, xi, 8)
    _, wrong = si_by_hand(model, tasks, lr, lam, xi, 8, regularised=True)
    for k, layer in enumerate(layers_of(trainer)):
        torch.testing.assert_close(layer.weight.detach(), weights[k], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(layer.importance, omega[k], rtol=1e-8, atol=1e-10)
        assert float((layer.importance - wrong[k]).norm() / omega[k].norm()) > 1e-3
        other = layers_of(naive)[k].weight
        assert float((layer.weight - other).norm() / other.norm()) > 1e-2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EWC(0.0), r"lam must be a number in \(0.0, inf\], got 0.0"),
        (lambda: EWC(1.0, mode="both"), r"mode must be one of \('separate', 'online'\), got 'both'"),
        (lambda: EWC(1.0, fisher="fake"), "fisher must be one of .*, got 'fake'"),
        (lambda: EWC(1.0, decay=1.5), r"decay must be a number in \[0.0, 1.0\], got 1.5"),
        (lambda: EWC(1.0, mode="separate", decay=0.5), "decay must be 1.0 for mode='separate', got 0.5"),
        (lambda: SynapticIntelligence(1.0, xi=0.0), r"xi must be a number in \(0.0, inf\], got 0.0"),
        (lambda: MAS(float("nan")), "lam must be a number"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_measuring_nothing_is_refused_and_measuring_moves_no_weight():
    trainer, start = trainer_of([EWC(1.0)])
    trainer.begin_task()
    with pytest.raises(ValueError, match="at least one sample, got none"):
        trainer.rules[0].measure([])
    trainer.rules[0].measure([samples(5)])
    for layer, w in zip(layers_of(trainer), start, strict=True):
        assert torch.equal(layer.weight, w)
        assert layer.sink is None
