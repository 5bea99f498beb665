"""The C++ kernels that take many layers in one call, against loops in float64 and against layers called one by one."""

import copy

import pytest
import torch
from helpers import ISAS, assert_close, plain_config, relative_error
from tiny_models import assert_same
from torch import nn

from ttt.learn.step import write
from ttt.nn import Capturing, Linear, Update
from ttt.nn.experts import LearningExperts
from ttt.nn.many_forward import _gradients, _outputs, outputs_of
from ttt.nn.many_updates import updates_from
from ttt.ops import backends, cpu

pytestmark = pytest.mark.skipif(cpu._C is None, reason="there is no kernel")
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(7, 33), (65, 20), (1, 5), (19, 600)]
COUNTS = [1, 5, 4, 3, 9, 2, 40]
"""Rows of each layer: some few, which the kernel multiplies, and some many, which torch does."""
FEW_ROWS = [1, 2, 4, 3, 1, 2, 4]


@pytest.fixture(params=ISAS)
def isa(request):
    before = cpu._C.active_isa()
    cpu._C.set_isa(request.param)
    yield request.param
    cpu._C.set_isa(before)


@pytest.fixture(params=[1, 3, 16])
def threads(request):
    """Fewer than layers, and more."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def rows_of(layer, count):
    dtype = layer.weight.dtype
    return torch.randn(count, layer.in_features).to(dtype), torch.randn(count, layer.out_features).to(dtype)


def update_of(layer, count):
    x, delta = rows_of(layer, count)
    traced = None if layer.win_trace is None else torch.randn_like(delta)
    moments = None if layer.moments is None else torch.rand(3, dtype=torch.float64)
    follows = layer.win_weight is not None
    weight, agreement = (torch.rand(count), torch.rand(1).double()) if follows else (None, None)
    weight = None if weight is None else weight.to(layer.win_eta.dtype)
    eta, true = (torch.rand(count) * 0.01).to(layer.win_eta.dtype), torch.tensor(True)
    return Update(x, delta, eta, traced, true, moments, weight, agreement)


def layers_of(m, n, dtype, **options):
    """Layers of experts whose windows hold 0, 1, 2 or 3 rows; one of these is not in use."""
    config = plain_config(**{"window": 6, "ewc_lambda": 0.0, "replay_rows": 0, **options})
    layers = [Linear(n, m, bias=False, dtype=dtype, config=config, name=f"expert.{e}") for e in range(len(COUNTS))]
    for at, layer in enumerate(layers):
        layer.routed = True
        for basis in (layer.basis, layer.output_basis):
            if basis is not None:
                basis.copy_(0.8 * torch.linalg.qr(torch.randn(basis.shape[1], len(basis))).Q.T)
        if layer.memory is not None:
            layer.memory.normal_()
            layer.seen.fill_(3)
        if at % 4:
            layer.learn(update_of(layer, at % 4))
    layers[3].win_eta[0] = 0.0
    return layers


def exact_state(layers):
    """The weights and windows of each layer in float64."""
    for layer in layers:
        rows = slice(0, layer.pending)
        window = layer.win_x[rows].double(), layer.win_delta[rows].double(), layer.win_eta[rows].double()
        yield layer.weight.double(), *window


def all_rows(layers, side, counts=COUNTS):
    return torch.cat([rows_of(layer, count)[side] for layer, count in zip(layers, counts, strict=True)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_outputs_and_gradients_are_those_of_a_loop_in_float64(isa, dtype, m, n):
    layers = layers_of(m, n, dtype)
    x, delta = all_rows(layers, 0), all_rows(layers, 1)
    backends.calls.clear()
    y, back = _outputs(layers, x, COUNTS), _gradients(layers, delta, COUNTS)
    assert set(backends.calls) == {("experts_forward", "cpu", ""), ("experts_backward", "cpu", "")}
    wanted, wanted_back = [], []
    for (w, wx, wd, eta), own, own_delta in zip(exact_state(layers), x.split(COUNTS), delta.split(COUNTS), strict=True):
        effective = w - (wd * eta.unsqueeze(1)).T @ wx
        wanted.append(own.double() @ effective.T)
        wanted_back.append(own_delta.double() @ effective)
    plain = [layer._transposed_window(part) for layer, part in zip(layers, delta.split(COUNTS), strict=True)]
    plain_y = [part @ layer.effective_weight().T for layer, part in zip(layers, x.split(COUNTS), strict=True)]
    assert_close(y, torch.cat(wanted), torch.cat(plain_y), "y")
    assert_close(back, torch.cat(wanted_back), torch.cat(plain), "gradients")


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_have_the_bits_of_layers_called_one_by_one(threads, dtype):
    layers = layers_of(65, 300, dtype)
    x = all_rows(layers, 0, FEW_ROWS)
    parts = zip(layers, x.split(FEW_ROWS), strict=True)
    assert torch.equal(_outputs(layers, x, FEW_ROWS), torch.cat([layer(part) for layer, part in parts]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_a_layer_do_not_depend_on_the_layers_beside_it(threads, dtype):
    """Bit for bit: alone, all threads share a layer; beside others, each thread takes whole layers."""
    layers = layers_of(300, 65, dtype)
    delta = all_rows(layers, 1, FEW_ROWS)
    parts = zip(layers, delta.split(FEW_ROWS), FEW_ROWS, strict=True)
    alone = torch.cat([_gradients([layer], part, [count]) for layer, part, count in parts])
    assert torch.equal(_gradients(layers, delta, FEW_ROWS), alone)


def test_a_bias_is_added_to_the_rows_of_each_layer():
    layers = layers_of(5, 8, torch.float32)
    for layer in layers:
        layer.bias = nn.Parameter(torch.randn(5), requires_grad=False)
    x = all_rows(layers, 0)
    parts = zip(layers, x.split(COUNTS), strict=True)
    assert torch.equal(_outputs(layers, x, COUNTS), torch.cat([layer(part) for layer, part in parts]))


def test_rows_that_are_not_contiguous_are_read_all_the_same():
    layers = layers_of(5, 8, torch.float32)
    x, delta = all_rows(layers, 0), all_rows(layers, 1)
    assert torch.equal(_outputs(layers, x.T.contiguous().T, COUNTS), _outputs(layers, x, COUNTS))
    assert torch.equal(_gradients(layers, delta.T.contiguous().T, COUNTS), _gradients(layers, delta, COUNTS))


def test_rows_of_another_size_or_dtype_are_refused():
    layers = layers_of(5, 8, torch.float32)
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 8\), got \(\d+, 7\)"):
        outputs_of(layers, torch.randn(sum(COUNTS), 7), COUNTS, torch.arange(sum(COUNTS)))
    with pytest.raises(TypeError, match=r"x must be torch\.float32"):
        outputs_of(layers, torch.randn(sum(COUNTS), 8).double(), COUNTS, torch.arange(sum(COUNTS)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_agreement_is_that_of_a_loop_in_float64(isa, dtype, m, n):
    layers = layers_of(m, n, dtype, rate="decrease", feedback=30.0)
    given = [([rows_of(layer, count)], None, None) for layer, count in zip(layers, COUNTS, strict=True)]
    layers[5].win_weight.zero_()
    layers[5].win_x.fill_(torch.nan)  # rows that hold no token are never read
    backends.calls.clear()
    found = updates_from(layers, given)
    assert ("experts_update", "cpu", "") in backends.calls
    for layer, (((x, delta),), _, _), update in zip(layers, given, found, strict=True):
        total = 0.0
        for t in range(len(x)):
            for c in range(6):
                if layer.win_weight[c] != 0:
                    pair = x[t].double().dot(layer.win_x[c].double()) * delta[t].double().dot(
                        layer.win_delta[c].double()
                    )
                    total += float(update.weight[t]) * float(layer.win_weight[c]) * float(pair)
        wanted = float(layer.agreement) * 0.75 ** (len(x) / 6) + 0.25 * max(-1.0, min(1.0, total / 6))
        assert float(update.agreement) == pytest.approx(wanted, rel=1e-4, abs=1e-5)


OPTIONS = {
    "plain": {},
    "feedback": {"rate": "decrease", "feedback": 30.0},
    "Kronecker factors": {"rate": "decrease", "feedback": 30.0, "kronecker": 3},
    "MAS and replay": {"ewc_lambda": 0.1, "importance": "mas", "replay_rows": 2, "replay_capacity": 5},
    "momentum": {"momentum": 0.5},
}
STEPS = [[1, 2, 0, 3, 4, 5, 6], [5, 4, 3, 2, 9, 0, 1], [1, 1, 1, 1, 1, 1, 1], [6, 5, 6, 4, 13, 2, 3]]
"""Rows for each layer in each step: some fill a window of 6, some more than fill it, some are none."""


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_learnt_together_has_the_bits_of_what_each_layer_learns_by_itself(threads, dtype, name):
    layers = layers_of(17, 37, dtype, **OPTIONS[name])
    twins, versions = copy.deepcopy(layers), [layer.win_x._version for layer in layers]
    backends.calls.clear()
    for counts in STEPS:
        updates = [update_of(layer, count) for layer, count in zip(layers, counts, strict=True)]
        write(list(zip(layers, copy.deepcopy(updates), strict=True)))
        for twin, update in zip(twins, updates, strict=True):
            twin.learn(update)
        for layer, twin in zip(layers, twins, strict=True):
            assert_same(layer.state(), twin.state())
    assert backends.calls["experts_learn", "cpu", ""] == len(STEPS)
    assert all(int(layer.step) > 0 for layer in layers)
    assert all(layer.win_x._version > version for layer, version in zip(layers, versions, strict=True))


def test_a_damaged_counter_of_one_layer_stops_all_before_anything_is_written():
    layers = layers_of(5, 8, torch.float32, rate="decrease", kronecker=2)
    layers[4].recent_seen.fill_(-1)
    before = [copy.deepcopy(layer.state()) for layer in layers]
    with pytest.raises(ValueError, match="recent_seen must be at least 0, got -1"):
        write([(layer, update_of(layer, 2)) for layer in layers])
    for layer, state in zip(layers, before, strict=True):
        assert_same(layer.state(), state)


def test_an_update_that_does_not_fit_stops_all_before_anything_is_written():
    layers = layers_of(5, 8, torch.float32)
    before = [copy.deepcopy(layer.state()) for layer in layers]
    updates = [update_of(layer, 2) for layer in layers]
    updates[5].delta = updates[5].delta[:, :4].contiguous()
    with pytest.raises(ValueError, match=r"delta must have shape \(2, 5\), got \(2, 4\)"):
        write(list(zip(layers, updates, strict=True)))
    for layer, state in zip(layers, before, strict=True):
        assert_same(layer.state(), state)


@pytest.mark.parametrize(
    ("counts", "message"),
    [([1, 1], "counts must have a number for each layer"), ([1, -1, 1], "counts must not be negative")],
)
def test_counts_that_would_lead_out_of_range_are_refused(counts, message):
    layers = layers_of(5, 8, torch.float32)[:3]
    kernels, y = [cpu.bind_layer(layer, None) for layer in layers], torch.zeros(3, 5)
    for function in (cpu._C.forward_many, cpu._C.backward_many):
        with pytest.raises(ValueError, match=message):
            function(kernels, y.data_ptr(), y.data_ptr(), counts, 4, 1)
    kernels[1] = cpu.bind_layer(Linear(5, 5, config=plain_config(window=6)), None)
    with pytest.raises(ValueError, match="layers must be of one kind"):
        cpu._C.forward_many(kernels, y.data_ptr(), y.data_ptr(), [1, 1, 1], 4, 1)
    with pytest.raises(ValueError, match="each layer must have rows"):
        cpu._C.learn_many(kernels, [], 1)
    kernels[1] = None
    for function in (cpu._C.forward_many, cpu._C.backward_many):
        with pytest.raises(ValueError, match="layers must not be None"):
            function(kernels, y.data_ptr(), y.data_ptr(), [1, 1, 1], 4, 1)
    with pytest.raises(ValueError, match="layers must not be None"):
        cpu._C.pairs_many(kernels, y.data_ptr(), y.data_ptr(), y.data_ptr(), [1, 1, 1], 1, 1)
    with pytest.raises(ValueError, match="layers must not be None"):
        cpu._C.learn_many(kernels, [(0,) * 11] * 3, 1)
    assert not y.any()


def test_kernels_refuse_a_layer_that_is_there_twice_before_anything_is_written():
    layers = layers_of(5, 8, torch.float32)[:2]
    kernels = [cpu.bind_layer(layers[at], None) for at in (0, 1)]
    update, before = update_of(layers[0], 1), [copy.deepcopy(layer.state()) for layer in layers]
    given = (update.x.data_ptr(), update.delta.data_ptr(), update.eta.data_ptr(), 0, 0, 0, 0, 0, 0, 0, 1)
    with pytest.raises(ValueError, match="layers must not be there twice"):
        cpu._C.learn_many([kernels[0], kernels[1], kernels[0]], [given] * 3, 1)
    for layer, state in zip(layers, before, strict=True):
        assert_same(layer.state(), state)


@pytest.mark.parametrize(("at", "rows"), [(0, 6), (5, 1), (0, 9), (4, 3)])
def test_kernels_without_a_commit_refuse_rows_that_fill_the_window(at, rows):
    """As those of layers whose replay has several sources, which commit through ops."""
    layer = layers_of(5, 8, torch.float32, generated_rows=2)[0]
    kernels, update, before = cpu.bind_layer(layer, None), update_of(layer, 9), copy.deepcopy(layer.state())
    given = (update.x.data_ptr(), update.delta.data_ptr(), update.eta.data_ptr(), 0, 0, 0, 0, 0, 0, at, rows)
    message = "prepare must be called before rows are learnt that fill the window"
    with pytest.raises(ValueError, match=message):
        kernels.learn(given, 1)
    with pytest.raises(ValueError, match=message):
        cpu._C.learn_many([kernels], [given], 1)
    assert_same(layer.state(), before)
    kernels.learn((*given[:-2], 0, 5), 1)
    assert torch.equal(layer.win_x[:5], update.x[:5])


LR = 0.02


class Stack(nn.Module):
    """A stack of experts as transformers has them, of odd sizes."""

    def __init__(self, dtype):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(5, 2 * 13, 11).to(dtype))
        self.down_proj = nn.Parameter(torch.randn(5, 11, 13).to(dtype))
        self.act_fn = nn.functional.silu


ROUTES = {
    "experts without tokens": [[0, 4], [4, 2], [2, 0]],
    "one token": [[3, 1]],
    "all tokens to one expert": [[2]] * 9,
    "some to none": [[5, 1], [3, 7], [5, 5], [0, 3]],
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stack_learns_from_its_tokens_what_autograd_finds_in_float64(dtype, route):
    """Outputs, gradients and weights after three steps, the first of which are in the windows and then committed."""
    tolerance = 1e-4 if dtype == torch.float32 else 6e-2
    config = plain_config(window=4, lr=LR, ewc_lambda=0.0, replay_rows=0)
    experts, chosen = LearningExperts(Stack(dtype), config, "experts"), torch.tensor(ROUTES[route])
    exact = [layer.weight.detach().double().requires_grad_() for layer in experts.layers]
    start = [w.detach().clone() for w in exact]
    for _ in range(3):
        x, scales = torch.randn(len(chosen), 11).to(dtype), torch.rand(chosen.shape).to(dtype)
        aim, wanted = torch.randn(len(chosen), 11).double(), []
        x.requires_grad_()
        inputs = x.detach().double().requires_grad_()
        for row, own, weights in zip(inputs, chosen.tolist(), scales.double(), strict=True):
            total = torch.zeros(11, dtype=torch.float64)
            for e, weight in zip(own, weights, strict=True):
                if e < 5:
                    gate, up = (exact[e] @ row).chunk(2)
                    total = total + weight * (exact[5 + e] @ (nn.functional.silu(gate) * up))
            wanted.append(total)
        (torch.stack(wanted) * aim).sum().backward()
        with Capturing(experts.layers) as capturing:
            y = experts(x, chosen, scales)
            (y * aim.to(dtype)).sum().backward()
            given = [(pairs, None, None) for pairs in capturing.renew()]
        assert relative_error(y.detach(), torch.stack(wanted).detach()) < tolerance
        assert relative_error(x.grad, inputs.grad) < tolerance
        updates = zip(experts.layers, updates_from(experts.layers, given), strict=True)
        write([(layer, update) for layer, update in updates if update is not None])
        with torch.no_grad():
            for w in exact:
                if w.grad is not None:
                    w -= LR * w.grad
                    w.grad = None
    moved = torch.cat([(w.detach() - old).flatten() for w, old in zip(exact, start, strict=True)])
    found = torch.cat([(la.effective_weight() - old).flatten() for la, old in zip(experts.layers, start, strict=True)])
    assert relative_error(found, moved) < (1e-3 if dtype == torch.float32 else 0.2)
    for at, layer in enumerate(experts.layers):
        tokens = 3 * sum(own.count(at % 5) for own in ROUTES[route])
        assert int(layer.tokens) + layer.pending == tokens
        assert torch.equal(layer.effective_weight().double(), start[at]) == (tokens == 0)


def test_what_kernels_do_not_take_is_done_layer_by_layer_and_counted():
    layers = layers_of(5, 8, torch.float64, rate="decrease", feedback=30.0)
    x, delta = all_rows(layers, 0), all_rows(layers, 1)
    backends.calls.clear()
    _outputs(layers, x, COUNTS)
    _gradients(layers, delta, COUNTS)
    given = [([pair], None, None) for pair in zip(x.split(COUNTS), delta.split(COUNTS), strict=True)]
    write(list(zip(layers, updates_from(layers, given), strict=True)))
    found = {key for key in backends.calls if key[0] in backends.MANY}
    why = "no C++ kernel for torch.float64"
    assert found == {(op, backends.ONE_BY_ONE, why) for op in backends.MANY}
    assert all(layer.pending or int(layer.step) for layer in layers)
