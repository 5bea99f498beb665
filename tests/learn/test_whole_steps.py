"""A learning step is all or nothing: signals between two layers wait, and a failing layer is undone or reported."""

import copy
import functools
import os
import random
import signal
import time

import pytest
import torch
from helpers import plain_config
from tiny_models import adapted, assert_same, ids_of, state_of, tiny

import ttt
from ttt.signals import SignalsDeferred

LAYERS = 4
TORN = "ended half-way"


def learners(**options):
    """Two learners of equal models, all of whose blocks learn."""
    model, learner = adapted(layers="all", **options)
    learner.calibrate([ids_of(2, 16)])
    learner.observe(ids_of(2, 21))
    other = copy.deepcopy(model)
    return learner, ttt.Learner(other)


def users_learner(model=None, guard=None, **options):
    config = plain_config(target_modules=["down_proj"], per_user=ttt.LowRank(slots=4, rank=3, window=8),
                          **{"lr": 0.01, "chunk": 8, "replay_capacity": 32, "rate": "rms", **options})  # fmt: skip
    learner = ttt.Learner(ttt.adapt_(tiny() if model is None else model, config), guard=guard)
    learner.calibrate([ids_of(2, 16)])
    return learner


def exports(pool):
    return {f"{user}.{key}": t for user in pool.users for key, t in pool.export(user).items()}


def during(monkeypatch, layer, action, *, before, name="learn"):
    """Let ``layer``'s method do ``action``, before or after its work, when it is called next."""
    real, called = getattr(layer, name), []

    def method(*args, **kwargs):
        if called:
            return real(*args, **kwargs)
        called.append(1)
        if before:
            action()
        result = real(*args, **kwargs)
        if not before:
            action()
        return result

    monkeypatch.setattr(layer, name, method)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def fail():
    raise MemoryError("for the test")


# -- signals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [5, 64])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("index", range(LAYERS))
def test_ctrl_c_at_any_layer_waits_for_the_end_of_the_step(index, before, window, monkeypatch):
    learner, twin = learners(window=window)
    ids = ids_of(2, 33)
    during(monkeypatch, learner.layers[index], interrupt, before=before)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        learner.observe(ids)
    assert signal.getsignal(signal.SIGINT) is handler
    twin.observe(ids[:, :9])  # one whole chunk
    assert_same(state_of(twin.model), state_of(learner.model))
    more = ids_of(1, 20)
    assert torch.equal(learner.observe(more).nll, twin.observe(more).nll)


@pytest.mark.parametrize("index", range(LAYERS))
def test_ctrl_c_while_users_learn_waits_for_the_end_of_the_step(index, monkeypatch):
    base = tiny()
    learner, ids = users_learner(copy.deepcopy(base)), ids_of(2, 33)
    twin = copy.deepcopy(learner)
    during(monkeypatch, list(learner.pool.layers.values())[index], interrupt, before=True)
    with pytest.raises(KeyboardInterrupt):
        learner.observe(ids, users=["a", "b"])
    twin.observe(ids[:, :9], users=["a", "b"])
    assert_same(exports(twin.pool), exports(learner.pool))


@pytest.mark.parametrize("index", range(LAYERS))
def test_ctrl_c_while_a_user_is_loaded_or_forgotten_waits_until_all_layers_are_written(index, monkeypatch):
    learner = users_learner()
    pool, layer = learner.pool, list(learner.pool.layers.values())[index]
    learner.observe(ids_of(2, 33), users=["a", "b"])
    other, forgotten = pool.export("b"), pool.slot("a")
    with monkeypatch.context() as patch:
        during(patch, layer, interrupt, before=True, name="load_slot")
        with pytest.raises(KeyboardInterrupt):
            pool.load("a", other)
    assert_same(other, pool.export("a"))
    with monkeypatch.context() as patch:
        during(patch, layer, interrupt, before=True, name="clear_slot")
        with pytest.raises(KeyboardInterrupt):
            pool.forget("a")
    assert pool.users == ("b",)
    assert not any(t.any() for each in pool.layers.values() for t in each.slot_state(forgotten).values())


