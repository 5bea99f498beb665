"""The sequence layers: pieces, steps, packed texts, gradients, and errors."""

import math

import pytest
import torch

from ttt.nn import sequence as layers
from ttt.ops.sequence.states import own, select_rows, tensors_of

C = 12
LAYERS = {
    "DeltaNet": lambda: layers.GatedDeltaNet(C, 2, gated=False),
    "GatedDeltaNet": lambda: layers.GatedDeltaNet(C, 2),
    "TTTLinear": lambda: layers.TTTLinear(C, 2, mini_batch=4),
    "TTTMLP": lambda: layers.TTTMLP(C, 2, mini_batch=4),
    "TitansMemory": lambda: layers.TitansMemory(C, 2, mini_batch=4),
    "TitansMemory, two layers": lambda: layers.TitansMemory(C, 2, mini_batch=4, depth=2),
    "LaCT": lambda: layers.LaCT(C, 2, chunk=6, window=5),
    "WindowAttention": lambda: layers.WindowAttention(C, 2, window=5),
    "InPlaceMLP": lambda: layers.InPlaceMLP(C, 16, chunk=6, rate=0.05),
}


def new(name):
    layer = LAYERS[name]().double()
    if name == "InPlaceMLP":
        torch.nn.init.normal_(layer.target_proj.weight)
    return layer


def close(a, b, within=2e-4):
    for x, y in zip(tensors_of(a), tensors_of(b), strict=True):
        torch.testing.assert_close(x, y, rtol=within, atol=within)


@pytest.mark.parametrize("name", LAYERS)
def test_pieces_and_steps_are_the_whole(name):
    """Within the rounding of float32, in which lower precisions compute norms and rates; float64 is tested below."""
    layer, x = new(name), torch.randn(2, 23, C, dtype=torch.float64)
    with torch.no_grad():
        whole = layer(x)
        outs, state = [], None
        for begin, end in ((0, 7), (7, 7), (7, 15), *((t, t + 1) for t in range(15, 23))):
            out, state = layer(x[:, begin:end], state)
            outs.append(out)
    close((torch.cat(outs, 1), state), whole)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_in_float64_compute_in_float64(name):
    """Pieces are the whole, and gradients are the quotients of small differences, up to the rounding of float64."""
    layer, x = new(name), torch.randn(1, 13, C, dtype=torch.float64)
    with torch.no_grad():
        whole, outs, state = layer(x), [], None
        for begin, end in ((0, 5), (5, 6), (6, 13)):
            out, state = layer(x[:, begin:end], state)
            outs.append(out)
    close((torch.cat(outs, 1), state), whole, 1e-10)
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], (x.requires_grad_(),), eps=1e-6, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
def test_no_output_depends_on_what_comes_later(name):
    layer, x = new(name), torch.randn(1, 20, C, dtype=torch.float64)
    changed = x.clone()
    changed[:, 13:] += 1
    with torch.no_grad():
        a, b = layer(x)[0], layer(changed)[0]
    close(a[:, :13], b[:, :13], 1e-9)
    assert float((a[:, 13:] - b[:, 13:]).abs().max()) > 1e-6


@pytest.mark.parametrize("name", LAYERS)
def test_packed_is_single(name):
    layer, lengths = new(name), (5, 0, 9, 1)
    parts = [torch.randn(1, n, C, dtype=torch.float64) for n in lengths]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    out, state = layer(torch.cat(parts, 1), cu_seqlens=bounds)
    again = layer(torch.cat(parts, 1), own(state), cu_seqlens=bounds)
    for n, part in enumerate(parts):
        alone = layer(part)
        close((out[:, bounds[n] : bounds[n + 1]], select_rows(state, slice(n, n + 1))), alone)
        second = layer(part, own(alone[1]))
        close((again[0][:, bounds[n] : bounds[n + 1]], select_rows(again[1], slice(n, n + 1))), second)


@pytest.mark.parametrize("name", LAYERS)
def test_every_parameter_gets_a_gradient(name):
    layer = LAYERS[name]()
    if name == "InPlaceMLP":
        torch.nn.init.normal_(layer.target_proj.weight)
    layer(torch.randn(2, 15, C))[0].square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0


