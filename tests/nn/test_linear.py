"""`ttt.nn.Linear` against per-token SGD and plain `nn.Linear`."""

import dataclasses

import pytest
import torch
from helpers import plain_config

import ttt
from ttt.nn import Linear
from ttt.nn.many_updates import updates_from

PLAIN = {"ewc_lambda": 0.0, "replay_rows": 0}


def layer_of(m, n, dtype=torch.float64, bias=True, **options):
    config = plain_config(**{"replay_capacity": 8, **options})
    return Linear(n, m, bias, dtype=dtype, config=config, name="layer")


def step(layer, x, target):
    """One backward pass of the summed squared error; returns the outputs from before learning."""
    with ttt.learning(layer):
        y = layer(x)
        (0.5 * (y - target).square().sum()).backward()
    return y.detach()


@pytest.mark.parametrize("window", [1, 4, 16])
def test_any_window_is_exactly_sgd_per_token(window):
    m, n, tokens, lr = 5, 7, 37, 0.03
    layer = layer_of(m, n, lr=lr, window=window, **PLAIN)
    w, b = layer.weight.detach().clone(), layer.bias.detach()
    x, target = torch.randn(tokens, n, dtype=torch.float64), torch.randn(tokens, m, dtype=torch.float64)
    for t in range(tokens):
        expected = w @ x[t] + b
        y = step(layer, x[t : t + 1], target[t])
        torch.testing.assert_close(y[0], expected, rtol=1e-10, atol=1e-10)
        w = w - lr * torch.outer(expected - target[t], x[t])
        torch.testing.assert_close(layer.effective_weight(), w, rtol=1e-10, atol=1e-10)
    assert layer.pending == tokens % window
    assert int(layer.step) == tokens // window
    layer.flush()
    torch.testing.assert_close(layer.weight.detach(), w, rtol=1e-10, atol=1e-10)
    assert layer.pending == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_before_and_after_a_commit_agree(dtype):
    layer = layer_of(33, 65, dtype, lr=0.01, window=8, **PLAIN)
    x = torch.randn(5, 65, dtype=dtype)
    step(layer, x, torch.zeros(33, dtype=dtype))
    assert layer.pending == 5
    probe = torch.randn(4, 65, dtype=dtype)
    with torch.no_grad():
        before = layer(probe)
        layer.flush()
        after = layer(probe)
    tolerance = 1e-5 if dtype == torch.float32 else 4 * 2**-8  # one bf16 rounding of weight and output each
    assert float((after - before).float().norm() / before.float().norm()) < tolerance


def test_more_tokens_than_the_window_are_committed_at_once():
    layer = layer_of(4, 6, lr=0.1, window=3, **PLAIN)
    reference = layer_of(4, 6, lr=0.1, window=100, **PLAIN)
    reference.load_state_dict(layer.state_dict())
    x = torch.randn(10, 6, dtype=torch.float64)
    for part in (x[:2], x[2:]):
        for each in (layer, reference):
            step(each, part, torch.zeros(4, dtype=torch.float64))
    assert (layer.pending, reference.pending) == (0, 10)
    torch.testing.assert_close(layer.weight.detach(), reference.effective_weight(), rtol=1e-12, atol=1e-12)


def test_input_gradient_goes_through_the_window():
    layer = layer_of(5, 7, lr=0.05, window=16, **PLAIN)
    step(layer, torch.randn(6, 7, dtype=torch.float64), torch.zeros(5, dtype=torch.float64))
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    (layer(x) ** 2).sum().backward()
    z = x.detach().clone().requires_grad_()
    (torch.nn.functional.linear(z, layer.effective_weight(), layer.bias) ** 2).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-12, atol=1e-12)
    assert layer.weight.grad is None
    assert layer.pending == 6  # nothing is learnt outside ttt.learning


def test_the_weight_gets_no_gradient_and_no_graph_is_built_below_the_layer():
    below, layer = torch.nn.Linear(6, 6), layer_of(4, 6, torch.float32)
    below.requires_grad_(False)
    hidden = below(torch.randn(3, 6))
    with ttt.learning(layer):
        y = layer(hidden)
        assert not hidden.requires_grad
        assert y.requires_grad
        y.sum().backward()
    assert layer.weight.grad is None
    assert layer._root.grad is None


def test_clipping_shrinks_the_rate_of_single_tokens():
    layer = layer_of(3, 4, lr=0.1, clip=1.0, window=16, **PLAIN)
    x = torch.randn(5, 4, dtype=torch.float64)
    x[2] *= 100
    delta = torch.randn(5, 3, dtype=torch.float64)
    update = layer.update_from([(x, delta)])
    for t in range(5):
        norm = float(torch.outer(delta[t], x[t]).norm())
        assert float(update.eta[t]) == pytest.approx(0.1 * min(1.0, 1.0 / norm))


def test_learning_refuses_gradients_that_are_not_finite_and_changes_nothing():
    layer = layer_of(3, 4, torch.float32)
    step(layer, torch.randn(2, 4), torch.zeros(3))
    before = {k: t.clone() for k, t in layer.state().items()}
    with pytest.raises(FloatingPointError, match="not finite"), ttt.learning(layer):
        (layer(torch.randn(2, 4)).sum() * float("inf")).backward()
    after = layer.state()
    assert all(torch.equal(before[k], after[k]) for k in before)

    def fails_after_backward():
        with ttt.learning(layer):
            layer(torch.randn(2, 4)).sum().backward()
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fails_after_backward()
    assert all(torch.equal(before[k], layer.state()[k]) for k in before)
    assert layer.sink is None


