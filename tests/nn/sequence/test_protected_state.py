"""The protection of a delta rule's state: against loops in float64, and what it keeps."""

import pytest
import torch

from ttt.nn.sequence import GatedDeltaNet
from ttt.ops.sequence.states import own, tensors_of

C, HEADS = 24, 2
D = C // HEADS


def calibrated(gated=True, count=3):
    layer = GatedDeltaNet(C, HEADS, gated=gated, protect=count).double()
    layer.calibrate(torch.randn(1, 30, C, dtype=torch.float64))
    return layer


def by_loop(layer, x):
    """The outputs for x (1, T, C), with the whole state S = S* + R of each head."""
    tensors, _ = layer._tensors(x, None, None)
    q, k, v, beta = (tensors[name][0].double() for name in ("q", "k", "v", "beta"))
    out = torch.zeros_like(v)
    for h in range(HEADS):
        anchor, u = layer.protected.anchor[h], layer.protected.directions[h]
        state = anchor.clone()
        for t in range(x.shape[1]):
            gate = 1.0 if tensors["g"] is None else tensors["g"][0, t, h].double().exp()
            state = anchor + gate * (state - anchor)
            written = k[t, h] - u.T @ (u @ k[t, h])
            error = v[t, h] - anchor.T @ k[t, h] - (state - anchor).T @ written
            state = state + beta[t, h] * torch.outer(written, error)
            out[t, h] = state.T @ q[t, h] / D**0.5
    return layer.parts.write(out[None], x)


@pytest.mark.parametrize("gated", [True, False])
def test_the_recurrence(gated):
    layer, x = calibrated(gated), torch.randn(1, 20, C, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], by_loop(layer, x), rtol=1e-5, atol=1e-6)


def test_pieces_and_steps_are_the_whole():
    layer, x = calibrated(), torch.randn(1, 20, C, dtype=torch.float64)
    with torch.no_grad():
        whole, state = layer(x)
        outs, held = [], None
        for begin, end in ((0, 7), *((t, t + 1) for t in range(7, 20))):
            out, held = layer(x[:, begin:end], held)
            outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-4, atol=1e-5)
    for a, b in zip(tensors_of(held), tensors_of(state), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_before_calibration_and_after_clear_nothing_is_protected():
    plain, x = GatedDeltaNet(C, HEADS), torch.randn(1, 20, C)
    layer = GatedDeltaNet(C, HEADS, protect=3)
    layer.load_state_dict(plain.state_dict(), strict=False)
    expected = plain(x)[0]
    torch.testing.assert_close(layer(x)[0], expected)
    layer.calibrate(x)
    assert float((layer(x)[0] - expected).detach().abs().max()) > 1e-3
    layer.protected.clear()
    torch.testing.assert_close(layer(x)[0], expected)
    assert plain.protected is None
    assert not any("protected" in name for name in plain.state_dict())


def test_the_directions_are_those_that_queries_point_in_most():
    """Where all queries of a text lie in two directions, keys lose nearly all of these and nothing of the others."""
    layer = GatedDeltaNet(C, HEADS, protect=2)
    basis = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0].T
    q = (torch.randn(1, 50, HEADS, 2, dtype=torch.float64) @ basis[:2]).float()
    state = torch.randn(1, HEADS, D, D)
    layer.protected.set(state, q)
    assert torch.equal(layer.protected.anchor, state[0])
    keys = basis.float().view(1, D, 1, D).expand(1, D, HEADS, D)
    written, _ = layer.protected.writes(keys, torch.zeros_like(keys))
    lengths = written[0].norm(dim=-1)
    assert float(lengths[:2].max()) < 0.05
    torch.testing.assert_close(lengths[2:], torch.ones(D - 2, HEADS), rtol=1e-4, atol=1e-4)


def recall_error(protect, beyond=400):
    """How far what a text's queries read is off once ``beyond`` other tokens have been read, relative to before."""
    torch.manual_seed(0)
    layer = GatedDeltaNet(32, 2, protect=protect)
    text, others = torch.randn(1, 6, 32), torch.randn(1, beyond, 32)
    with torch.no_grad():
        tensors, _ = layer._tensors(text, None, None)
        _, state = layer(text)
        first = torch.einsum("bthd,bhde->bthe", tensors["q"], state.memory)
        if protect:
            layer.calibrate(text)
            _, state = layer(others)
            whole = state.memory + layer.protected.anchor
        else:
            whole = layer(others, own(state))[1].memory
    return float((torch.einsum("bthd,bhde->bthe", tensors["q"], whole) - first).norm() / first.norm())


def test_what_a_text_wrote_is_read_after_many_others():
    assert recall_error(0) > 0.9
    assert recall_error(6) < 0.01


def test_gradients_and_states_of_training():
    """What is protected takes no gradient, and all parameters get theirs."""
    layer, x = calibrated(), torch.randn(1, 12, C, dtype=torch.float64)
    before = [t.clone() for t in layer.protected.buffers()]
    layer(x)[0].square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad.abs().max() > 0
    for t, copy in zip(layer.protected.buffers(), before, strict=True):
        assert torch.equal(t, copy)


def test_what_calibrate_refuses():
    layer = calibrated()
    before = [t.clone() for t in layer.protected.buffers()]
    for x in (torch.randn(2, 3, C), torch.randn(1, 0, C), torch.full((1, 3, C), torch.nan)):
        with pytest.raises(ValueError, match=r"x must be finite inputs \(1, at least 1, 24\), got "):
            layer.calibrate(x.double())
    for t, copy in zip(layer.protected.buffers(), before, strict=True):
        assert torch.equal(t, copy)
    with torch.no_grad():
        layer.parts.qkv_proj.weight[D:C] = torch.nan  # queries of the second head
    with pytest.raises(ValueError, match="what the layer computes of it is not finite"):
        layer.calibrate(torch.randn(1, 3, C, dtype=torch.float64))
    for t, copy in zip(layer.protected.buffers(), before, strict=True):
        assert torch.equal(t, copy)
    with pytest.raises(ValueError, match="calibrate needs a layer that was made with protect > 0, got protect=0"):
        GatedDeltaNet(C, HEADS).calibrate(torch.randn(1, 3, C))
    with pytest.raises(ValueError, match="protect must be at most the width of a head, 12, got 13"):
        GatedDeltaNet(C, HEADS, protect=13)
    with pytest.raises(ValueError, match="protect must be at least 0, got -1"):
        GatedDeltaNet(C, HEADS, protect=-1)
