"""The cases of the bench: bytes and flops against hand counts, and checks that accept right and catch wrong results."""

import dataclasses
import json
from unittest import mock

import pytest
import torch
from tiny_cases import reasons, tiny_commit, tiny_decode

import ttt
from bench.kernels import measure, models, state, suites
from bench.kernels.contender import Unavailable
from bench.kernels.plain_torch import PlainLayer, compiled, plain_commit, plain_window_linear
from bench.kernels.suites import language
from bench.kernels.suites.commit import Commit
from bench.kernels.suites.decode import Decode
from bench.kernels.suites.fisher import Fisher
from bench.kernels.suites.growth import layer_memory
from bench.kernels.suites.loops import Loop
from bench.kernels.suites.observe import Observe
from bench.kernels.suites.window_linear import WindowLinear
from ttt.ops.backends import calls

# -- bytes and flops ----------------------------------------------------------------------------------------------


def test_bytes_and_flops_of_a_commit():
    case = Commit("cpu", "bfloat16", 3, 5, 7, 2, "float32")
    # W read and written, W* read: 2 bytes each; Omega read, F read and written: 4 each; x and delta; 2 replay rows.
    assert case.bytes("ttt") == 15 * (3 * 2 + 3 * 4) + 7 * (5 + 3) * 2 + 2 * 5 * 2
    assert case.flops("ttt") == 2 * 15 * 7 + 2 * 15 * 7 + 2 * 15 * 2 + 2 * 15 * 2  # G, S, E, E^T V
    assert case.product_flops("ttt") == 4 * 15 * 7
    assert case.bytes("forward") == 15 * 2 + 7 * 8 * 2
    assert case.flops("forward") == 2 * 15 * 7
    assert case.name == "3x5, T = 7, R = 2, float32 state"


def test_bytes_and_flops_of_decoding_are_the_mean_over_one_window():
    m, n, c = 3, 5, 4
    case = Decode("cpu", "bfloat16", m, n, c, 1, "bfloat16")
    moved = flops = 0
    for held in range(c):  # token by token
        moved += 2 * (m * n + m + n) + 2 * held * (m + n) + 2 * (m + n)
        flops += 2 * m * n + 2 * held * (m + n)
    moved += 6 * m * n * 2 + 2 * c * (m + n)
    flops += 4 * m * n * c
    assert case.bytes("ttt") == round(moved / c)
    assert case.flops("ttt") == flops / c
    assert case.bytes("nn.Linear") == 2 * (m * n + m + n)
    # Of a large layer: 2 + 12 / C bytes a weight, and the window.
    large = Decode("cpu", "bfloat16", 4096, 4096, 16, 1, "bfloat16")
    assert large.bytes("ttt") / 4096**2 == pytest.approx(2 + 12 / 16, rel=0.01)


def test_bytes_and_flops_of_window_linear_and_fisher():
    window = WindowLinear("cpu", "float32", 3, 5, 2, 7)
    assert window.bytes("ttt") == 4 * (15 + 2 * 5 + 2 * 3 + 7 * 5 + 7 * 3)
    assert window.flops("ttt") == 2 * 2 * (15 + 7 * 5 + 7 * 3)
    assert window.flops("nn.Linear") == 2 * 2 * 15
    fisher = Fisher("cpu", "float32", 3, 5, 2, 1)
    assert fisher.flops("forward + backward") == 4 * 15 * 2
    assert fisher.flops("BackPACK") == 6 * 15 * 2


def test_layer_memory_counts_the_tensors_of_a_layer():
    layer = ttt.nn.Linear(5, 3, bias=False, dtype=torch.bfloat16, config=state.LEARNS)
    found = layer_memory(3, 5, "bfloat16")
    counters = {"seen", "recent_seen", "step", "tokens", "importance_scale", "pending"}
    assert sum(found.values()) == sum(t.nbytes for name, t in layer.state().items() if name not in counters)
    assert found["trace"] == 3 * 5 * 2