def test_a_handler_that_raises_at_any_moment_leaves_the_layers_in_step():
    """An alarm clock rings at a random moment of a reading, again and again."""
    learner, _ = learners(window=5, rate="rms")
    ids = ids_of(2, 33)

    def duration_of_a_reading():
        start = time.perf_counter()
        learner.observe(ids)
        return time.perf_counter() - start

    # The first reading of a process may take much longer, so that an alarm would ring after most of the later ones.
    duration = min(duration_of_a_reading() for _ in range(4))

    class Alarm(Exception):
        pass

    def ring(number, frame):
        raise Alarm

    handler, alarms, draws = signal.signal(signal.SIGALRM, ring), 0, random.Random(5)
    try:
        for _ in range(60):
            try:
                signal.setitimer(signal.ITIMER_REAL, draws.uniform(0.01, 1) * duration)
                learner.observe(ids)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Alarm:
                alarms += 1
            counters = [(la.step, la.tokens, la.recent_seen, la.moments[1, 2]) for la in learner.layers]
            counts = {(la.pending, *map(int, held)) for la, held in zip(learner.layers, counters, strict=True)}
            assert len(counts) == 1
            assert not any(layer.torn for layer in learner.layers)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert alarms > 10


def test_deferred_signals_are_all_handled_at_the_end_in_order():
    arrived = []

    def note(number, frame):
        arrived.append(number)
        raise InterruptedError(number)

    def send_while_deferred():
        with SignalsDeferred(), SignalsDeferred():
            for number in numbers:
                os.kill(os.getpid(), number)
            assert arrived == []

    numbers = [signal.SIGUSR1, signal.SIGUSR2]
    handlers = [signal.signal(number, note) for number in numbers]
    try:
        with pytest.raises(InterruptedError):
            send_while_deferred()
        assert arrived == numbers
        assert [signal.getsignal(number) for number in numbers] == [note, note]
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


# -- layers that fail -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("index", range(LAYERS))
def test_after_a_failing_layer_nothing_goes_on_until_a_whole_state_is_back(index, before, monkeypatch, tmp_path):
    learner, _ = learners(window=5)
    ids, snapshot, whole = ids_of(2, 33), learner.snapshot(), state_of(learner.model)
    ttt.save(learner.model, tmp_path / "whole.safetensors")
    calibrated = copy.deepcopy(learner)
    calibrated.reset()
    other = ttt.Learner(learner.model)
    repairs = {
        "rollback": (lambda: learner.rollback(snapshot), whole),
        "load": (lambda: ttt.load(learner.model, tmp_path / "whole.safetensors"), whole),
        "reset": (learner.reset, state_of(calibrated.model)),
    }
    for repair, expected in repairs.values():
        with monkeypatch.context() as patch:
            during(patch, learner.layers[index], fail, before=before)
            with pytest.raises(MemoryError):
                learner.observe(ids)
        copied = copy.deepcopy(learner)
        for call in (
            lambda: learner.observe(ids), lambda: other.observe(ids, learn=False), learner.snapshot,
            learner.consolidate, learner.flush, lambda: learner.calibrate([ids]),
            lambda: learner.generate(ids, max_new_tokens=2), functools.partial(copied.observe, ids),
            lambda: ttt.learning(learner.model).__enter__(), lambda: ttt.GraphedLearner(learner, graph=False),
            lambda: ttt.Learner(ttt.fork(learner.model)).observe(ids),
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match=rf"a learning step {TORN} \(MemoryError: for the test\)"):
                call()
        repair()
        assert_same(expected, state_of(learner.model))
        assert learner.observe(ids).rejected == 0
        learner.rollback(snapshot)


