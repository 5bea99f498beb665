"""The Triton kernel for the experts of a mixture against loops in float64, on a GPU or in Triton's interpreter."""

import contextlib

import pytest
import torch
from helpers import assert_close, plain_config

from ttt.nn import Linear
from ttt.nn.many_bindings import by_triton
from ttt.ops import backends
from ttt.ops.triton.common import INTERPRETED
from ttt.ops.triton.experts import experts

DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter rounds float32 to bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
COUNTS = {"some have none": [3, 0, 1, 17, 0], "one row": [0, 0, 1, 0, 0], "all to one": [0, 34, 0, 0, 0]}


def layers_of(m, n, window, dtype):
    layers = []
    for _ in range(5):
        layer = {"weight": torch.randn(m, n), "win_x": torch.randn(window, n), "win_delta": torch.randn(window, m)}
        layer = {name: t.to(device=DEVICE, dtype=dtype) for name, t in layer.items()}
        layer["win_eta"] = torch.rand(window, device=DEVICE)
        layer["win_eta"][window // 2] = 0.0
        layer["win_x"][window // 2] = layer["win_delta"][window // 2] = torch.nan  # an empty row is never read
        layers.append(layer)
    layers[1]["win_eta"].zero_()
    return layers


def by_loop(layers, x, counts, transposed, wide):
    """Layer by layer in the dtype ``wide``, without the empty rows."""
    found = []
    for layer, rows in zip(layers, x.split(counts), strict=True):
        live = layer["win_eta"] != 0
        w, eta, rows = layer["weight"].to(wide), layer["win_eta"][live].to(wide), rows.to(wide)
        xs, ds = layer["win_x"][live].to(wide), layer["win_delta"][live].to(wide)
        if transposed:
            found.append(rows @ w - ((rows @ ds.T) * eta) @ xs)
        else:
            found.append(rows @ w.T - ((rows @ xs.T) * eta) @ ds)
    return torch.cat(found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("route", COUNTS)
@pytest.mark.parametrize(("m", "n", "window"), [(1, 5, 1), (33, 70, 3), (65, 40, 17), (16, 130, 70)])
def test_each_layer_computes_its_own_rows(dtype, transposed, route, m, n, window):
    layers, counts = layers_of(m, n, window, dtype), COUNTS[route]
    inputs, outputs = (m, n) if transposed else (n, m)
    held = [tuple(layer.values()) for layer in layers]
    x = torch.randn(sum(counts), inputs, device=DEVICE).to(dtype)
    before = [{name: t.clone() for name, t in layer.items()} for layer in layers]
    y = experts(x, held, counts, transposed)
    assert (y.shape, y.dtype) == ((sum(counts), outputs), dtype)
    exact = by_loop(layers, x, counts, transposed, torch.float64)
    assert_close(y, exact, by_loop(layers, x, counts, transposed, dtype), "y")
    for layer, old in zip(layers, before, strict=True):
        assert all(torch.equal(t.nan_to_num(7.0), old[name].nan_to_num(7.0)) for name, t in layer.items())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("route", COUNTS)
def test_bfloat16_is_exact_where_nothing_is_rounded(transposed, route):
    """On whole numbers of at most 8 bits, so that it does not matter how the interpreter rounds."""
    m, n, window, counts = 33, 70, 17, COUNTS[route]

    def numbers(*shape):
        return (torch.randint(-1, 2, shape) * (torch.rand(shape) < 0.3)).to(device=DEVICE, dtype=torch.bfloat16)

    layers = []
    for _ in range(5):
        layer = {"weight": numbers(m, n), "win_x": numbers(window, n), "win_delta": numbers(window, m)}
        layers.append({**layer, "win_eta": torch.randint(0, 2, (window,), device=DEVICE).float()})
    x = numbers(sum(counts), m if transposed else n)
    exact = by_loop(layers, x, counts, transposed, torch.float64)
    assert 0 < float(exact.abs().max()) <= 256
    y = experts(x, [tuple(layer.values()) for layer in layers], counts, transposed)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.double(), exact)


def test_no_rows_give_no_rows():
    held = [tuple(layer.values()) for layer in layers_of(5, 6, 2, torch.float32)]
    assert experts(torch.empty(0, 6, device=DEVICE), held, [0] * 5, False).shape == (0, 5)


def linear_layers(m, n, dtype, bias=False):
    config = plain_config(window=6, ewc_lambda=0.0, replay_rows=0)
    layers = [Linear(n, m, bias=bias, device=DEVICE, dtype=dtype, config=config) for _ in range(3)]
    for layer in layers[:2]:
        x, delta = (torch.randn(2, size, device=DEVICE).to(dtype) for size in (n, m))
        layer.learn(layer.update_from([(x, delta)]))
    return layers


@pytest.fixture
def without_gpu(monkeypatch):
    """The interpreter has no device to switch to."""
    if INTERPRETED:
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


@pytest.mark.parametrize("transposed", [False, True])
def test_layers_are_read_and_passed_back_through_in_one_launch(without_gpu, transposed):
    layers, counts = linear_layers(33, 20, torch.float32), [3, 1, 5]
    x = torch.randn(9, 33 if transposed else 20, device=DEVICE)
    backends.calls.clear()
    found = by_triton("experts_forward", layers, x, counts, transposed)
    assert dict(backends.calls) == {("experts_forward", "triton", ""): 1}
    parts = zip(layers, x.split(counts), strict=True)
    weights = [(part.double(), layer.effective_weight().double()) for layer, part in parts]
    exact = torch.cat([part @ (w if transposed else w.T) for part, w in weights])
    assert float((found - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize(
    ("dtype", "counts", "bias", "why"),
    [(torch.float64, [1, 1, 1], False, "no Triton kernel for torch.float64"),
     (torch.float32, [1, 65, 1], False, "an expert gets more than 64 rows"),
     (torch.float32, [1, 1, 1], True, "a layer has a bias, or a weight that is not contiguous")],
)  # fmt: skip
def test_what_the_kernel_does_not_take_is_counted_with_the_reason(dtype, counts, bias, why):
    layers = linear_layers(4, 5, dtype, bias)
    backends.calls.clear()
    assert by_triton("experts_forward", layers, torch.randn(sum(counts), 5).to(dtype), counts, False) is None
    assert dict(backends.calls) == {("experts_forward", backends.ONE_BY_ONE, why): 1}
