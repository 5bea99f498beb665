"""What kernels for many layers do not take: layers do it one by one, and `ttt.info` counts the reason."""

import copy

import pytest
import torch
import torch.distributed as dist
from helpers import plain_config
from test_many_kernels import COUNTS, FEW_ROWS, all_rows, layers_of, rows_of, update_of
from tiny_models import assert_same
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.testing._internal.two_tensor import TwoTensor

from ttt.learn.step import write
from ttt.nn import Linear
from ttt.nn.many_bindings import bindings_of
from ttt.nn.many_forward import _gradients, _outputs
from ttt.nn.many_updates import updates_from
from ttt.ops import backends, cpu

pytestmark = pytest.mark.skipif(cpu._C is None, reason="there is no kernel")


def counted(op):
    """Which backends ran ``op`` since the counts were cleared, each with the reason, and how often."""
    return {(backend, why): calls for (name, backend, why), calls in backends.calls.items() if name == op}


# -- rows in tensors whose own address is 0 -----------------------------------------------------------------------


@pytest.mark.parametrize("back", [False, True])
def test_rows_that_wrap_other_tensors_are_computed_in_these(back):
    layers = layers_of(5, 8, torch.float32)
    rows, compute = all_rows(layers, int(back)), _gradients if back else _outputs
    one, other = (
        torch.cat([
            layer._transposed_window(part) if back else layer(part)
            for layer, part in zip(layers, given.split(COUNTS), strict=True)
        ])
        for given in (rows, 2 * rows)
    )  # fmt: skip
    backends.calls.clear()
    found = compute(layers, TwoTensor(rows, 2 * rows), COUNTS)
    assert torch.equal(found.a, one)
    assert torch.equal(found.b, other)
    op = "experts_backward" if back else "experts_forward"
    assert counted(op) == {(backends.ONE_BY_ONE, "rows in a TwoTensor"): 1}