@pytest.mark.parametrize("index", range(LAYERS))
def test_a_failing_layer_inside_a_learning_block_is_reported_too(index, monkeypatch):
    model = torch.nn.Sequential(*[ttt.nn.Linear(6, 6, config=plain_config()) for _ in range(LAYERS)])
    during(monkeypatch, model[index], fail, before=False)
    with pytest.raises(MemoryError), ttt.learning(model):
        model(torch.randn(3, 6)).square().sum().backward()
    with pytest.raises(RuntimeError, match=TORN), ttt.learning(model):
        pass
    for layer in model:
        layer.reset()
    with ttt.learning(model):
        model(torch.randn(3, 6)).square().sum().backward()


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("method", ["learn", "count"])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("index", range(LAYERS))
def test_users_get_back_what_they_had_when_a_layer_fails(index, before, method, guarded, monkeypatch):
    """At every chunk up to the second compression, against a learner that no failure hit."""
    learner = users_learner(guard=ttt.Guard([ids_of(1, 9)], every=12) if guarded else None)
    twin = copy.deepcopy(learner)
    users, layer = ["a", "b", None, "a"], list(learner.pool.layers.values())[index]
    learner.pool.open("c")
    twin.pool.open("c")
    for _ in range(3):
        ids, state = ids_of(4, 9), exports(learner.pool)
        with monkeypatch.context() as patch:
            during(patch, layer, fail, before=before, name=method)
            with pytest.raises(MemoryError):
                learner.observe(ids, users=users)
        assert_same(state, {key: t for key, t in exports(learner.pool).items() if key in state})
        assert torch.equal(learner.observe(ids, users=users).nll, twin.observe(ids, users=users).nll)
        assert_same(exports(twin.pool), exports(learner.pool))
    assert all(int(each.step[learner.pool.slot("a")]) > 2 for each in learner.pool.layers.values())


def test_a_layer_that_cannot_take_its_rows_is_found_before_any_layer_learns():
    learner, _ = learners()
    learner.layers[-1].capturable_(16)
    before = state_of(learner.model)
    with pytest.raises(ValueError, match="capturable for steps of 16 rows, got 8"):
        learner.observe(ids_of(1, 9))
    with pytest.raises(ValueError, match="capturable"), ttt.learning(learner.model):
        learner.model(ids_of(1, 6)).logits.square().sum().backward()
    assert_same(before, state_of(learner.model))
    assert learner.observe(ids_of(2, 9)).rejected == 0


def test_a_window_that_a_capturable_layer_cannot_take_is_found_before_any_layer_goes_back():
    learner, _ = learners(window=64)
    snapshot = learner.snapshot()  # 40 rows
    learner.observe(ids_of(2, 9))
    learner.layers[-1].capturable_(3)
    before = state_of(learner.model)
    with pytest.raises(ValueError, match="pending = 40 is no whole number"):
        learner.rollback(snapshot)
    assert_same(before, state_of(learner.model))


@pytest.mark.parametrize("index", range(LAYERS))
def test_calibration_that_fails_while_it_writes_changes_nothing(index, monkeypatch):
    model, learner = adapted(layers="all", orthogonal=4)
    twin, before, batches = copy.deepcopy(learner), state_of(model), [ids_of(2, 16)]
    calls, real = [], ttt.nn.Linear.refresh_basis

    def refresh(layer):
        calls.append(1)
        real(layer)
        if len(calls) == index + 1:
            fail()

    with monkeypatch.context() as patch:
        patch.setattr(ttt.nn.Linear, "refresh_basis", refresh)
        with pytest.raises(MemoryError):
            learner.calibrate(batches)
    assert_same(before, state_of(model))
    learner.calibrate(batches)
    twin.calibrate(batches)
    assert_same(state_of(twin.model), state_of(model))


@pytest.mark.parametrize("index", range(LAYERS))
def test_a_consolidation_that_fails_can_only_be_reset_or_rolled_back(index, monkeypatch, tmp_path):
    learner, twin = learners()
    snapshot, ids = learner.snapshot(), ids_of(2, 9)
    before = state_of(learner.model)
    twin.reset()
    for repair, expected in ((learner.reset, state_of(twin.model)), (lambda: learner.rollback(snapshot), before)):
        with monkeypatch.context() as patch:
            during(patch, learner.layers[index], fail, before=False, name="unshare")
            with pytest.raises(MemoryError):
                learner.consolidate()
        with pytest.raises(RuntimeError, match=rf"Learner.consolidate {TORN}"):
            learner.observe(ids)
        for what, call in (
            ("ttt.save", lambda: ttt.save(learner.model, tmp_path / "torn.safetensors")),
            ("ttt.fork", lambda: ttt.fork(learner.model)),
            ("ttt.export_peft", lambda: ttt.export_peft(learner.model, tmp_path / "torn", base_model="base")),
            ("ttt.restore_", lambda: ttt.restore_(learner.model, keep_learned=True)),
        ):
            with pytest.raises(RuntimeError, match=rf"^{what} needs .*Learner\.consolidate {TORN}"):
                call()
        assert list(tmp_path.iterdir()) == []
        repair()
        assert_same(expected, state_of(learner.model))
        learner.rollback(snapshot)
