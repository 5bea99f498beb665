"""The steps that a CUDA graph captures, and its replays, never have the host wait for the device."""

import pytest
import torch

pytest.importorskip("transformers")

from helpers import plain_config
from no_host_waits import no_host_waits
from tiny_models import TARGETS, adapted, ids_of, tiny
from user_rates import layer_on

import ttt
from ttt.learn import cuda_graph

OPTIONS = {
    "plain": {},
    "one token": {"chunk": 1, "window": 4},
    "rates in nats": {"rate": "decrease", "clip": 3.0, "burst": 1.2},
    "all": {"ewc_lambda": 0.5, "replay_rows": 4, "window": 16},
    "sampled trace": {"importance": "mas", "trace_every": 4},
    "no learning": {"lr": 0.0},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_a_step_of_a_graphed_learner_reads_no_tensor(options):
    _, learner = adapted(**OPTIONS[options])
    check_steps(learner, learns=options != "no learning")


def test_nor_does_that_of_the_default_protection():
    model = ttt.adapt_(tiny(), ttt.TTTConfig(TARGETS["llama"], layers="last:0.5", chunk=8))
    check_steps(ttt.Learner(model))


def check_steps(learner, learns=True):
    learner.calibrate([ids_of(2, 16)])
    graphed = ttt.GraphedLearner(learner, batch=2, graph=False)
    ids = ids_of(2, graphed.chunk + 1)
    graphed.step(ids)  # a model of transformers may read what it caches once
    for _ in range(6):
        with no_host_waits():
            graphed.step(ids)
    assert int(graphed.learned) == (7 if learns else 0)


def test_nothing_is_read_between_the_first_chunk_of_a_text_and_its_last(monkeypatch):
    _, learner = adapted()
    graphed, whole = ttt.GraphedLearner(learner, batch=2, graph=False), cuda_graph.read

    def watched(*args):
        with no_host_waits():
            return whole(*args)

    graphed.step(ids_of(2, 9))
    monkeypatch.setattr(cuda_graph, "read", watched)
    assert graphed.observe(ids_of(2, 49)).learned == 6


def test_a_step_of_users_reads_no_tensor(monkeypatch):
    layer = layer_on("cpu", torch.float32, rate="energy", lr=0.01)
    x, delta, y = torch.randn(5, 33), torch.randn(5, 20), []
    users, eta = torch.tensor([0, 1, -1, 1, 2], dtype=torch.int32), torch.rand(5) * 1e-2

    @torch.no_grad()
    def step():
        layer.routing.set(users)
        y.append(layer(x))
        layer._learn(x, delta, eta, users)

    step()
    # Tensors on the CPU are looked at to save work; on a GPU that would be a wait.
    monkeypatch.setattr(torch.Tensor, "is_cpu", False, raising=False)
    for _ in range(8):
        with no_host_waits():
            step()
    assert int(layer.step.max()) > 0


def test_any_model_and_loss_read_no_tensor():
    layer = ttt.nn.Linear(64, 48, config=plain_config(window=8, lr=1e-3))
    model = torch.nn.Sequential(layer, torch.nn.ReLU(), torch.nn.Linear(48, 8).requires_grad_(False))
    ttt.capturable_(model, 4)

    def step():
        with ttt.learning(model):
            model(torch.randn(4, 64)).square().sum().backward()

    step()
    for _ in range(4):
        with no_host_waits():
            step()


@pytest.mark.parametrize(
    "read", ["bool(t.all())", "int(t[0])", "t.tolist()", "t[t > 0]", "float(t.sum())", "t.nonzero()"]
)
def test_what_reads_a_tensor_is_found(read):
    with pytest.raises(AssertionError, match="the host"), no_host_waits():
        eval(read, {"t": torch.ones(3)})
