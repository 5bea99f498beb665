"""The soft projection of `ttt.KroneckerFisher` and the step in nats, against dense matrices in float64."""

import copy

import pytest
import torch
from forged import content, forge
from rates_by_hand import burst_by_hand, roots_by_hand, steps_by_hand
from tiny_models import TARGETS, assert_same, ids_of, state_of, tiny

import ttt
from ttt.adapt.convert import learning_layers
from ttt.nn import Capturing, Linear, LowRankLinear
from ttt.nn.kronecker import MOMENTS, SIDES, _SecondMoment, second_moment, soft_directions, with_rows
from ttt.nn.rates import CALIBRATED

SOFT = {"protect": [ttt.KroneckerFisher(4)], "replay_capacity": 64}


def empty(rank, n):
    return second_moment(torch.zeros(rank, n, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))


def skewed(rows, n):
    """Rows whose second moment has eigenvalues over four orders of magnitude, in random directions."""
    turn = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    return torch.randn(rows, n, dtype=torch.float64) * torch.logspace(1, -1, n, dtype=torch.float64) @ turn


def power_of(matrix, k, power, damping):
    """(M + eps)^-p in units of its value at the mean of all but k eigenvalues, which stand for these: by eigh."""
    values, vectors = torch.linalg.eigh(matrix)
    eps = damping * values.mean()
    tail = values[:-k].mean()
    values = torch.cat([tail.expand(len(values) - k), values[-k:]])
    return vectors @ torch.diag(((tail + eps) / (values + eps)) ** power) @ vectors.T


@pytest.mark.parametrize(("power", "damping"), [(1.0, 0.0), (0.5, 0.1), (0.25, 1.0)])
@pytest.mark.parametrize(("n", "k", "rank"), [(5, 2, 5), (33, 7, 33), (40, 1, 40)])
def test_directions_give_the_damped_power_of_the_second_moment(n, k, rank, power, damping):
    """With as many rows kept as there are inputs nothing is lost, so the dense power is met."""
    rows = skewed(300, n)
    moment = empty(rank, n)
    for part in rows.split((300, 0) if n == 5 else (120, 179, 1)):
        moment = with_rows(moment, part)
    u = soft_directions(moment, k, power, damping)
    x = torch.randn(6, n, dtype=torch.float64)
    torch.testing.assert_close(
        x - x @ u.T @ u, x @ power_of(rows.T @ rows / 300, k, power, damping), rtol=1e-7, atol=1e-9
    )
    assert float((u @ u.T - torch.diag((u * u).sum(1))).abs().max()) < 1e-9
    assert bool(((u * u).sum(1) <= 1).all())


def test_leading_directions_survive_a_sketch_of_twice_their_number():
    rows = skewed(2000, 48)
    moment = empty(16, 48)
    for part in rows.split(64):
        moment = with_rows(moment, part)
    u, exact = soft_directions(moment, 8, 1.0, 0.0), power_of(rows.T @ rows / 2000, 8, 1.0, 0.0)
    found = torch.eye(48, dtype=torch.float64) - u.T @ u
    assert float(torch.linalg.matrix_norm(found - exact, 2)) < 0.05
    assert float(moment.factor.square().sum() + moment.moments[1]) == pytest.approx(float(rows.square().sum()))


