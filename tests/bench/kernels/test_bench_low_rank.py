"""The suite ``low_rank``: bytes and flops against hand counts, and checks that accept right and catch wrong results."""

import pytest

from bench.kernels.contender import Unavailable
from bench.kernels.suites import low_rank


@pytest.fixture(autouse=True)
def _few_layers(monkeypatch):
    monkeypatch.setattr(low_rank, "layer_count", lambda size: 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("users", [1, 8, 32])
@pytest.mark.parametrize("kind", [low_rank.Mixed, low_rank.MixedLearning])
def test_right_contenders_pass_their_checks(kind, users, dtype):
    for make in kind("cpu", dtype, 96, 32, users, 4).contenders().values():
        try:
            contender = make()
        except Unavailable:
            continue
        contender.check()
        contender.run()


def test_a_wrong_output_is_caught(monkeypatch):
    real = low_rank.LowRankLinear.forward
    monkeypatch.setattr(low_rank.LowRankLinear, "forward", lambda layer, x: real(layer, x) * 1.01)
    with pytest.raises(AssertionError, match="y is off by"):
        low_rank.Mixed("cpu", "float32", 96, 32, 8, 4).mixed().check()


@pytest.mark.parametrize("users", [1, 8, 32])
def test_one_slot_is_compressed_every_other_step(users):
    case = low_rank.MixedLearning("cpu", "float32", 48, 32, users, 4)
    layers = case.layers()
    for layer in layers:  # other tests use the same layers
        layer.step.zero_()
    contender = case.mixed()
    for run in range(1, 40):
        contender.run()
        assert sum(int(layer.step.sum()) for layer in layers) == run


def test_bytes_and_flops():
    case = low_rank.Mixed("cpu", "bfloat16", 10, 4, 2, 3)
    assert case.bytes("nn.Linear") == 2 * (100 + 2 * 40)
    assert case.bytes("ttt") == 2 * (100 + 2 * 40 + 2 * 3 * 20)
    assert case.flops("nn.Linear") == 2 * 4 * 100
    assert case.flops("ttt") == 2 * 4 * (100 + 3 * 20)
