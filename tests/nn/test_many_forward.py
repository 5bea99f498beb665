"""The rows of many experts in one node of autograd's graph, against layers called one by one and a loop over tokens."""

import pytest
import torch
from helpers import plain_config
from torch import nn

import ttt
from ttt.nn import Capturing, Linear
from ttt.nn.experts import LearningExperts
from ttt.nn.many_forward import outputs_of

E, H, INNER = 4, 6, 5


class Stack(nn.Module):
    """A stack of experts as transformers has them."""

    def __init__(self, dtype):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * INNER, H, dtype=dtype))
        self.down_proj = nn.Parameter(torch.randn(E, H, INNER, dtype=dtype))
        self.act_fn = nn.functional.silu


def experts_of(dtype=torch.float64):
    """Learning experts, some of which have rows in their windows."""
    experts = LearningExperts(Stack(dtype), plain_config(window=8, lr=0.01, ewc_lambda=0.0, replay_rows=0), "experts")
    for layer in experts.layers[::3]:
        x, delta = torch.randn(2, layer.in_features).to(dtype), torch.randn(2, layer.out_features).to(dtype)
        layer.learn(layer.update_from([(x, delta)]))
    return experts


def by_hand(experts, x, chosen, weights):
    """The outputs token by token, with the weights that are in effect, in autograd's reach."""
    found = []
    for row, own, scales in zip(x, chosen.tolist(), weights, strict=True):
        y = torch.zeros_like(row)
        for e, scale in zip(own, scales, strict=True):
            if e < E:
                ups, downs = (getattr(experts, stack)[e].effective_weight() for stack in ("gate_up_proj", "down_proj"))
                gate, up = (ups @ row).chunk(2)
                y = y + scale * (downs @ (nn.functional.silu(gate) * up))
        found.append(y)
    return torch.stack(found)


ROUTES = {
    "all experts": [[0, 1], [3, 0], [2, 3], [1, 0], [3, 2]],
    "one expert": [[2], [2], [2]],
    "some to none": [[E, 1], [3, E], [E, E], [0, 3]],
    "nobody": [[E], [E + 1]],
}