def test_state_dict_is_that_of_a_plain_linear():
    layer, plain = layer_of(3, 4, torch.float32), torch.nn.Linear(4, 3)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(5, 4)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain(x))


def test_learning_consolidating_and_rolling_back_change_no_address():
    layer = layer_of(6, 8, torch.float32, window=4)
    layer.memory.normal_()
    layer.seen.fill_(8)
    addresses = {k: t.data_ptr() for k, t in layer.state().items() if k != "pending"}
    for _ in range(5):
        step(layer, torch.randn(3, 8), torch.zeros(6))
    learner = ttt.Learner(layer)
    snapshot = learner.snapshot()
    learner.consolidate()
    learner.rollback(snapshot)
    learner.reset()
    assert addresses == {k: t.data_ptr() for k, t in layer.state().items() if k != "pending"}


def test_compiled_forward_equals_eager_and_does_not_recompile():
    torch._dynamo.reset()
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    ttt.adapt_(model, plain_config(target_modules=["2"], window=4, lr=0.1))
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch._dynamo.config.error_on_recompile = True
        try:
            for _ in range(40):
                x = torch.randn(3, 8)
                torch.testing.assert_close(compiled(x), model(x))
                with torch.enable_grad(), ttt.learning(model):
                    model(torch.randn(3, 8)).square().sum().backward()
        finally:
            torch._dynamo.config.error_on_recompile = False
    assert int(model[2].step) >= 20  # commits


def test_mas_uses_its_own_gradient_for_the_trace():
    layer = layer_of(3, 4, importance="mas", ewc_lambda=1e-9, replay_rows=0, window=3, lr=0.1)
    x, delta, p = torch.randn(2, 4).double(), torch.randn(2, 3).double(), torch.randn(2, 3).double()
    layer.learn(layer.update_from([(x, delta)], [(x, p)]))
    layer.learn(layer.update_from([(x, delta)], [(x, p)]))
    torch.testing.assert_close(layer.trace, 2 * p.abs().T @ x.abs())


def test_digits_classifier_learns_with_any_loss():
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
    images = images.float() / 16
    model = torch.nn.Sequential(torch.nn.Linear(64, 100), torch.nn.ReLU(), torch.nn.Linear(100, 10))
    ttt.adapt_(model, plain_config(target_modules="all-linear", lr=0.01, window=1, **PLAIN))
    order = torch.randperm(len(images))
    train, test = order[:1400], order[1400:]
    for _ in range(6):
        for rows in train[torch.randperm(len(train))].split(16):
            with ttt.learning(model):
                torch.nn.functional.cross_entropy(model(images[rows]), labels[rows], reduction="sum").backward()
    with torch.no_grad():
        accuracy = float((model(images[test]).argmax(1) == labels[test]).float().mean())
    assert accuracy > 0.9


@pytest.mark.parametrize("sizes", [(5, 4), (9, 4), (8, 3), (10000, 4)])
def test_rows_of_another_layer_are_refused_by_name(sizes):
    """Kernels would read past their ends."""
    layer = Linear(8, 4, config=ttt.TTTConfig(protect=[], chunk=4))
    layer.learn(layer.update_from([(torch.randn(3, 8), torch.randn(3, 4))]))
    before = {name: value.clone() for name, value in layer.named_buffers()}
    wrong = [(torch.ones(2, sizes[0]), torch.ones(2, sizes[1]))]
    with pytest.raises(ValueError, match=r"must be \(2, [84]\), got \(2, "):
        layer.update_from(wrong)
    with pytest.raises(ValueError, match=r"must be \(2, [84]\), got \(2, "):
        updates_from([layer, layer], [(wrong, None, None)] * 2)
    assert all(torch.equal(value, before[name]) for name, value in layer.named_buffers())


@pytest.mark.parametrize("changed", ["x", "delta", "basis", "nothing"])
def test_rows_of_an_update_are_made_anew_where_what_they_were_made_of_has_changed(changed):
    layers = []
    for _ in range(2):
        torch.manual_seed(0)
        layers.append(layer := Linear(24, 12, config=ttt.TTTConfig(protect=[ttt.KroneckerFisher(4)])))
        for basis in (layer.basis, layer.output_basis):
            basis.copy_(torch.linalg.qr(torch.randn(basis.shape[1], basis.shape[0])).Q.T * 0.9)
    rows = torch.randn(5, 24), torch.randn(5, 12)
    updates = [layer.update_from([tuple(part.clone() for part in rows)]) for layer in layers]
    updates[1] = dataclasses.replace(updates[1], applied=None)  # always made when it is learnt
    assert updates[0].applied is not None
    for layer, update in zip(layers, updates, strict=True):
        if changed == "basis":
            layer.basis.copy_(torch.eye(24)[:4])
        elif changed != "nothing":
            getattr(update, changed).mul_(torch.tensor([1.0, 0.0, 2.0, 1.0, -1.0]).unsqueeze(1))
        layer.learn(update)
    for name, value in layers[0].named_buffers():
        torch.testing.assert_close(value, layers[1]._buffers[name], rtol=1e-6, atol=1e-6, msg=name)
