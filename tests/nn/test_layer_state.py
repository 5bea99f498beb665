"""The state of a `ttt.nn.Linear` under copies, pickling, moves and inference mode, and what it refuses to load."""

import copy
import io
import pickle

import pytest
import torch
from helpers import plain_config
from torch import Tensor

import ttt
from ttt.learn import protection
from ttt.nn import Linear, LowRankLinear
from ttt.nn import cpu_binding as binding

OPTIONS = [
    {},
    {"importance": "mas", "rate": "rms", "burst": 0.9},
    {"state_dtype": "8bit", "orthogonal": 3, "momentum": 0.5},
    {"generated_rows": 2, "generated_rank": 2, "distill_rows": 2, "replay_rows": 3},
]


def layer_of(m=5, n=7, dtype=torch.float32, **options):
    config = plain_config(**{"lr": 0.01, "window": 6, "replay_rows": 2, "replay_capacity": 4, **options})
    layer = Linear(n, m, dtype=dtype, config=config, name="layer")
    with torch.no_grad():
        layer.memory.normal_()
        layer.seen.fill_(11)
        if layer.basis is not None:
            layer.basis.copy_(torch.linalg.qr(torch.randn(n, len(layer.basis))).Q.T)
        if layer.past_mean is not None:
            layer.set_past_inputs(layer.past_inputs.with_rows(torch.randn(20, n)))
    return layer


def pairs_of(layer, rows):
    """(x, delta) of ``rows`` tokens and, for MAS, the pairs for the trace."""
    x, delta, p = (
        torch.randn(rows, k).to(layer.weight.dtype) for k in (layer.in_features, layer.out_features, layer.out_features)
    )
    return [(x, delta)], [(x, p)] if layer.win_trace is not None else None


def teach(layer, *captured):
    for pairs in captured:
        layer.learn(layer.update_from(*pairs))


def state_of(layer):
    return {name: t.clone() for name, t in layer.state().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))


def saved_by_torch(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved_by_torch])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_copy_has_the_state_and_learns_the_same_on_its_own(options, dtype, duplicate):
    layer = layer_of(dtype=dtype, **options)
    teach(layer, pairs_of(layer, 4), pairs_of(layer, 3))
    protection.consolidate([layer])
    teach(layer, pairs_of(layer, 4))  # bound, with rows in the window and a base
    other = duplicate(layer)
    assert_same(state_of(layer), state_of(other))
    assert_same(layer.base, other.base)
    before, more = state_of(layer), [pairs_of(layer, rows) for rows in (1, 3, 2, 8)]
    teach(other, *more)
    assert_same(before, state_of(layer))
    teach(layer, *more)
    assert_same(state_of(layer), state_of(other))
    x = torch.randn(3, 7).to(dtype)
    with torch.no_grad():
        assert torch.equal(layer(x), other(x))
    layer.reset()
    other.reset()
    assert_same(state_of(layer), state_of(other))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_of_a_capturable_layer_counts_on_its_own(duplicate):
    layer = layer_of().capturable_(2)
    teach(layer, *(pairs_of(layer, 2) for _ in range(4)))
    other = duplicate(layer)
    assert (other.capturable, other.pending) == (2, 2)
    before, more = state_of(layer), [pairs_of(layer, 2) for _ in range(3)]
    teach(other, *more)
    assert_same(before, state_of(layer))
    teach(layer, *more)
    assert_same(state_of(layer), state_of(other))