@pytest.mark.parametrize("route", ROUTES)
def test_experts_compute_and_pass_back_what_a_loop_over_tokens_does(route):
    experts, chosen = experts_of(), torch.tensor(ROUTES[route])
    x, y = (torch.randn(len(chosen), H, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = torch.rand(chosen.shape, dtype=torch.float64, requires_grad=True)
    found, wanted = experts(x, chosen, weights), by_hand(experts, x, chosen, weights)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(experts(x, chosen, weights), found)
    if route != "nobody":
        mine = torch.autograd.grad((found * y.detach()).sum(), (x, weights))
        alone = torch.autograd.grad((wanted * y.detach()).sum(), (x, weights))
        torch.testing.assert_close(mine, alone, rtol=1e-11, atol=1e-12)


def captured_of(experts, hooked=False):
    """What each layer captures, with the tokens' places, from one backward pass; and the outputs."""
    torch.manual_seed(3)
    chosen, layers = torch.tensor(ROUTES["all experts"]), experts.layers
    x, weights = torch.randn(len(chosen), H, dtype=torch.float64), torch.rand(chosen.shape, dtype=torch.float64)
    handles = [layers[1].register_forward_hook(lambda *args: None)] if hooked else []
    with Capturing(layers) as capturing:
        y = experts(x, chosen, weights)
        y.square().sum().backward()
        sinks = capturing.renew()
    for handle in handles:
        handle.remove()
    return y, sinks


def test_each_layer_captures_its_rows_and_their_places():
    experts = experts_of()
    y, sinks = captured_of(experts)
    torch.manual_seed(3)
    chosen = torch.tensor(ROUTES["all experts"])
    x = torch.randn(len(chosen), H, dtype=torch.float64)
    for e in range(E):
        tokens = (chosen == e).any(1).nonzero().flatten()
        for sink in (sinks[e], sinks[E + e]):
            assert len(sink) == 1
            assert [places.tolist() for places in sink.places] == [tokens.tolist()]
        assert torch.equal(sinks[e][0][0], x[tokens])
    hooked, others = captured_of(experts, hooked=True)
    assert torch.equal(hooked, y)
    for sink, other in zip(sinks, others, strict=True):
        assert [places.tolist() for places in sink.places] == [places.tolist() for places in other.places]
        for (x, delta), (x2, delta2) in zip(sink, other, strict=True):
            assert torch.equal(x, x2)
            assert torch.equal(delta, delta2)


def test_the_experts_of_a_stack_are_one_node_of_the_graph():
    experts = experts_of()
    x = torch.randn(3, H, dtype=torch.float64, requires_grad=True)
    y = outputs_of(list(experts.gate_up_proj[:3]), x, [1, 1, 1], torch.arange(3))
    assert type(y.grad_fn).__name__ == "_CaptureManyBackward"
    assert y.grad_fn.next_functions[0][0].variable is x


def test_hooks_of_a_layer_change_its_outputs():
    experts, x = experts_of(), torch.randn(3, H, dtype=torch.float64)
    layers = list(experts.gate_up_proj[:2])
    plain = outputs_of(layers, x, [2, 1], torch.arange(3))
    layers[1].register_forward_hook(lambda module, args, y: 2 * y)
    assert torch.equal(outputs_of(layers, x, [2, 1], torch.arange(3)), torch.cat([plain[:2], 2 * plain[2:]]))


def test_autocast_gives_its_dtype_and_computes_in_that_of_the_weights():
    experts, chosen = experts_of(torch.float32), torch.tensor(ROUTES["all experts"])
    x = torch.randn(len(chosen), H)
    layers, counts = list(experts.gate_up_proj), [1, 2, 1, 1]
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs_of(layers, x, counts, torch.arange(5))
        parts = torch.cat([layer(part) for layer, part in zip(layers, x.split(counts), strict=True)])
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, parts)


def test_weights_that_an_optimizer_may_write_are_refused_by_name():
    experts = experts_of()
    experts.gate_up_proj[1].weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"experts\.gate_up_proj\.1\.weight requires grad"):
        experts(torch.randn(2, H).double(), torch.tensor([[0, 1], [0, 1]]), torch.ones(2, 2).double())


def test_experts_learn_beside_a_plain_layer_as_in_a_loop_over_layers():
    """Losses, steps and weights, against layers that are called and make their updates one by one."""
    experts, beside = experts_of(), Linear(H, H, dtype=torch.float64, config=plain_config(window=8, lr=0.01))
    model, chosen = nn.ModuleList([experts, beside]), torch.tensor(ROUTES["some to none"])
    x, weights = torch.randn(len(chosen), H).double(), torch.rand(chosen.shape).double()
    wanted = [layer.effective_weight().requires_grad_() for layer in [*experts.layers, beside]]
    ups, downs, last = wanted[:E], wanted[E : 2 * E], wanted[-1]
    y = []
    for row, own, scales in zip(x, chosen.tolist(), weights, strict=True):
        parts = [torch.zeros_like(row)]
        for e, scale in zip(own, scales, strict=True):
            if e < E:
                gate, up = (ups[e] @ row).chunk(2)
                parts.append(scale * (downs[e] @ (nn.functional.silu(gate) * up)))
        y.append(torch.stack(parts).sum(0))
    (torch.stack(y) @ last.T).square().sum().backward()
    with ttt.learning(model):
        (beside(experts(x, chosen, weights)) - beside.bias).square().sum().backward()
    for layer, weight in zip([*experts.layers, beside], wanted, strict=True):
        step = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(layer.effective_weight(), weight.detach() - 0.01 * step, rtol=1e-10, atol=1e-12)
