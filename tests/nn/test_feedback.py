"""Feedback on the size of a layer's steps, against plain loops in float64."""

import copy
import math

import pytest
import torch

import ttt

M, N, C = 5, 9, 8
STEPS = (8, 3, 2, 7, 20, 1, 1, 5, 8)


def config(**options) -> ttt.TTTConfig:
    return ttt.TTTConfig(window=C, lr=0.3, **({"protect": [], "feedback": 30.0} | options))


def layer_of(dtype=torch.float64, **options) -> ttt.nn.Linear:
    layer = ttt.nn.Linear(N, M, dtype=dtype, config=config(**options), name="layer")
    if layer.basis is not None:  # some directions that are damped
        for buffer in (layer.basis, layer.output_basis):
            q = torch.linalg.qr(torch.randn(buffer.shape[1], len(buffer), dtype=torch.float64)).Q.T
            buffer.copy_(q * torch.rand(len(buffer), 1, dtype=torch.float64))
    return layer


class Loop:
    """The formula, token by token and pair by pair."""

    def __init__(self, layer):
        self.layer, self.agreement, self.kept = layer, 0.0, []
        self.square, self.count = 0.0, 0
        self.p_in, self.p_out = (
            torch.eye(size, dtype=torch.float64) if b is None else torch.eye(size, dtype=torch.float64) - b.T @ b
            for b, size in ((layer.basis, N), (layer.output_basis, M))
        )

    def step(self, x, delta):
        """The steps of the tokens."""
        c = self.layer.config
        rows = []
        for xi, di in zip(x, delta, strict=True):
            px, pd = self.p_in @ xi, self.p_out @ di
            size = math.sqrt(float(xi @ px) * float(di @ pd)) if c.rate == "decrease" else float(px.norm() * pd.norm())
            self.square, self.count = self.square + size**2, self.count + 1
            rows.append((xi, di, px, pd, size, math.sqrt(self.square / self.count)))
        unit = [c.lr * self.layer.share / root if c.rate == "decrease" else c.lr for *_, root in rows]
        weight = [1 / root * min(1.0, c.clip * root / size) for *_, size, root in rows]
        change = 0.0
        for (xi, di, px, pd, *_), w in zip(rows, weight, strict=True):
            for ox, od, ow in self.kept:
                first = (xi, di) if c.rate == "decrease" else (px, pd)
                change += w * ow * float(first[0] @ ox) * float(first[1] @ od) / C
        self.agreement = 0.75 ** (len(x) / C) * self.agreement + 0.25 * max(-1.0, min(1.0, change))
        factor = max(0.05, math.exp(c.feedback * min(0.0, self.agreement + 0.02)))
        self.kept = [*self.kept, *((px, pd, w) for (_, _, px, pd, *_), w in zip(rows, weight, strict=True))][-C:]
        steps = [u * w * factor for u, w in zip(unit, weight, strict=True)]
        sizes = [float(px.norm() * pd.norm()) for _, _, px, pd, *_ in rows]
        most = self.layer.largest_step() or math.inf
        return [min(step, most / size) for step, size in zip(steps, sizes, strict=True)]


def learn(layer, x, delta):
    update = layer.update_from([(x, delta)])
    layer.learn(update)
    return update