def test_window_attention_is_attention_where_the_window_is_long():
    """Against causal attention that is written out; and a token that left the window has no influence."""
    layer, x = layers.WindowAttention(C, 2, window=40).double(), torch.randn(1, 20, C, dtype=torch.float64)
    q, k, v = layer.qkv_proj(x).view(1, 20, 3, 2, 6).unbind(2)
    half, out = 3, torch.zeros(1, 20, 2, 6, dtype=torch.float64)

    def turned(t, at):
        angle = at * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        a, b = t[..., :half], t[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    for t in range(20):
        for h in range(2):
            keys = torch.stack([turned(k[0, s, h], s) for s in range(t + 1)])
            weight = torch.softmax(keys @ turned(q[0, t, h], t) / 6**0.5, 0)
            out[0, t, h] = weight @ v[0, : t + 1, h]
    close(layer(x)[0], layer.out_proj(out.flatten(2)), 1e-5)
    near = layers.WindowAttention(C, 2, window=5).double()
    changed = x.clone()
    changed[:, 3] += 1
    difference = (near(x)[0] - near(changed)[0]).abs().amax(-1)[0]
    assert (difference[3:8] > 1e-9).all()
    assert (difference[8:] < 1e-12).all()
    assert (difference[:3] < 1e-12).all()


def test_in_place_begins_as_the_mlp_and_learns_after_a_chunk():
    from ttt.sequence_models.blocks import SwiGLU

    mlp, x = SwiGLU(C, 16), torch.randn(1, 20, C)
    layer = layers.InPlaceMLP.from_mlp(mlp, chunk=6, rate=0.05)
    close(layer(x)[0], mlp(x), 1e-5)
    assert layer.down_proj.weight is mlp.down_proj.weight
    torch.nn.init.normal_(layer.target_proj.weight)
    out, before = layer(x)[0], mlp(x)
    close(out[:, :6], before[:, :6], 1e-5)
    z = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    target = layer.target_proj(x)
    change = 0.05 * sum(torch.outer(z[0, t - 1], target[0, t]) for t in range(1, 6))
    close(out[0, 6:12], z[0, 6:12] @ (mlp.down_proj.weight.T + change), 1e-4)
    with pytest.raises(TypeError, match="mlp must have a linear layer gate_proj without bias, got NoneType"):
        layers.InPlaceMLP.from_mlp(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: layers.GatedDeltaNet(0, 1, 4), "hidden must be at least 1, got 0"),
        (lambda: layers.TTTLinear(C, 2, convolution=0), "convolution must be at least 1, got 0"),
        (lambda: layers.TTTLinear(C, 2, mini_batch=0), "mini_batch must be at least 1, got 0"),
        (lambda: layers.TTTLinear(C, 2, base_rate=math.nan), r"base_rate must be a number in \(0.0, inf\), got nan"),
        (lambda: layers.TTTMLP(C, 2, base_rate=-1.0), r"base_rate must be a number in \(0.0, inf\), got -1.0"),
        (lambda: layers.TTTMLP(C, 2, expansion=0), "expansion must be at least 1, got 0"),
        (lambda: layers.TitansMemory(C, 2, mini_batch=-3), "mini_batch must be at least 1, got -3"),
        (lambda: layers.TitansMemory(C, 2, base_rate=0.0), r"base_rate must be a number in \(0.0, inf\), got 0.0"),
        (
            lambda: layers.TitansMemory(C, 2, most_forgotten=2.0),
            r"most_forgotten must be a number in \[0.0, 1.0\], got 2.0",
        ),
        (lambda: layers.TitansMemory(C, 2, expansion=0), "expansion must be at least 1, got 0"),
        (lambda: layers.LaCT(C, 2, chunk=0), "chunk must be at least 1, got 0"),
        (lambda: layers.LaCT(C, 2, window=0), "window must be at least 1, got 0"),
        (lambda: layers.LaCT(C, 2, expansion=0), "expansion must be at least 1, got 0"),
        (lambda: layers.LaCT(C, 2, base_rate=math.inf), r"base_rate must be a number in \(0.0, inf\), got inf"),
        (lambda: layers.InPlaceMLP(C, 0), "inner must be at least 1, got 0"),
        (lambda: layers.InPlaceMLP(C, 4, chunk=0), "chunk must be at least 1, got 0"),
        (lambda: layers.TitansMemory(C, 2, depth=0), "depth must be at least 1, got 0"),
        (lambda: layers.WindowAttention(C, 4), "head_width must be even, got 3"),
        (lambda: layers.WindowAttention(C, 2, window=0), "window must be at least 1, got 0"),
        (lambda: layers.InPlaceMLP(C, 4, rate=0), r"rate must be a number in \(0.0, inf\), got 0"),
    ],
)
def test_wrong_sizes(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(
    "layer",
    [layers.GatedDeltaNet, layers.LaCT, layers.TitansMemory, layers.TTTLinear, layers.TTTMLP, layers.WindowAttention],
)
@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ((0, 2), "hidden must be at least 1, got 0"),
        ((C, 0), "heads must be at least 1, got 0"),
        ((C, -1), "heads must be at least 1, got -1"),
        ((C, 5), "heads must divide hidden = 12 where no head_width is given, got 5"),
        ((C, 2, 0), "head_width must be at least 1, got 0"),
    ],
)
def test_wrong_sizes_of_heads(layer, sizes, says):
    with pytest.raises(ValueError, match=f"^{says}$"):
        layer(*sizes)


def test_wrong_inputs():
    layer = layers.TTTLinear(C, 2)
    with pytest.raises(ValueError, match=r"x must be \(B, T, 12\), got \(2, 3, 4\)"):
        layer(torch.randn(2, 3, 4))
    with pytest.raises(TypeError, match="state must be a LayerState that this layer returned, got int"):
        layer(torch.randn(2, 3, C), 3)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_state_of_another_batch_is_refused_by_name_and_unchanged(name, tokens):
    layer = new(name)
    with torch.no_grad():
        _, state = layer(torch.randn(2, 5, C, dtype=torch.float64))
        before = own(state)
        for batch in (1, 3):
            with pytest.raises(ValueError, match=rf"state.* must .*\({batch}, "):
                layer(torch.randn(batch, tokens, C, dtype=torch.float64), state)
    for now, then in zip(tensors_of(state), tensors_of(before), strict=True):
        assert torch.equal(now, then)