def test_a_capturable_layer_is_neither_moved_nor_converted():
    layer = layer_of().capturable_(2)
    teach(layer, pairs_of(layer, 2))
    before, addresses = state_of(layer), {name: t.data_ptr() for name, t in layer.named_buffers()}
    for move in (Linear.double, Linear.bfloat16, lambda y: y.to("meta"), lambda y: torch.nn.Sequential(y).half()):
        with pytest.raises(RuntimeError, match=r"cannot be moved or converted; call capturable_\(None\) first"):
            move(layer)
    assert_same(before, state_of(layer))
    assert addresses == {name: t.data_ptr() for name, t in layer.named_buffers()}
    teach(layer, pairs_of(layer, 2))
    layer.capturable_(None).double()
    teach(layer, pairs_of(layer, 5))
    assert (layer.weight.dtype, layer.pending) == (torch.float64, 0)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_layer_made_and_taught_under_inference_mode_is_like_any_other(options):
    seed = torch.random.get_rng_state()
    layer = layer_of(**options)
    torch.random.set_rng_state(seed)
    with torch.inference_mode():
        other = layer_of(**options)
    pairs = [pairs_of(layer, rows) for rows in (1, 3, 2, 8, 4)]
    x = torch.randn(2, 7)
    with torch.no_grad():
        teach(layer, *pairs)
        y = layer(x)
    with torch.inference_mode():
        teach(other, *pairs)
        assert torch.equal(other(x), y)
        assert_same(state_of(layer), state_of(other))
    more, gradients = pairs_of(layer, 9), []
    for each in (layer, other):  # and goes on outside
        each.flush()
        teach(each, more, pairs[0])
        z = x.clone().requires_grad_()
        each(z).square().sum().backward()
        gradients.append(z.grad)
    assert torch.equal(*gradients)
    assert_same(state_of(layer), state_of(other))
    assert not any(t.is_inference() for t in other.state().values())


def test_conversions_counters_and_replaced_buffers_stay_writable_after_inference_mode():
    layer = layer_of()
    teach(layer, pairs_of(layer, 4))
    with torch.inference_mode():
        layer.double()
        layer.shared.update(("anchor", "memory"))
        layer.unshare("anchor")
        layer.unshare("memory", copy=False)
        layer.capturable_(2)
    assert not any(t.is_inference() for t in layer.state().values())
    teach(layer, *(pairs_of(layer, 2) for _ in range(4)))
    assert int(layer.step) == 1
    assert layer.pending == 6


@pytest.mark.parametrize("capturable", [None, 2])
def test_tensors_made_under_inference_mode_are_refused_outside_and_stay_as_they_are(capturable):
    source = layer_of().capturable_(capturable)
    teach(source, pairs_of(source, 2))
    with torch.inference_mode():
        layer = copy.deepcopy(source)
        teach(layer, pairs_of(source, 2))  # they can be written here
        before = state_of(layer)
    (pairs, more), state = pairs_of(source, 2), state_of(source)
    calls = [lambda: layer.learn(source.update_from(pairs, more)), layer.flush, layer.reset,
             lambda: layer.load_state(state)]  # fmt: skip
    for call in calls:
        with pytest.raises(RuntimeError, match=r"of layer were made under torch\.inference_mode\(\)"):
            call()
        assert_same(before, state_of(layer))
    copy.deepcopy(layer).capturable_(None).flush()  # as the error says


def test_outputs_follow_a_bias_that_is_replaced_removed_or_moved():
    layer, x = layer_of(), torch.randn(1, 7)

    def check():
        with torch.no_grad():
            torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
            assert binding.binding_of(layer) is not None

    check()
    layer.bias.data = torch.randn(5)
    check()
    layer.bias = torch.nn.Parameter(torch.randn(5), requires_grad=False)
    check()
    layer.bias = None
    check()


def test_draws_follow_a_seed_that_is_set():
    layer = layer_of(replay_capacity=4)
    other = copy.deepcopy(layer)
    teach(layer, pairs_of(layer, 1))  # bound
    teach(other, pairs_of(other, 1))
    for each in (layer, other):
        each.reset()
        each.seed = 12345
    other._binding = None
    pairs = [pairs_of(layer, 1) for _ in range(6)]
    teach(layer, *pairs)
    teach(other, *pairs)
    assert_same(state_of(layer), state_of(other))


@pytest.mark.parametrize("rows", [-1, -(10**6), 7, 10**12, 2.0, True, "3"])
@pytest.mark.parametrize("capturable", [None, 2])
def test_pending_out_of_range_is_refused(rows, capturable):
    layer = layer_of().capturable_(capturable)
    teach(layer, pairs_of(layer, 2))
    before = state_of(layer)
    with pytest.raises(ValueError, match=r"pending of layer must be a whole number in \[0, 6\], got"):
        layer.pending = rows
    assert_same(before, state_of(layer))
    layer.pending = 6
    assert layer.pending == 6