@pytest.fixture
def mesh(tmp_path):
    """Of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("back", [False, True])
def test_rows_in_a_dtensor_are_refused_as_a_layer_that_is_called_by_itself_does(mesh, back):
    layers = layers_of(5, 8, torch.float32)
    rows = DTensor.from_local(all_rows(layers, int(back), FEW_ROWS), mesh, [Replicate()])
    with pytest.raises(RuntimeError, match=r"got mixed torch\.Tensor and DTensor"):
        (_gradients if back else _outputs)(layers, rows, FEW_ROWS)


def test_updates_are_made_of_rows_that_wrap_others_without_their_address(monkeypatch):
    monkeypatch.setattr(cpu, "takes", lambda *tensors: False)  # plain rows, too, are multiplied by torch
    layers = layers_of(5, 8, torch.float32, rate="decrease", feedback=30.0)
    pairs = [rows_of(layer, count) for layer, count in zip(layers, COUNTS, strict=True)]
    wanted = [layer.update_from([pair]) for layer, pair in zip(layers, pairs, strict=True)]
    wrapped = [([tuple(TwoTensor(t, t.clone()) for t in pair)], None, None) for pair in pairs]
    for update, one in zip(updates_from(layers, wrapped), wanted, strict=True):
        assert torch.equal(update.eta.a, one.eta)
        assert torch.equal(update.eta.b, one.eta)


def test_an_update_whose_rows_wrap_others_is_not_written_from_their_address():
    layer, plain = layers_of(5, 8, torch.float32)[:1], update_of(layers_of(5, 8, torch.float32)[0], 3)
    update = copy.copy(plain)
    update.x, update.delta, update.eta = (TwoTensor(t, t) for t in (plain.x, plain.delta, plain.eta))
    binding = bindings_of("experts_learn", layer)[0]
    assert binding.given(plain, 0) is not None
    for name in ("x", "delta", "eta"):
        partly = copy.copy(plain)
        setattr(partly, name, getattr(update, name))
        assert binding.given(partly, 0) is None, name


# -- what is counted ----------------------------------------------------------------------------------------------


def step(layers, counts=COUNTS):
    """Let layers learn, with the counts of calls begun anew; against twins that learn by themselves."""
    updates, twins = [update_of(la, count) for la, count in zip(layers, counts, strict=True)], copy.deepcopy(layers)
    backends.calls.clear()
    write(list(zip(layers, copy.deepcopy(updates), strict=True)))
    found = counted("experts_learn")
    for layer, twin, update in zip(layers, twins, updates, strict=True):
        twin.learn(update)
        assert_same(layer.state(), twin.state())
    return found


SEVERAL = "a commit that replays rows of several sources"


@pytest.mark.parametrize("source", ["generated_rows", "distill_rows"])
def test_only_experts_that_learn_in_one_call_are_counted_as_such(source):
    layers = layers_of(5, 8, torch.float32, **{source: 2})
    few = [1 if layer.pending < 5 else 0 for layer in layers]
    assert step(layers, few) == {("cpu", ""): 1}
    assert step(layers, [6] * 7) == {(backends.ONE_BY_ONE, SEVERAL): 1}
    assert all(int(layer.step) > 0 for layer in layers)
    for layer in layers:
        layer.flush()
    assert step(layers, [6, 1, 6, 1, 1, 1, 1]) == {("cpu", ""): 1, (backends.ONE_BY_ONE, SEVERAL): 1}


def test_nothing_is_counted_where_nothing_is_learnt():
    layers = layers_of(5, 8, torch.float32)
    assert step(layers, [0] * 7) == {}
    config = plain_config(window=6, lr=0.0, ewc_lambda=0.0, replay_rows=0)
    still = [Linear(8, 5, bias=False, config=config, name=f"expert.{e}") for e in range(7)]
    for layer in still:
        layer.routed = True
    assert step(still) == {}
    assert not any(layer.pending for layer in still)


def test_layers_with_tensors_of_inference_mode_learn_by_themselves():
    layers = layers_of(5, 8, torch.float32)
    with torch.inference_mode():
        layers[1].win_x = layers[1].win_x.clone()
        found = step(layers)
    assert found == {("cpu", ""): 1, (backends.ONE_BY_ONE, "tensors that were made in inference mode"): 1}


def test_a_layer_that_is_given_twice_learns_both_updates():
    layers = layers_of(5, 8, torch.float32)
    twins = copy.deepcopy(layers)
    given = [(at, update_of(layers[at], count)) for at, count in [(0, 2), (1, 1), (0, 3), (0, 5), (1, 2)]]
    backends.calls.clear()
    write([(layers[at], copy.deepcopy(update)) for at, update in given])
    assert counted("experts_learn") == {
        ("cpu", ""): 1,
        (backends.ONE_BY_ONE, "a layer that learns twice in one step"): 1,
    }
    for at, update in given:
        twins[at].learn(update)
    for layer, twin in zip(layers, twins, strict=True):
        assert_same(layer.state(), twin.state())
    assert int(layers[0].tokens) == 10


# -- layers that have no kernels ----------------------------------------------------------------------------------


class Held(nn.Parameter):
    """A parameter of another type."""


def replaced(layer, weight):
    layer._parameters["weight"] = weight
    layer._binding = None


UNBOUND = {
    "a weight that is not contiguous": lambda layer: replaced(
        layer, nn.Parameter(layer.weight.T.contiguous().T, requires_grad=False)
    ),
    "a weight that is a Held": lambda layer: replaced(layer, Held(layer.weight.detach(), requires_grad=False)),
    "a weight without elements": lambda layer: replaced(layer, nn.Parameter(torch.empty(0, 8), requires_grad=False)),
    "no C++ kernel for torch.float64": lambda layer: layer.double(),
    "no C++ kernel for importance and trace of different dtypes": lambda layer: setattr(
        layer, "trace", layer.trace.double()
    ),
}


@pytest.mark.parametrize("why", UNBOUND)
def test_the_reason_is_that_of_the_first_layer_without_kernels(why):
    layers = layers_of(5, 8, torch.float32, ewc_lambda=0.1)
    UNBOUND[why](layers[3])
    backends.calls.clear()
    assert bindings_of("experts_forward", layers) == []
    assert counted("experts_forward") == {(backends.ONE_BY_ONE, why): 1}


def test_modes_that_must_see_every_op_are_a_reason_too():
    layers = layers_of(5, 8, torch.float32)
    backends.calls.clear()
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert bindings_of("experts_forward", layers) == []
    why = "a dispatch mode or a compiler that must see every op"
    assert counted("experts_forward") == {(backends.ONE_BY_ONE, why): 1}