@pytest.mark.parametrize(("n", "kept", "tolerance"), [(1, 1, 1e-9), (48, 16, 1e-9), (544, 16, 1e-9), (545, 16, 0.2)])
def test_a_calibration_finds_the_directions_of_all_rows(n, kept, tolerance):
    """Exactly for sides of up to 2 (16 + 256) numbers; beyond, rows are joined with what was kept of those before."""
    rows = skewed(1500, n)
    moment = _SecondMoment(kept, n, rows.device)
    for part in rows.split((400, 0, 1100)):
        moment.add(part)
    held = moment.result()
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    top = vectors[:, -kept:].flip(1)
    assert held.factor.shape == (kept, n)
    torch.testing.assert_close(held.factor.square().sum(1), values[-kept:].flip(0), rtol=tolerance, atol=0)
    units = torch.nn.functional.normalize(held.factor)
    half = max(1, kept // 2)  # those that are used
    assert float((units[:half] - units[:half] @ top @ top.T).norm(dim=1).max()) < tolerance**0.5
    assert float(held.moments[0]) == 1500
    assert float(held.factor.square().sum() + held.moments[1]) == pytest.approx(float(rows.square().sum()))


def test_rows_may_stand_for_more_and_no_rows_for_nothing():
    rows, moment = skewed(30, 9), empty(9, 9)
    thrice, one = with_rows(moment, rows.repeat(3, 1)), with_rows(moment, rows, 90)
    assert float(one.moments[0]) == 90
    torch.testing.assert_close(one.factor.T @ one.factor, thrice.factor.T @ thrice.factor, rtol=1e-9, atol=1e-9)
    assert with_rows(moment, rows[:0]) is moment
    assert not soft_directions(moment, 4, 1.0, 0.0).any()


def layer_of(m, n, dtype=torch.float64, kind=Linear, **options):
    options = {"lr": 0.05, "window": 4, "rate": "decrease", "burst": None, "clip": None, **SOFT, **options}
    users = None if kind is Linear else ttt.LowRank(slots=2, rank=3, window=4)
    layer = kind(n, m, dtype=dtype, config=ttt.TTTConfig(**options, per_user=users), name="layer")
    layer._largest_step = torch.inf
    for basis in (layer.basis, layer.output_basis):
        if basis is not None:
            k, size = basis.shape
            unit = torch.linalg.qr(torch.randn(size, k, dtype=torch.float64)).Q.T
            basis.copy_(unit * torch.rand(k, 1).sqrt())
    return layer


def damped(layer, x, delta):
    pairs = ((x, layer.basis), (delta, layer.output_basis))
    return [
        rows.double() if u is None else rows.double() - rows.double() @ u.double().T @ u.double() for rows, u in pairs
    ]


def rows_of(layer, count):
    size = torch.randn(count, 1).exp()
    x, delta = torch.randn(count, layer.in_features) * size, torch.randn(count, layer.out_features) * size.flip(0)
    return x.to(layer.weight.dtype), delta.to(layer.weight.dtype)


@pytest.mark.parametrize("burst", [None, 0.4])
@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize(("m", "n", "count"), [(1, 2, 3), (7, 33, 5), (40, 3, 9), (4, 5, 60)])
def test_steps_and_update_are_those_of_the_formula(m, n, count, clip, burst):
    layer = layer_of(m, n, clip=clip, burst=burst, window=64)
    x, delta = rows_of(layer, count)
    rows = damped(layer, x, delta)
    free, _ = steps_by_hand(*rows, layer.config, raw=(x, delta))
    want = free
    if burst is not None:
        want = burst_by_hand(*rows, free, layer.config, roots_by_hand(*rows, layer.config, raw=(x, delta)), (x, delta))
    update = layer.update_from([(x, delta)])
    torch.testing.assert_close(update.eta, want, rtol=1e-8, atol=0)
    layer.learn(update)
    change = sum(-e * torch.outer(d, one) for e, d, one in zip(want, rows[1], rows[0], strict=True))
    torch.testing.assert_close(layer.effective_weight() - layer.anchor, change, rtol=1e-7, atol=1e-10)
    assert torch.equal(layer.recent[:count], x)
    assert torch.equal(layer.recent_delta[:count], delta)
    assert int(layer.recent_seen) == count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n"), [(9, 17), (40, 3)])
def test_kernels_ops_and_capturable_layers_learn_the_same(m, n, dtype, monkeypatch):
    bound = layer_of(m, n, dtype, window=6, replay_capacity=8)
    ops, steps = copy.deepcopy(bound), copy.deepcopy(bound).capturable_(2)
    for _ in range(8):
        x, delta = rows_of(bound, 2)
        for layer in (bound, ops, steps):
            with monkeypatch.context() as patch:
                if layer is ops:
                    patch.setattr("ttt.nn.linear.binding_of", lambda layer: None)
                layer.learn(layer.update_from([(x, delta)]))
    for layer in (bound, ops, steps):
        layer.flush()
    names = ("weight", "recent", "recent_delta", "recent_seen")
    for name in names:
        assert torch.equal(getattr(bound, name), getattr(ops, name)), name
        assert torch.equal(getattr(bound, name), getattr(steps, name)), name
    change = bound.weight.double() - bound.anchor.double()
    assert float(change.norm()) > 0


def test_users_learn_with_the_same_rows_and_steps():
    layer, own = layer_of(7, 12, torch.float32, LowRankLinear), layer_of(7, 12, torch.float32)
    own.basis.copy_(layer.basis)
    own.output_basis.copy_(layer.output_basis)
    (x, delta), users = rows_of(layer, 3), torch.tensor([1, 1, 1], dtype=torch.int32)
    *rows, found = layer.steps(x, delta, users)
    for got, want in zip(rows, own.applied(x, delta), strict=True):
        assert torch.equal(got, want)
    torch.testing.assert_close(found.eta, own.update_from([(x, delta)]).eta, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_a_token_decreases_its_own_loss_by_the_rate(scale):
    """To first order, whatever the units of inputs and outputs; and never by more than a hundredth of the weights."""
    layer = Linear(8, 5, dtype=torch.float64, config=ttt.TTTConfig(lr=1e-6))
    target = torch.randn(1, 5, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.div_(scale)
        layer.anchor.copy_(layer.weight)
    x = scale * torch.randn(1, 8, dtype=torch.float64)

    def loss():
        return 0.5 * (layer(x) - target).square().sum()

    before = float(loss())
    with ttt.learning(layer):
        loss().backward()
    assert before - float(loss()) == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize("kind", [Linear, LowRankLinear])
def test_no_token_moves_the_weights_by_more_than_a_hundredth_of_their_norm(kind):
    layer = layer_of(6, 9, torch.float32, kind, lr=0.3)
    layer._largest_step = None
    x, delta = torch.randn(4, 9), 1e-7 * torch.randn(4, 6)
    if kind is Linear:
        (rows, changed), eta = layer.applied(x, delta), layer.update_from([(x, delta)]).eta
    else:
        rows, changed, found = layer.steps(x, delta, torch.zeros(4, dtype=torch.int32))
        eta = found.eta
    moved = eta * rows.norm(dim=1) * changed.norm(dim=1)
    torch.testing.assert_close(moved, 0.01 * layer.weight.norm().expand(4), rtol=1e-5, atol=0)
    with torch.no_grad():
        layer.weight.zero_()
        if kind is Linear:
            layer.anchor.zero_()
    layer._largest_step = None
    assert layer.largest_step() is None  # or a layer of zeros could never learn


def learner_of(base, **options):
    config = {"target_modules": ["down_proj"], "layers": "last:0.5", "chunk": 8, "window": 16, **SOFT, **options}
    return ttt.Learner(ttt.adapt_(copy.deepcopy(base), ttt.TTTConfig(**config)))


def captured_by(learner, batches):
    """(x, delta) of all tokens of ``batches`` at every layer, with the labels that calibration draws."""
    model, layers = learner.model, learner.layers or list(learner.pool.layers.values())
    generator = torch.Generator().manual_seed(learner.config.seed)
    found = [([], []) for _ in layers]
    with Capturing(layers) as capturing, torch.enable_grad():
        for ids in batches:
            logits = model(input_ids=ids).logits.float().flatten(0, 1)
            sums = logits.detach().double().softmax(-1).cumsum(-1)
            drawn = torch.rand((len(sums), 1), dtype=torch.float64, generator=generator)
            labels = (sums <= drawn * sums[:, -1:]).sum(1)
            torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
            for lists, pairs in zip(found, capturing.renew(), strict=True):
                for x, delta in pairs:
                    lists[0].append(x)
                    lists[1].append(delta)
    return [(torch.cat(x).double(), torch.cat(delta).double()) for x, delta in found]


@pytest.mark.parametrize("users", [None, ttt.LowRank(slots=2, rank=2, window=16)])
def test_calibration_measures_both_sides_and_the_unit_of_the_rate(users):
    base, batches = tiny(), [ids_of(2, 40), ids_of(1, 25)]
    every = {"protect": [ttt.KroneckerFisher(12)], "per_user": users}  # sketches of 24 directions, of 24 and 48
    learner = learner_of(base, **every)
    reference = captured_by(learner_of(base, **every), batches)
    learner.calibrate(batches)
    layers = learner.layers or list(learner.pool.layers.values())
    for layer, (x, delta) in zip(layers, reference, strict=True):
        for rows, u in ((x, layer.basis), (delta, layer.output_basis)):
            exact = power_of(rows.T @ rows / len(rows), 12, 1.0, 0.0)
            found = torch.eye(rows.shape[1], dtype=torch.float64) - u.double().T @ u.double()
            assert float(torch.linalg.matrix_norm(found - exact, 2)) < 0.15
            assert float(torch.linalg.matrix_norm(found - torch.eye(len(found)), 2)) > 0.5
        rows = damped(layer, x, delta)
        square = (x * rows[0]).sum(1) * (delta * rows[1]).sum(1)
        moments = layer.moments[CALIBRATED] if users is None else layer.calibrated
        assert float(moments[2]) == len(x) == 105
        assert float(moments[1]) == pytest.approx(float(square.sum()), rel=1e-3)


def test_consolidation_adds_recent_rows_and_reset_takes_them_out():
    learner = learner_of(tiny())
    learner.calibrate([ids_of(2, 30)])
    before = state_of(learner.model)
    ids = ids_of(1, 41)
    learner.observe(ids)
    recent = [(la.recent[:40].double(), la.recent_delta[:40].double()) for la in learner.layers]
    sums = [{name: getattr(la, name).clone() for name in MOMENTS} for la in learner.layers]
    learner.consolidate()
    for layer, rows, old in zip(learner.layers, recent, sums, strict=True):
        for side, new in zip(SIDES, rows, strict=True):
            energy = float(old[f"{side}_factor"].double().square().sum() + old[f"{side}_sums"][1])
            count = getattr(layer, f"{side}_sums")[0]
            assert count == old[f"{side}_sums"][0] + 40 == 60 + 40
            total = getattr(layer, f"{side}_factor").double().square().sum() + getattr(layer, f"{side}_sums")[1]
            assert float(total) == pytest.approx(energy + float(new.square().sum()), rel=1e-4)
        assert int(layer.recent_seen) == 0
        assert not layer.recent_delta.any()
    learner.observe(ids)
    learner.reset()
    after = state_of(learner.model)
    assert_same(before, after)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_files_forks_and_snapshots_hold_it(family, tmp_path):
    base = tiny(family)
    learner = learner_of(base, target_modules=TARGETS[family])
    learner.calibrate([ids_of(2, 30)])
    fork = ttt.fork(learner.model)
    pristine = state_of(fork)
    learner.observe(ids_of(1, 60))
    learner.consolidate()
    learner.observe(ids_of(1, 20))
    assert_same(pristine, state_of(fork))
    snapshot, saved = learner.snapshot(), state_of(learner.model)
    ttt.save(learner.model, tmp_path / "a.safetensors")
    again = ttt.load(copy.deepcopy(base), tmp_path / "a.safetensors")
    assert_same(state_of(again), saved)
    assert {layer.share for _, layer in learning_layers(again)} == {1 / len(learner.layers)}
    learner.observe(ids_of(1, 30))
    learner.rollback(snapshot)
    assert_same(state_of(learner.model), saved)


@pytest.mark.parametrize(("name", "spoil"), [
    ("output_basis", lambda t: t.fill_(0.9)), ("basis", lambda t: t.mul_(3)), ("input_sums", lambda t: t.fill_(-1.0)),
    ("output_factor", lambda t: t.fill_(torch.nan)), ("recent_delta", lambda t: t.fill_(torch.inf)),
])  # fmt: skip
def test_forged_files_are_refused(name, spoil, tmp_path):
    base = tiny()
    learner = learner_of(base)
    learner.calibrate([ids_of(2, 30)])
    learner.observe(ids_of(1, 60))
    path = tmp_path / "a.safetensors"
    ttt.save(learner.model, path)
    tensors, metadata = content(path)
    key = next(key for key in sorted(tensors) if key.endswith(name))
    spoil(tensors[key])
    forge(path, tensors, metadata)
    model = copy.deepcopy(base)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=name):
        ttt.load(model, path)
    assert_same(before, dict(model.state_dict()))


def test_a_larger_model_shares_the_decrease_among_its_layers():
    learner = learner_of(tiny())
    assert {layer.share for layer in learner.layers} == {1 / len(learner.layers)}
    one = layer_of(7, 12)
    (x, delta) = rows_of(one, 5)
    whole = one.update_from([(x, delta)]).eta
    one.share = 0.25
    torch.testing.assert_close(one.update_from([(x, delta)]).eta, whole / 4, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("rate", "same"), [("decrease", True), ("rms", False)])
def test_a_model_in_other_units_learns_the_same(rate, same):
    """Inputs a thousand times as large and weights a thousandth: with rates of other units the updates are others."""
    base, ids, known = tiny().double(), ids_of(1, 60), [ids_of(2, 40)]
    scaled = copy.deepcopy(base)
    with torch.no_grad():
        for block in scaled.model.layers:
            block.mlp.up_proj.weight.mul_(1024)
            block.mlp.down_proj.weight.div_(1024)
    found = []
    for model in (base, scaled):
        learner = learner_of(model, rate=rate, lr=0.3, head_mass=0.0)
        learner.calibrate(known)
        found.append(learner.observe(ids.repeat(1, 3)).nll)
    assert torch.allclose(found[0], found[1], rtol=1e-3, atol=1e-4) == same
    with torch.no_grad():
        frozen = torch.nn.functional.cross_entropy(base(ids).logits[0, :-1], ids[0, 1:])
    assert float(found[0][0, -59:].mean()) < float(frozen) - 0.1