@pytest.mark.parametrize("rate", ["decrease", "rms"])
@pytest.mark.parametrize("protect", [[], [ttt.KroneckerFisher(directions=3)]], ids=["plain", "damped"])
def test_it_is_the_formula(rate, protect):
    layer = layer_of(rate=rate, protect=protect, burst=None)
    loop, drift = Loop(layer), torch.randn(M, N, dtype=torch.float64)
    for count in STEPS:
        x = torch.randn(count, N, dtype=torch.float64)
        delta = torch.randn(count, M, dtype=torch.float64) + 0.3 * x @ drift.T
        if count == 5:  # a window that is half full is committed
            layer.flush()
        update = learn(layer, x, delta)
        assert update.eta.tolist() == pytest.approx(loop.step(x, delta), rel=1e-9)
        assert float(layer.agreement) == pytest.approx(loop.agreement, abs=1e-9)
        kept = layer.win_weight.sort().values.tolist()
        wanted = sorted([w for _, _, w in loop.kept] + [0.0] * (C - len(loop.kept)))
        assert kept == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_follow_the_same_rates(dtype):
    """Those of the C++ kernels, too, which write the window themselves."""
    layer = layer_of(dtype, protect=[ttt.KroneckerFisher(directions=3)])
    exact = ttt.nn.Linear(N, M, dtype=torch.float64, config=layer.config, name="layer")
    exact.weight.copy_(layer.weight)
    exact.anchor.copy_(layer.anchor)
    for name in ("basis", "output_basis"):
        getattr(exact, name).copy_(getattr(layer, name))
    for count in STEPS:
        x, delta = torch.randn(count, N).to(dtype), torch.randn(count, M).to(dtype)
        one, two = learn(layer, x, delta), learn(exact, x.double(), delta.double())
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        assert one.eta.tolist() == pytest.approx(two.eta.tolist(), rel=tolerance)
        assert float(layer.agreement) == pytest.approx(float(exact.agreement), abs=tolerance)
    assert float(layer.agreement) != 0.0


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 11])
def test_a_capturable_layer_follows_as_another_does(rows):
    one, gate = layer_of(), torch.ones(1, dtype=torch.int64)
    two = copy.deepcopy(one).capturable_(rows)
    for number in range(9):
        x, delta = torch.randn(rows, N, dtype=torch.float64), torch.randn(rows, M, dtype=torch.float64)
        learn(one, x, delta)
        update = two.update_from([(x, delta)])
        before = {name: t.clone() for name, t in two.state().items()}
        two.learn(update, torch.zeros_like(gate))  # closed: nothing changes
        assert all(torch.equal(before[name], t) for name, t in two.state().items())
        two.learn(update, gate if number % 2 else None)
        assert float(two.agreement) == pytest.approx(float(one.agreement), abs=1e-12)
        assert two.effective_weight().flatten().tolist() == pytest.approx(one.effective_weight().flatten().tolist())
    assert float(one.agreement) != 0.0


def test_steps_shrink_only_where_they_undo_each_other():
    found = {}
    for name, flips in (("the same again", False), ("the opposite", True)):
        layer, plain, x = layer_of(), layer_of(feedback=0.0), torch.randn(C, N, dtype=torch.float64)
        plain.weight.copy_(layer.weight)
        plain.anchor.copy_(layer.anchor)
        delta = torch.randn(C, M, dtype=torch.float64)
        for number in range(6):
            rows = x, -delta if flips and number % 2 else delta
            found[name] = learn(layer, *rows).eta / learn(plain, *rows).eta
    assert found["the same again"].tolist() == pytest.approx([1.0] * C)
    assert float(found["the opposite"].max()) < 0.3


def test_it_is_part_of_the_state_and_forgotten_with_it(tmp_path):
    layer = layer_of(torch.float32)
    for count in STEPS:
        learn(layer, torch.randn(count, N), torch.randn(count, M))
    assert float(layer.agreement)
    assert layer.win_weight.any()
    other = ttt.nn.Linear(N, M, config=layer.config, name="layer")
    other.load_state({name: t.clone() for name, t in layer.state().items()})
    x, delta = torch.randn(4, N), torch.randn(4, M)
    for each in (layer, other):
        learn(each, x, delta)
    assert all(torch.equal(t, other.state()[name]) for name, t in layer.state().items())
    layer.reset()
    for buffer in (layer.agreement, layer.win_weight, layer.win_x, layer.win_delta):
        assert not buffer.any()


def test_an_update_that_is_not_learnt_changes_nothing():
    layer = layer_of(torch.float32)
    for count in STEPS:
        learn(layer, torch.randn(count, N), torch.randn(count, M))
    before = {name: t.clone() for name, t in layer.state().items()}
    x, delta = torch.randn(4, N), torch.randn(4, M)
    delta[1, 2] = torch.inf
    assert not layer.update_from([(x, delta)]).finite
    assert all(torch.equal(before[name], t) for name, t in layer.state().items())


def test_rows_whose_products_overflow_leave_the_rate_alone():
    layer = layer_of(torch.float32, rate="rms")
    for scale in (1.0, 1e15, 1e15, 1.0):
        update = learn(layer, scale * torch.randn(4, N), scale * torch.randn(4, M))
        assert torch.isfinite(update.agreement).all()
        assert torch.isfinite(update.eta).all()


@pytest.mark.parametrize("options", [{"feedback": 0.0}, {"rate": "constant"}, {"rate": "energy"}, {"lr": 0.0}])
def test_without_it_a_layer_has_none_of_its_state(options):
    layer = ttt.nn.Linear(N, M, config=ttt.TTTConfig(window=C, protect=[], **options))
    assert layer.agreement is None
    assert layer.win_weight is None
    assert layer.update_from([(torch.randn(3, N), torch.randn(3, M))]).agreement is None


def test_values_out_of_range_are_refused():
    for value in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="feedback must be"):
            ttt.TTTConfig(feedback=value)