def test_names_of_cases_are_unique_and_unknown_suites_are_refused():
    for device in ("cpu", "cuda"):
        found = suites.select(device)
        keys = [(c.suite, c.name, c.dtype) for c in found]
        assert len(set(keys)) == len(keys)
        assert {c.suite for c in found} == set(suites.SUITES)
        assert any(c.quick for c in found)
        for case in found:
            json.dumps(case.parameters())
    with pytest.raises(ValueError, match=r"suite must be of commit, .*got 'comit'"):
        suites.select("cpu", ["comit"])
    assert all(c.m == 1024 for c in suites.select("cpu", ["commit"], only="1024x1024"))


# -- contenders: right ones pass, wrong ones are caught ------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [tiny_commit, tiny_decode])
def test_right_contenders_pass_their_checks(make, dtype):
    case = make(dtype)
    good, not_timed = measure.checked(case)
    assert not not_timed
    assert set(good) == {"ttt", "plain torch", case.forward}
    for contender in good.values():
        contender.run()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("soft", [False, True])
def test_removal_of_directions_is_counted_and_checked(soft, dtype, monkeypatch):
    case = Decode("cpu", dtype, 24, 40, 4, 1, dtype, orthogonal=3, soft=soft)
    numbers = 40 + 24 * soft
    assert set(measure.checked(case)[0]) == {"ttt", "ttt, k = 0", "nn.Linear"}
    assert case.bytes("ttt") - case.bytes("ttt, k = 0") == (3 + 1) * numbers * getattr(torch, dtype).itemsize
    assert case.flops("ttt") - case.flops("ttt, k = 0") == 4 * numbers * 3
    monkeypatch.setattr("ttt.nn.linear.binding_of", lambda layer: None)
    monkeypatch.setattr("ttt.nn.base.project_rows", lambda x, basis, side: x)
    assert set(reasons(case)) == {"ttt"}


def test_a_step_is_a_forward_pass_and_then_its_share_of_a_commit():
    """Each takes the larger of the times of its bytes and of its products, or both."""
    case = Decode("cpu", "float32", 10, 20, 4, 1, "float32")
    (moved, flops), (written, products) = case.parts("ttt")
    assert moved == 4 * (10 * 20 + (1 + 1 + 1.5) * 30)
    assert flops == 2 * 10 * 20 + 3 * 30
    assert written == 4 * (30 + 10 * 20 * 6 / 4)
    assert products == 4 * 10 * 20
    assert (case.bytes("ttt"), case.flops("ttt")) == (moved + written, flops + products)
    # With 1 s a byte and 2 s a flop the products take longer in the second part only.
    found = measure._against_parts([(100, 10), (10, 40)], [360.0, 90.0], [1.0, 0.5], [2.0, 0.25])
    assert found["ratio_to_part_bound"] == (360 / (100 + 80) + 90 / (50 + 10)) / 2
    assert found["ratio_to_part_sum"] == (360 / (120 + 90) + 90 / (52.5 + 15)) / 2


