"""`TTTConfig` as it comes, and the defences of the commit together: calibrated or not, in layers of any size."""

import copy
import warnings

import pytest
import torch
from tiny_models import TARGETS, assert_same, ids_of, state_of, tiny

import ttt
from ttt.adapt.convert import learning_layers
from ttt.nn import Linear, LowRankLinear
from ttt.nn.rates import STREAM

OFF = {"ewc_lambda": 0.0, "replay_rows": 0, "orthogonal": 0, "kronecker": 0}
DEFAULT = ttt.TTTConfig()
COMMIT = {
    "rate": "rms", "lr": 0.07,
    "protect": [ttt.EWC(0.003), ttt.LayerReplay(rows=4, strength=0.1), ttt.OrthogonalUpdates(32)],
}  # fmt: skip
BOTH = pytest.mark.parametrize("settings", [{}, COMMIT], ids=["default", "defences of the commit"])


def learner_of(base, settings=COMMIT, **options):
    config = ttt.TTTConfig(target_modules=["down_proj"], layers="last:0.5", chunk=8, window=16, **settings)
    return ttt.Learner(ttt.adapt_(copy.deepcopy(base), config.with_flat(**options)))


def test_updates_are_damped_and_the_rate_is_in_nats():
    assert DEFAULT.rate == "decrease"
    assert DEFAULT.clip > 1
    assert DEFAULT.burst > 1
    assert min(DEFAULT.lr, DEFAULT.kronecker, DEFAULT.kronecker_power) > 0
    assert not DEFAULT.ewc_lambda
    assert not DEFAULT.commit_rows
    assert DEFAULT.calibrates
    for users in (None, ttt.LowRank()):
        assert ttt.TTTConfig.from_dict(ttt.TTTConfig(per_user=users).to_dict()) == ttt.TTTConfig(per_user=users)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_calibration_nothing_is_protected_and_nothing_else_differs(dtype, settings):
    """Weights, window and what is read are those without any defence; to the bit, but for the order of sums."""

    def same(a, b):
        if settings or not a.is_floating_point():
            return torch.equal(a, b)
        return torch.allclose(a.double(), b.double(), rtol=3e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-3)

    base = tiny().to(dtype)
    plain, learner = learner_of(base, settings, **OFF), learner_of(base, settings)
    ids = ids_of(2, 60)
    for _ in range(2):
        outputs = [each.observe(ids) for each in (plain, learner)]
        assert same(outputs[0].nll, outputs[1].nll)
        assert outputs[1].rejected == 0
    held = state_of(learner.model)
    for key, t in state_of(plain.model).items():
        assert same(t, held[key]) or key.endswith("recent_seen"), key
    for layer in learner.layers:
        assert not torch.equal(layer.weight, layer.anchor)
        assert not layer.basis.any()
        assert int(layer.seen) == 0
        assert (layer.output_basis is None) == bool(settings)
        if settings:
            assert not layer.importance.any()
            assert bool(layer.trace.any())


def test_without_calibration_what_is_consolidated_is_protected():
    learner = learner_of(tiny())
    learner.observe(ids_of(2, 60))
    learner.consolidate()
    for layer in learner.layers:
        assert float(layer.importance.mean(dtype=torch.float64)) > 0
        assert int(layer.seen) == 2 * 59
        assert bool(layer.basis.any(1).all())
    assert learner.observe(ids_of(1, 40)).rejected == 0
    learner.reset()
    assert all(torch.equal(layer.weight, layer.anchor) and not layer.basis.any() for layer in learner.layers)


@pytest.mark.parametrize("users", [None, ["a", "b"]])
def test_a_learner_warns_once_if_it_has_nothing_to_protect_with(users):
    options = {} if users is None else {"users": ttt.LowRank(slots=2, rank=2, window=16)}
    ids, match = ids_of(2, 20), "learning is unprotected: Learner.calibrate was not called"

    def observe(learner, **also):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            learner.observe(ids, users=users, **also)

    learner = learner_of(tiny(), **options)
    observe(learner, learn=False)
    with pytest.warns(UserWarning, match=match):
        learner.observe(ids, users=users)
    observe(learner)
    observe(learner_of(tiny(), **OFF, **options))
    for protection, value in (("ewc_lambda", 0.003), ("replay_rows", 4), ("orthogonal", 32), ("kronecker", 32)):
        only = OFF | {protection: value}
        with pytest.warns(UserWarning, match=match):
            learner_of(tiny(), **only, **options).observe(ids, users=users)
        learner = learner_of(tiny(), **only, **options)
        learner.calibrate([ids])
        observe(learner)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_without_calibration_the_first_step_has_the_norm_of_the_rate(scale):
    layer = Linear(8, 5, config=ttt.TTTConfig(**COMMIT))
    with ttt.learning(layer):
        (scale * layer(torch.randn(1, 8)).square().sum()).backward()
    moved = float((layer.effective_weight() - layer.anchor).norm())
    assert moved == pytest.approx(0.07, rel=1e-3)
    assert float(layer.moments[STREAM, 2]) == 1


