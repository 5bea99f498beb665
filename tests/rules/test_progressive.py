"""Progressive networks: the formula, gradient in the lateral connections, old columns to the bit."""

import pytest
import torch
from helpers import plain_config
from tiny_tasks import plain_mlp

import ttt
from ttt.rules import EWC, Batch, Progressive, ProgressiveNet, Trainer, configure, forward_task

SIZES = (5, 7, 6, 4)


def net_of(adapter=None, lr=0.05, columns=0):
    rules = [Progressive()]
    config = configure(plain_config(lr=lr, window=1), rules)
    trainer = Trainer(ProgressiveNet(SIZES, config, adapter=adapter), rules, forward=forward_task)
    for _ in range(columns):
        trainer.begin_task()
    return trainer


def batch_of(task, count=20):
    y = torch.randint(SIZES[-1], (count,))
    return Batch(torch.randn(count, SIZES[0]), y, torch.full((count,), task))


def bits(column):
    return {name: t.clone() for name, t in column.state_dict().items()}


def ones(x):
    return torch.cat([x, torch.ones(len(x), 1)], 1)


@pytest.mark.parametrize("adapter", [None, 3])
def test_forward_is_the_formula(adapter):
    trainer = net_of(adapter, columns=3)
    x, hidden = torch.randn(9, SIZES[0]), []
    for column in trainer.model.columns:
        h, mine = x, []
        for i in range(3):
            z = ones(h) @ column.layers[i].weight.T
            if i and hidden:
                below = torch.cat([other[i - 1] for other in hidden], 1)
                if adapter is None:
                    z = z + below @ column.adapters[i - 1].weight.T
                else:
                    _, v, _, u = column.adapters[i - 1]
                    z = z + torch.relu(ones(below) @ v.weight.T) @ u.weight.T
            h = torch.relu(z) if i < 2 else z
            mine.append(h)
        hidden.append(mine)
    with torch.no_grad():
        for task in range(3):
            torch.testing.assert_close(trainer.model(x, task), hidden[task][-1], rtol=1e-5, atol=1e-5)
        mixed = trainer.model(x, torch.tensor([0, 1, 2] * 3))
    for row in range(9):
        torch.testing.assert_close(mixed[row], hidden[row % 3][-1][row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapter", [None, 3])
def test_lateral_connections_receive_gradient(adapter):
    """A step moves every lateral weight matrix, and by what autograd says of the formula."""
    lr = 0.05
    trainer = net_of(adapter, lr, columns=2)
    batch = batch_of(1)
    column = trainer.model.columns[1]
    laterals = [layer for _, layer in ttt.learning_layers(column.adapters)]
    assert len(laterals) == (2 if adapter is None else 4)
    before = [layer.weight.detach().clone() for layer in laterals]
    target = laterals[-1]  # of the output layer
    start = target.weight.detach().clone().requires_grad_()
    with torch.no_grad():
        old = trainer.model.columns[0](batch.x, [])
        mine = column(batch.x, [old])
    below = old[1]
    if adapter is not None:
        below = torch.relu(ones(below) @ laterals[-2].weight.T)
    rest = mine[-1] - below @ start.detach().T
    torch.nn.functional.cross_entropy(rest + below @ start.T, batch.y, reduction="sum").backward()
    trainer.step(batch)
    torch.testing.assert_close(target.weight.detach(), (start - lr * start.grad).detach(), rtol=1e-4, atol=1e-5)
    for layer, w in zip(laterals, before, strict=True):
        assert float((layer.weight - w).norm()) > 1e-4 * float(w.norm())


def test_old_columns_stay_to_the_bit():
    trainer = net_of()
    trainer.learn_task(batch_of(0), epochs=3)
    probe = batch_of(0)
    first, said = bits(trainer.model.columns[0]), trainer.model(probe.x, 0)
    trainer.learn_task(batch_of(1), epochs=3)
    second = bits(trainer.model.columns[1])
    trainer.begin_task()
    trainer.step(batch_of(2))
    with pytest.raises(ValueError, match="no layer that may learn"):
        trainer.step(batch_of(1))  # not the newest column
    for before, column in ((first, trainer.model.columns[0]), (second, trainer.model.columns[1])):
        after = column.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(trainer.model(probe.x, 0), said)


def test_what_it_refuses():
    trainer = net_of(columns=1)
    with pytest.raises(ValueError, match="task must be one of the 1 tasks that have a column, got 1"):
        trainer.model(torch.randn(2, 5), 1)
    with pytest.raises(ValueError, match="sizes must be at least three"):
        ProgressiveNet((5, 4), plain_config())
    with pytest.raises(ValueError, match="adapter must be a whole number of at least 1, got 0"):
        ProgressiveNet(SIZES, plain_config(), adapter=0)
    net = ProgressiveNet(SIZES, plain_config())
    with pytest.raises(ValueError, match=r"EWC needs ewc_lambda = 0\.5, but the model was adapted with 0\.0"):
        Trainer(net, [Progressive(), EWC(0.5)], forward=forward_task)
    assert len(net.columns) == 0
    with pytest.raises(TypeError, match="model must be a ProgressiveNet, got Sequential"):
        Trainer(ttt.adapt_(plain_mlp(), configure(plain_config(target_modules="all-linear"), [])), [Progressive()])