def test_a_rotation_commits_to_every_layer():
    case = tiny_commit()
    _, layers = case.layers()
    assert len(layers) == -(-(1 << 16) // (4 * 24 * 40 * 4)) | 1
    contender = case.contenders()["ttt"]()
    before = [layer["weight"].clone() for layer in layers]
    for _ in range(contender.cycle):
        contender.run()
    assert not any(torch.equal(layer["weight"], w) for layer, w in zip(layers, before, strict=True))


@pytest.mark.parametrize("window", [1, 2, 8])
def test_exactly_one_commit_falls_on_every_window_of_tokens(window, monkeypatch):
    case = tiny_decode(window=window)
    monkeypatch.setattr(Decode, "in_cache", False)
    contender = case.learning()
    assert contender.units == window
    assert contender.cycle > 3
    calls.clear()
    for number in range(1, 2 * contender.cycle):
        contender.run()
        assert sum(count for (op, _, _), count in calls.items() if op == "commit") == number


@pytest.mark.parametrize("window", [1, 2, 3, 8])
def test_decoding_with_capturable_layers_is_checked(window, monkeypatch):
    """Capturable layers, as on a GPU, but on CPU: their check passes, and one run is a step of each layer."""
    case = tiny_decode(window=window)
    monkeypatch.setattr(Decode, "in_cache", False)
    monkeypatch.setattr(Decode, "capturable", True)
    contender = case.learning()
    contender.check()
    weights, _ = case.weights()
    assert contender.units == len(weights)
    assert contender.cycle == 1
    before = [w.clone() for w in weights]
    for _ in range(window + 1):  # each layer has committed at least once
        contender.run()
    assert not any(torch.equal(w, old) for w, old in zip(weights, before, strict=True))
    options = ttt.nn.Linear.commit_options
    with monkeypatch.context() as patch:
        patch.setattr(ttt.nn.Linear, "commit_options", lambda self: {**options(self), "lam": 50.0})
        with pytest.raises(AssertionError, match="is off by"):
            case.learning().check()


def corrupted(function, **changes):
    """``function`` with some of its arguments multiplied by the factors in ``changes``."""

    def wrong(*args, **kwargs):
        return function(*args, **{k: v * changes.get(k, 1) for k, v in kwargs.items()})

    return wrong


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_check_of_commit_catches_errors(dtype, monkeypatch):
    case = tiny_commit(dtype, replay=2)
    original = ttt.ops.commit

    def written_to(name):
        def wrong(**given):
            original(**given)
            given[name][0, 0] += 8

        return wrong

    for wrong, word in (
        (lambda **given: None, "weight"),
        (corrupted(original, delta=1.05), "weight"),
        (lambda **given: original(**given | {"replay_rows": 0}), "weight"),
        (lambda **given: original(**given, kind="mas"), "trace"),
        (written_to("trace"), "trace"),
        (written_to("anchor"), "anchor was written"),
        (written_to("importance"), "importance was written"),
    ):
        monkeypatch.setattr(ttt.ops, "commit", wrong)
        assert word in reasons(case)["ttt"]
    monkeypatch.setattr(ttt.ops, "commit", original)
    assert not reasons(case)
    monkeypatch.setattr("bench.kernels.suites.commit.plain_commit", corrupted(plain_commit, lam=500.0))
    assert "weight" in reasons(case)["plain torch"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_check_of_decode_catches_errors(dtype, monkeypatch):
    case = tiny_decode(dtype)
    with monkeypatch.context() as patch:  # forgets its window
        patch.setattr(ttt.nn.Linear, "forward", lambda self, x: torch.nn.functional.linear(x, self.weight))
        assert "the output" in reasons(case)["ttt"]
    with monkeypatch.context() as patch:  # never commits
        patch.setattr("ttt.nn.linear.binding_of", lambda layer: None)
        patch.setattr(ttt.nn.Linear, "_commit", lambda self, *args: None)
        assert set(reasons(case)) == {"ttt"}
    with monkeypatch.context() as patch:  # the trace stays behind
        trace = PlainLayer.learn

        def learn(self, *args):
            kept = self.layer["trace"].clone()
            trace(self, *args)
            self.layer["trace"].copy_(kept)

        patch.setattr(PlainLayer, "learn", learn)
        assert "trace" in reasons(case)["plain torch"]
    assert not reasons(case)


def test_the_checks_of_window_linear_and_fisher_catch_errors(monkeypatch):
    case = WindowLinear("cpu", "float32", 24, 40, 2, 4)
    assert not reasons(case)
    wrong = lambda x, w, bias, win_x, win_delta, win_eta: plain_window_linear(x, w, win_x, win_delta, win_eta * 1.01)  # noqa: E731
    monkeypatch.setattr(ttt.ops, "window_linear", wrong)
    assert set(reasons(case)) == {"ttt"}
    monkeypatch.undo()
    fisher = Fisher("cpu", "float32", 8, 12, 3, 1)
    makers = fisher.contenders()
    for name in ("ttt", "forward + backward", "plain torch"):
        makers[name]().check()
    original = ttt.ops.commit
    # The square of the batch's gradient is not the sum of the tokens' squares.
    monkeypatch.setattr(ttt.ops, "commit", lambda w, a, b, trace, x, d, eta, step: trace.add_((d.T @ x).square()))
    with pytest.raises(AssertionError, match="trace is off"):
        makers["ttt"]().check()
    monkeypatch.setattr(ttt.ops, "commit", lambda *args: (original(*args), args[0].data.add_(1)))
    with pytest.raises(AssertionError, match="the weight was written"):
        makers["ttt"]().check()


@pytest.fixture
def tiny_model(monkeypatch):
    monkeypatch.setattr(models, "frozen", lambda *args: models.load(*args).requires_grad_(False))
    return "llama 2x64"


def test_the_checks_of_loops_catch_errors(tiny_model, monkeypatch):
    case = Loop("cpu", "float32", tiny_model, 6)
    good, not_timed = measure.checked(case)
    assert not [row for row in not_timed if row["failed"]]
    assert {"observe", "forward", "AdamW", "SGD in hooks", "dynamic evaluation"} <= set(good)
    step = torch.optim.AdamW.step
    with monkeypatch.context() as patch:

        def step_too_far(self):  # by one percent
            for group in self.param_groups:
                group["lr"] *= 1.01
            step(self)

        patch.setattr(torch.optim.AdamW, "step", step_too_far)
        with pytest.raises(AssertionError, match="off by"):
            case.contenders()["AdamW"]().check()
    with monkeypatch.context() as patch:
        patch.setattr(ttt.nn.Linear, "learn", lambda self, update: None)
        with pytest.raises(AssertionError, match="down_proj"):
            case.contenders()["observe"]().check()


def test_the_check_of_observe_catches_errors(tiny_model, monkeypatch):
    case = Observe("cpu", "float32", tiny_model, 4, 12)
    assert not reasons(case)
    observe = ttt.Learner.observe

    def wrong(self, ids):  # learns first, then scores
        observe(self, ids)
        return observe(self, ids, learn=False)

    with monkeypatch.context() as patch:
        patch.setattr(ttt.Learner, "observe", wrong)
        assert "the first chunk" in reasons(case)["observe"]
    with monkeypatch.context() as patch:
        patch.setattr(ttt.Learner, "observe", lambda self, ids: observe(self, ids, learn=False))
        assert "bits, then" in reasons(case)["observe"]


@pytest.mark.parametrize("adapted", language.CONFIGS)
def test_the_check_of_language_models_catches_errors(tiny_model, monkeypatch, adapted):
    case = language.Language("cpu", "float32", tiny_model, 4, 12, adapted)
    assert not reasons(case)
    assert set(case.contenders()) == {"observe", "forward", "forward, whole text"}
    observe = ttt.Learner.observe
    monkeypatch.setattr(ttt.Learner, "observe", lambda self, ids, **kw: observe(self, ids, learn=False, **kw))
    assert "bits, then" in reasons(case)["observe"]


def test_language_models_read_the_same_text_in_chunks_and_at_once(tiny_model):
    case = language.Language("cpu", "float32", tiny_model, 5, 12)
    each = [dataclasses.replace(case, chunk=chunk).reader()() for chunk in (5, 12)]
    torch.testing.assert_close(*each, rtol=1e-4, atol=1e-4)


def test_a_language_model_that_is_not_installed_is_unavailable(monkeypatch):
    monkeypatch.setattr(models, "load_language_model", mock.Mock(side_effect=FileNotFoundError("install it")))
    case = language.Language("cpu", "float32", models.SMOLLM, 4, 12)
    assert set(reasons(case).values()) == {"install it"}


def test_a_function_that_torch_did_not_compile_is_unavailable(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    with pytest.raises(Unavailable, match="without compiling"):
        compiled(plain_window_linear)(*(torch.ones(2, 2),) * 3, torch.ones(2, 2), torch.ones(2))