@BOTH
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("sizes", [(16, 16, 3), (16, 4, 16), (100, 30, 1), (5, 1, 2)])
def test_any_model_and_loss_learns(sizes, calibrated, settings):
    """Layers of so few inputs that the directions are more than half of them, of one input among them."""
    a, b, c = sizes
    model = torch.nn.Sequential(torch.nn.Linear(a, b), torch.nn.Tanh(), torch.nn.Linear(b, c))
    teacher, known, x = copy.deepcopy(model), torch.randn(64, a), torch.randn(400, a)
    with torch.no_grad():
        for p in teacher.parameters():
            if p.ndim == 2:  # biases do not learn
                p.add_(torch.randn_like(p))
    target = teacher(x).detach()
    ttt.adapt_(model, ttt.TTTConfig(target_modules="all-linear", **settings))
    if calibrated:
        ttt.Learner(model).calibrate([known], loss=lambda m, rows: m(rows).square().sum())
    before = float((model(x) - target).square().mean())
    # Squared errors are not in nats: the default's rate is in their unit, of which there are more.
    for rows in torch.arange(400).repeat(5 if settings else 25).split(25):
        with ttt.learning(model):
            (model(x[rows]) - target[rows]).square().sum().backward()
    # Calibrated with inputs like those that are learnt, the layers leave half of the directions alone; a single hidden
    # unit may have to change its sign first.
    assert float((model(x) - target).square().mean()) < (1.0 if calibrated or b == 1 else 0.5) * before
    for _, layer in learning_layers(model):
        k = min(layer.in_features // 2, 32 if settings else 64)
        assert (0 if layer.basis is None else len(layer.basis)) == k
        assert not calibrated or k == 0 or bool(layer.basis.any())


@pytest.mark.parametrize("kind", [Linear, LowRankLinear])
@pytest.mark.parametrize(("n", "k"), [(1, 0), (2, 1), (5, 2), (63, 31), (64, 32), (65, 32), (300, 32)])
def test_at_most_half_of_a_layers_inputs_are_left_alone(kind, n, k):
    users = None if kind is Linear else ttt.LowRank(slots=2, rank=2, window=4)
    layer = kind(n, 3, config=ttt.TTTConfig(per_user=users, replay_capacity=8, **COMMIT))
    assert (layer.basis is None) == (k == 0)
    assert k == 0 or layer.basis.shape == (k, n)
    assert layer.memory.shape == (8, n)
    alone = kind(n, 3, config=ttt.TTTConfig(per_user=users, replay_capacity=8, **COMMIT).with_flat(replay_rows=0))
    assert (alone.memory is None) == (k == 0)
    soft = kind(n, 40, config=ttt.TTTConfig(per_user=users, replay_capacity=8))
    assert (soft.basis is None) == (k == 0)
    assert k == 0 or soft.basis.shape == (min(n // 2, 64), n)
    assert soft.output_basis.shape == (20, 40)
    assert soft.memory is None


def test_fewer_inputs_than_directions_span_what_they_span():
    learner = learner_of(tiny())
    learner.calibrate([ids_of(1, 5)])
    for layer in learner.layers:
        assert layer.basis.shape == (24, 48)
        assert int(layer.basis.any(1).sum()) <= 5
    assert learner.observe(ids_of(1, 60)).rejected == 0
    assert all(not torch.equal(layer.effective_weight(), layer.anchor) for layer in learner.layers)


@BOTH
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_state_survives_files_and_snapshots(family, settings, tmp_path):
    base = tiny(family)
    model = ttt.adapt_(
        copy.deepcopy(base), ttt.TTTConfig(target_modules=TARGETS[family], layers="last:0.5", **settings)
    )
    learner = ttt.Learner(model)
    learner.calibrate([ids_of(2, 40)])
    learner.observe(ids_of(1, 60))
    snapshot, saved = learner.snapshot(), state_of(model)
    ttt.save(model, tmp_path / "a.safetensors")
    assert_same(state_of(ttt.load(copy.deepcopy(base), tmp_path / "a.safetensors")), saved)
    learner.observe(ids_of(1, 60))
    learner.rollback(snapshot)
    assert_same(state_of(model), saved)


@BOTH
@pytest.mark.parametrize("calibrated", [False, True])
def test_users_learn_with_the_defaults(calibrated, settings):
    config = ttt.TTTConfig(
        target_modules=["down_proj"], layers="last:0.5", per_user=ttt.LowRank(slots=3, rank=4, window=16), **settings
    )
    learner = ttt.Learner(ttt.adapt_(tiny(), config))
    if calibrated:
        learner.calibrate([ids_of(2, 40)])
    ids = ids_of(2, 60)
    first = learner.observe(ids, users=["a", "b"])
    for _ in range(8):
        last = learner.observe(ids, users=["a", "b"])
    assert last.rejected == 0
    assert last.bits < first.bits - 0.05


@pytest.mark.parametrize("per_user", [None, ttt.LowRank(slots=1)])
@pytest.mark.parametrize(("tokens", "warned"), [([[1, 2, 3, 4] * 10], True), ([list(range(1, 11)), [1] * 10], False)])
def test_calibration_warns_of_a_text_with_few_pairs_of_tokens(per_user, tokens, warned):
    """Ten different pairs are enough for two directions; four are not, however often they come."""
    model = tiny()
    options = {"per_user": per_user, "protect": [ttt.KroneckerFisher(directions=2)]}
    ttt.adapt_(model, ttt.TTTConfig(target_modules=["down_proj"], layers="last:1", **options))
    learner = ttt.Learner(model)
    match = "calibrated on 4 different pairs of neighbouring tokens, and the directions of KroneckerFisher need 8"
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        learner.calibrate([torch.tensor([row]) for row in tokens])
    assert [match in str(w.message) for w in found if "calibrated on" in str(w.message)] == [True] * warned
    assert all(w.filename == __file__ for w in found if "calibrated on" in str(w.message))


def test_calibration_on_own_text_and_without_directions_does_not_warn():
    model = tiny()
    ttt.adapt_(model, ttt.TTTConfig(target_modules=["down_proj"], layers="last:1", protect=[ttt.EWC(0.01)]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ttt.Learner(model).calibrate([torch.tensor([[1, 2, 1, 2]])])
    model = tiny()
    ttt.adapt_(model, ttt.TTTConfig(target_modules=["down_proj"], layers="last:1"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ttt.Learner(model).calibrate()
