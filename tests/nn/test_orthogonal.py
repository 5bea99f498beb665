"""Orthogonal updates: layers whose updates leave the principal directions of remembered inputs alone."""

import copy

import pytest
import torch
from helpers import plain_config
from test_capturable import assert_same as assert_same_step
from test_capturable import updates_of
from tiny_models import adapted, assert_same, ids_of, state_of, tiny

import ttt
from ttt.adapt.convert import learning_layers
from ttt.learn import protection
from ttt.nn import Linear
from ttt.nn.directions import principal_directions
from ttt.rules import EWC, LayerReplay, OrthogonalUpdates, Trainer, configure

PLAIN = {"ewc_lambda": 0.0, "replay_rows": 0}


def layer_of(m, n, k, dtype=torch.float64, **options):
    """A layer with a basis of k random directions, and a memory that no commit may read."""
    config = plain_config(**{"replay_capacity": 8, "orthogonal": k, **PLAIN, **options})
    layer = Linear(n, m, dtype=dtype, config=config, name="layer")
    with torch.no_grad():
        layer.memory.normal_()
        layer.seen.fill_(8)
        layer.basis.copy_(torch.linalg.qr(torch.randn(n, k, dtype=torch.float64)).Q.T)
        if layer.importance is not None:
            layer.importance.copy_(torch.rand(m, n))
    return layer


def projector(layer):
    """I - U^T U in float64."""
    u = layer.basis.double()
    return torch.eye(u.shape[1], dtype=torch.float64) - u.T @ u


def step(layer, x, target):
    with ttt.learning(layer):
        (0.5 * (layer(x) - target).square().sum()).backward()


@pytest.mark.parametrize("window", [1, 4, 16])
def test_any_window_is_sgd_per_token_with_projected_inputs(window):
    m, n, tokens, lr = 5, 7, 37, 0.05
    layer = layer_of(m, n, 3, lr=lr, window=window)
    w, b, p = layer.weight.detach().clone(), layer.bias.detach(), projector(layer)
    x, target = torch.randn(tokens, n, dtype=torch.float64), torch.randn(tokens, m, dtype=torch.float64)
    for t in range(tokens):
        step(layer, x[t : t + 1], target[t])
        w = w - lr * torch.outer(w @ x[t] + b - target[t], p @ x[t])
        torch.testing.assert_close(layer.effective_weight(), w, rtol=1e-10, atol=1e-10)
    assert layer.pending == tokens % window
    layer.flush()
    torch.testing.assert_close(layer.weight.detach(), w, rtol=1e-10, atol=1e-10)
    assert int(layer.recent_seen) == tokens
    remembered = {tuple(row) for row in layer.recent.tolist()}
    assert remembered <= {tuple(row) for row in x.tolist()}  # the inputs themselves
    assert len(remembered) == 8


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4 * 2**-8)])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_outputs_on_inputs_in_the_span_of_the_basis_do_not_change(dtype, tolerance, rows):
    """Also if a step is too large for the window. Outputs on other inputs change many times more."""
    layer = layer_of(33, 65, 7, dtype, lr=0.003, window=16)
    inside = (torch.randn(9, 7).to(dtype) @ layer.basis).contiguous()
    outside = torch.randn(9, 65).to(dtype)
    with torch.no_grad():
        before = layer(inside).float(), layer(outside).float()
        for _ in range(9):
            with torch.enable_grad():
                step(layer, torch.randn(rows, 65).to(dtype), 3 * torch.randn(rows, 33).to(dtype))
            after = layer(inside).float(), layer(outside).float()
    moved = [float((b - a).norm() / a.norm()) for a, b in zip(before, after, strict=True)]
    assert moved[0] < tolerance
    assert moved[1] > 5 * tolerance