@pytest.mark.parametrize(("capturable", "rows"), [(None, 2), (None, 9), (2, 2), (4, 4)])
@pytest.mark.parametrize(
    ("name", "change", "error"),
    [("x", lambda t: t[:, :6], ValueError), ("delta", lambda t: t[:, :4], ValueError),
     ("delta", lambda t: t[:1], ValueError), ("delta", Tensor.double, TypeError), ("x", Tensor.half, TypeError),
     ("eta", Tensor.double, TypeError), ("eta", lambda t: t[:1], ValueError), ("eta", lambda t: t[:, None], ValueError),
     ("trace_delta", Tensor.double, TypeError), ("trace_delta", lambda t: t[:, :4], ValueError),
     ("delta", lambda t: t.T.contiguous().T, ValueError), ("moments", lambda t: t[:2], ValueError)],
)  # fmt: skip
def test_an_update_that_does_not_fit_is_refused_and_changes_no_bit(name, change, error, capturable, rows):
    layer = layer_of(importance="mas", rate="rms", replay_capacity=9).capturable_(capturable)
    teach(layer, pairs_of(layer, rows))
    before = state_of(layer)
    update = layer.update_from(*pairs_of(layer, rows))
    setattr(update, name, change(getattr(update, name)))
    with pytest.raises(error, match=f"^{name} must "):
        layer.learn(update)
    assert_same(before, state_of(layer))


@pytest.mark.parametrize("capturable", [None, 2])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [(name, torch.tensor([v]), rf"{name} of layer must be in \[0, \d+\], got {v}")
     for name in ("seen", "recent_seen", "step", "tokens") for v in (-1, -(2**63), 2**63 - 1)]
    + [("pending", torch.tensor([v]), rf"pending of layer must be a whole number in \[0, 6\], got {v}")
       for v in (-1, -2, 7, 2**40)]
    + [("pending", torch.tensor([2.0]), "pending of layer must hold an integer, got torch.float32"),
       ("seen", torch.tensor([float("nan")]), "seen of layer must hold an integer, got torch.float32"),
       ("pending", torch.tensor([2, 2]), r"pending of layer must have shape \(1,\), got \(2,\)"),
       ("anchor", torch.zeros(1, 7), r"anchor of layer must have shape \(5, 7\), got \(1, 7\)"),
       ("win_x", torch.zeros(7), r"win_x of layer must have shape \(6, 7\), got \(7,\)"),
       ("config", torch.zeros(1), "layer has no state named 'config'"),
       ("momentum", torch.zeros(5, 7), "layer has no state named 'momentum'")],
)  # fmt: skip
def test_state_that_does_not_fit_is_refused_and_changes_no_bit(name, value, message, capturable):
    layer = layer_of().capturable_(capturable)
    teach(layer, pairs_of(layer, 2))
    before = state_of(layer)
    state = {key: t + 1 if key not in ("pending", "step", "tokens") else t for key, t in before.items()}
    with pytest.raises(ValueError, match=message):
        layer.load_state({**state, name: value})  # also where the rest, which comes first, fits
    assert_same(before, state_of(layer))
    layer.load_state(state)
    assert_same(state, state_of(layer))


def test_a_base_that_does_not_fit_is_not_gone_back_to():
    layer = layer_of()
    teach(layer, pairs_of(layer, 4))
    protection.consolidate([layer])
    teach(layer, pairs_of(layer, 4))
    before, base = state_of(layer), dict(layer.base)
    layer.base["seen"] = torch.tensor([-3])
    with pytest.raises(ValueError, match=r"seen of layer must be in \[0, \d+\], got -3"):
        layer.reset()
    assert_same(before, state_of(layer))
    layer.base = base
    layer.reset()
    assert int(layer.seen) == 11


@pytest.mark.parametrize("kind", [Linear, LowRankLinear])
def test_the_docstring_names_every_buffer(kind):
    users = None if kind is Linear else ttt.LowRank(slots=2, rank=2, window=4)
    names = set(dict(kind(6, 5, config=ttt.TTTConfig(per_user=users))._layout(torch.float32)))
    assert len(names) > 10
    assert {name for name in names if f"``{name}``" not in kind.__doc__} == set()