def test_trace_and_clip_use_the_projected_gradient():
    layer = layer_of(5, 7, 3, ewc_lambda=1e-9, window=4, clip=1.0, lr=0.1)
    (x, delta), p = (torch.randn(4, k, dtype=torch.float64) * 2 for k in (7, 5)), projector(layer)
    x[2] = 30 * layer.basis[0]  # nothing of it is applied: a clip by its own norm would say otherwise
    update = layer.update_from([(x, delta)])
    for t in range(4):
        norm = float(torch.outer(delta[t], p @ x[t]).norm())
        assert float(update.eta[t]) == pytest.approx(0.1 * min(1.0, 1.0 / norm), rel=1e-9)
    assert float(update.eta.min()) < 0.1 == float(update.eta[2])
    layer.learn(update)
    torch.testing.assert_close(layer.trace, delta.square().T @ (x @ p).square(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_basis_of_zeros_has_no_effect(dtype, rows):
    layer = layer_of(9, 13, 4, dtype, lr=0.05, window=4)
    with torch.no_grad():
        layer.basis.zero_()
    plain = Linear(13, 9, dtype=dtype, config=plain_config(lr=0.05, window=4, **PLAIN), name="layer")
    plain.load_state_dict(layer.state_dict())
    for _ in range(7):
        x, target = torch.randn(rows, 13).to(dtype), torch.randn(9).to(dtype)
        for each in (layer, plain):
            step(each, x, target)
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.win_x[: layer.pending], plain.win_x[: plain.pending])


@pytest.mark.parametrize("n", [5, 40])
@pytest.mark.parametrize("rows", [0, 1, 12, 30])
def test_principal_directions_are_the_right_singular_vectors(n, rows):
    """Against an SVD up to signs, for either shape of the Gram matrix and any rank."""
    a = torch.randn(rows, n)
    a[rows // 2 :] = torch.randn(rows - rows // 2, 2) @ torch.randn(2, n)
    got, state = principal_directions(a, 8), torch.random.get_rng_state()
    exact = torch.linalg.svd(a.double(), full_matrices=False)
    rank = min(8, int((exact.S > 1e-5).sum()))
    assert got.shape == (8, n)
    assert not got[rank:].any()
    torch.testing.assert_close(got[:rank] @ got[:rank].T, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)
    for i in range(rank):
        torch.testing.assert_close(got[i].abs(), exact.Vh[i].abs(), rtol=0, atol=1e-6)
    assert torch.equal(principal_directions(a, 8), got)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("rows", "n"), [(70, 90), (90, 70)])
def test_principal_directions_of_large_matrices_by_iteration(rows, n, monkeypatch):
    """Against known singular vectors: with a decaying spectrum, and with a rank below the number asked for."""
    monkeypatch.setattr("ttt.nn.directions._EXACT", 8)
    u, v = (torch.linalg.qr(torch.randn(size, 60, dtype=torch.float64)).Q for size in (rows, n))
    a = u * 0.8 ** torch.arange(60, dtype=torch.float64) @ v.T
    got, state = principal_directions(a, 6), torch.random.get_rng_state()
    torch.testing.assert_close(got @ got.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-12)
    for i in range(6):
        torch.testing.assert_close(got[i].abs(), v.T[i].abs(), rtol=0, atol=1e-6)
    assert torch.equal(principal_directions(a, 6), got)
    assert torch.equal(torch.random.get_rng_state(), state)
    low = principal_directions(u[:, :3] @ v[:, :3].T, 6)
    assert not low[3:].any()
    torch.testing.assert_close(low[:3].T @ low[:3], v[:, :3] @ v[:, :3].T, rtol=0, atol=1e-9)


def test_calibrating_and_consolidating_renew_the_basis():
    model, learner = adapted(window=5, orthogonal=4, replay_capacity=64, **PLAIN)
    assert not any(layer.basis.any() for layer in learner.layers)
    learner.calibrate([ids_of(2, 16)])
    for layer in learner.layers:
        assert int(layer.seen) == 32
        own = principal_directions(layer.memory[:32], 4).to(layer.basis.dtype)
        assert torch.equal(layer.basis, own)
        torch.testing.assert_close(layer.basis @ layer.basis.T, torch.eye(4), rtol=0, atol=1e-6)
    calibrated = [layer.basis.clone() for layer in learner.layers]
    learner.observe(ids_of(1, 24))
    for layer, basis in zip(learner.layers, calibrated, strict=True):
        assert torch.equal(layer.basis, basis)
        assert not torch.equal(layer.weight, layer.anchor) or layer.pending
    learner.consolidate()
    for layer, basis in zip(learner.layers, calibrated, strict=True):
        assert int(layer.seen) == 32 + 23
        assert torch.equal(layer.basis, principal_directions(layer.memory[:55], 4).to(basis.dtype))
        assert not torch.equal(layer.basis, basis)
    learner.reset()
    for layer, basis in zip(learner.layers, calibrated, strict=True):
        assert torch.equal(layer.basis, basis)
        assert torch.equal(layer.weight, layer.anchor)
    assert ttt.memory_usage(model).bytes["memory"] == sum(
        t.nbytes for layer in learner.layers for t in (layer.memory, layer.recent, layer.basis)
    )


def test_the_basis_survives_files_forks_snapshots_and_restoring(tmp_path):
    pristine = tiny()
    options = {"target_modules": ["down_proj"], "window": 5, "chunk": 8, "orthogonal": 3, "replay_capacity": 32}
    model = ttt.adapt_(copy.deepcopy(pristine), plain_config(**options))
    learner = ttt.Learner(model)
    learner.calibrate([ids_of(2, 16)])
    learner.observe(ids_of(1, 23))
    snapshot = learner.snapshot()
    ttt.save(model, tmp_path / "a.safetensors")
    saved, ids = state_of(model), ids_of(1, 30)

    other = ttt.fork(model)
    for (_, a), (_, b) in zip(learning_layers(model), learning_layers(other), strict=True):
        assert a.basis.data_ptr() == b.basis.data_ptr()
    learner.consolidate()
    learner.observe(ids)
    changed = state_of(model)
    assert any(not torch.equal(changed[k], saved[k]) for k in saved if k.endswith("basis"))
    assert_same(state_of(other), saved)  # what the other consolidates is not the fork's
    forked = ttt.Learner(other)
    forked.consolidate()
    forked.observe(ids)
    assert_same(state_of(other), changed)

    learner.rollback(snapshot)
    assert_same(state_of(model), saved)
    loaded = ttt.load(copy.deepcopy(pristine), tmp_path / "a.safetensors")
    assert_same(state_of(loaded), saved)
    ttt.save(other, tmp_path / "b.safetensors")  # with a base, from before the consolidation
    ttt.load(loaded, tmp_path / "b.safetensors")
    assert_same(state_of(loaded), changed)
    ttt.Learner(loaded).reset()
    assert all(torch.equal(t, saved[k]) for k, t in state_of(loaded).items() if k.endswith("basis"))
    ttt.restore_(loaded)
    for p, q in zip(loaded.parameters(), pristine.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("window", "rows"), [(12, 3), (8, 5)])
def test_capturable_steps_with_a_basis_equal_those_of_an_ordinary_layer(dtype, window, rows):
    ordinary = layer_of(9, 33, 5, dtype, window=window, lr=0.01, ewc_lambda=0.1, replay_rows=2)
    ours = copy.deepcopy(ordinary).capturable_(rows)
    address = ours.basis.data_ptr()
    for update in updates_of(ordinary, rows, 11):
        for layer in (ours, ordinary):
            layer.learn(update)
        if ordinary.pending + rows > window or 2 * rows > window:
            ordinary.flush()
    ours.flush()
    ordinary.flush()
    assert_same_step(ours, ordinary, "after all steps")
    protection.consolidate([ours])
    protection.consolidate([ordinary])
    assert torch.equal(ours.basis, ordinary.basis)
    assert ours.basis.data_ptr() == address
    before = {name: t.clone() for name, t in ours.state().items()}
    ours.learn(update, torch.zeros(1, dtype=torch.int64))
    assert all(torch.equal(t, before[name]) for name, t in ours.state().items())


def test_the_rule_keeps_outputs_of_earlier_tasks_and_composes_with_others():
    config = plain_config(target_modules="all-linear", lr=0.02, replay_capacity=64)
    both = configure(config, [EWC(0.1), OrthogonalUpdates(5), LayerReplay(3)])
    assert (both.orthogonal, both.replay_rows, both.ewc_lambda) == (5, 3, 0.1)
    assert configure(both, []).orthogonal == 0
    with pytest.raises(ValueError, match=r"OrthogonalUpdates.directions must be a whole number of at least 0, got -1"):
        OrthogonalUpdates(-1)

    old = ttt.rules.Batch(torch.randn(40, 6) @ torch.randn(6, 20), torch.randint(3, (40,)))  # in six directions
    new = ttt.rules.Batch(torch.randn(40, 20), torch.randint(3, (40,)))
    start, moved = torch.nn.Linear(20, 3), {}
    for name, rules in (("naive", []), ("orthogonal", [OrthogonalUpdates(6)])):
        model = ttt.adapt_(torch.nn.Sequential(copy.deepcopy(start)), configure(config, rules))
        trainer = Trainer(model, rules)
        trainer.learn_task(old, epochs=2, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            before, other = model(old.x), model(new.x)
            trainer.learn_task(new, epochs=2, generator=torch.Generator().manual_seed(0))
            moved[name] = float((model(old.x) - before).norm() / before.norm())
            assert float((model(new.x) - other).norm() / other.norm()) > 0.05
    assert moved["naive"] > 0.05
    assert moved["orthogonal"] < 1e-5
