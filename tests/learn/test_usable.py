"""When a learner can be used: by one thread, in eval mode, with the layers it was made for, in any mode of autograd."""

import contextlib
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import plain_config
from tiny_models import adapted, assert_same, ids_of, state_of, tiny

import ttt
from ttt.rules import LogitDistillation, SequenceReplay

BUSY = "another thread is in Learner.observe"


def users_learner():
    config = plain_config(
        target_modules=["down_proj"], lr=0.01, chunk=8, per_user=ttt.LowRank(slots=4, rank=3, window=8)
    )
    return ttt.Learner(ttt.adapt_(tiny(), config))


@contextlib.contextmanager
def reading_elsewhere(learner, ids, **options):
    """Another thread is inside `observe` meanwhile: it stops in its second forward pass. Yields its results."""
    inside, go_on, calls, results = threading.Event(), threading.Event(), [], []

    def wait(module, args):
        calls.append(1)
        if len(calls) == 2:
            inside.set()
            assert go_on.wait(30)

    handle = learner.model.model.register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: results.append(learner.observe(ids, **options)))
    thread.start()
    try:
        assert inside.wait(30)
        yield results
    finally:
        go_on.set()
        thread.join()
        handle.remove()


def test_a_second_thread_is_refused_by_name_and_the_first_one_notices_nothing(tmp_path):
    model, learner = adapted()
    ttt.save(model, tmp_path / "file")
    twin, other, ids = copy.deepcopy(learner), ttt.Learner(model), ids_of(2, 33)
    snapshot = learner.snapshot()
    guarded, _ = adapted()
    guarded = ttt.Learner(guarded, guard=ttt.Guard([ids_of(1, 9)]))
    growing = ttt.GrowingLearner(other)
    calls = {
        "Learner.observe": lambda: learner.observe(ids), "Learner.calibrate": lambda: other.calibrate([ids]),
        "Learner.consolidate": other.consolidate, "Learner.rollback": lambda: other.rollback(snapshot),
        "Learner.generate": lambda: learner.generate(ids, max_new_tokens=2), "Learner.snapshot": other.snapshot,
        "Learner.reset": learner.reset, "Learner.flush": learner.flush,
        "ttt.learning": lambda: ttt.learning(model).__enter__(),
        "GraphedLearner": lambda: ttt.GraphedLearner(other, graph=False),
        "GrowingLearner.observe": lambda: growing.observe(ids), "GrowingLearner.score": lambda: growing.score(ids),
        "GrowingLearner.close": growing.close, "GrowingLearner.save": lambda: growing.save(tmp_path / "new"),
        "GrowingLearner.routed": lambda: growing.routed(ids).__enter__(),
        "ttt.save": lambda: ttt.save(model, tmp_path / "new"), "ttt.load": lambda: ttt.load(model, tmp_path / "file"),
        "ttt.fork": lambda: ttt.fork(model), "ttt.restore_": lambda: ttt.restore_(model),
        "ttt.export_peft": lambda: ttt.export_peft(model, tmp_path / "new", base_model="base"),
        "ttt.capturable_": lambda: ttt.capturable_(model, 8),
    }  # fmt: skip
    with reading_elsewhere(learner, ids) as results:
        for name, call in calls.items():
            with pytest.raises(RuntimeError, match=f"^{name} was called while {BUSY}"):
                call()
    expected = twin.observe(ids)
    assert not (tmp_path / "new").exists()
    assert torch.equal(results[0].nll, expected.nll)
    assert (results[0].learned, results[0].rejected) == (expected.learned, expected.rejected) == (4, 0)
    assert_same(state_of(twin.model), state_of(model))
    assert other.observe(ids).rejected == 0  # it may go on now
    with reading_elsewhere(guarded, ids), pytest.raises(RuntimeError, match=f"^Guard.check was called while {BUSY}"):
        guarded.guard.check()


def test_users_learn_in_one_thread_at_a_time():
    learner = users_learner()
    twin, ids = copy.deepcopy(learner), ids_of(2, 33)
    with reading_elsewhere(learner, ids, users=["a", "b"]) as results:
        for call in (
            lambda: learner.observe(ids, users=["c", "d"]), learner.reset, lambda: ttt.restore_(learner.model)
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match=BUSY):
                call()
    assert torch.equal(results[0].nll, twin.observe(ids, users=["a", "b"]).nll)
    assert learner.pool.users == ("a", "b")
    assert_same(twin.pool.export("a"), learner.pool.export("a"))


def test_models_of_their_own_learn_in_threads_of_their_own():
    model, learner = adapted()
    other, ids = ttt.Learner(ttt.fork(model)), ids_of(1, 20)
    with reading_elsewhere(learner, ids):
        other.observe(ids)
    assert_same(state_of(model), state_of(other.model))


def test_a_learning_block_is_for_one_thread():
    model = torch.nn.Sequential(ttt.nn.Linear(4, 4, config=plain_config()), torch.nn.Tanh())
    failed = []

    def enter():
        try:
            ttt.learning(model[0]).__enter__()
        except RuntimeError as error:
            failed.append(str(error))

    with ttt.learning(model):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        model(torch.randn(2, 4)).sum().backward()
    assert len(failed) == 1
    assert "another thread is in ttt.learning" in failed[0]
    assert model[0].pending == 2


def test_nothing_of_another_thread_is_learnt_while_a_third_one_compiles():
    """Torch says in all threads that it is compiling, while one of them does."""
    model = torch.nn.Sequential(ttt.nn.Linear(4, 4, config=plain_config()))
    compiles, go_on = threading.Event(), threading.Event()

    def slow(graph, inputs):
        compiles.set()
        assert go_on.wait(60)
        return graph

    def elsewhere():
        model(torch.randn(3, 4, requires_grad=True)).sum().backward()

    with ThreadPoolExecutor(2) as others:
        compiled = others.submit(torch.compile(lambda x: x + 1, backend=slow), torch.zeros(1))
        assert compiles.wait(60)
        try:
            with ttt.learning(model):
                model(torch.randn(2, 4)).sum().backward()
                others.submit(elsewhere).result()
        finally:
            go_on.set()
        assert compiled.result() == 1
    assert model[0].pending == 2


@pytest.mark.parametrize("what", ["save", "fork", "export_peft", "restore_"])
def test_learning_is_refused_while_another_thread_copies_the_layers(tmp_path, monkeypatch, what):
    """What is copied in the middle of a call cannot change before its end."""
    model, learner = adapted()
    ids = ids_of(1, 20)
    learner.observe(ids)
    before, inside, go_on = state_of(model), threading.Event(), threading.Event()
    last = learner.layers[-1]
    plain = type(last).effective_weight if what == "export_peft" else type(last).state

    def wait(layer, *args):
        if layer is last and threading.current_thread() is thread:
            inside.set()
            assert go_on.wait(30)
        return plain(layer, *args)

    def wait_in_copy(layer):
        wait(layer) if layer is last else None
        return plain_getstate(layer)

    plain_getstate = type(last).__getstate__
    calls = {
        "save": lambda: ttt.save(model, tmp_path / "file"), "fork": lambda: ttt.fork(model),
        "export_peft": lambda: ttt.export_peft(model, tmp_path / "folder", base_model="base"),
        "restore_": lambda: ttt.restore_(model, keep_learned=True),
    }  # fmt: skip
    if what == "fork":
        monkeypatch.setattr(type(last), "__getstate__", wait_in_copy)
    elif what == "restore_":
        plain = type(last).flush
        monkeypatch.setattr(type(last), "flush", wait)
    else:
        monkeypatch.setattr(type(last), plain.__name__, wait)
    thread = threading.Thread(target=calls[what])
    thread.start()
    try:
        assert inside.wait(30)
        with pytest.raises(RuntimeError, match=rf"Learner\.observe was called while another thread is in ttt\.{what}"):
            learner.observe(ids)
    finally:
        go_on.set()
        thread.join()
    monkeypatch.undo()
    if what == "restore_":
        with pytest.raises(RuntimeError, match="restored or adapted again"):
            learner.observe(ids)
    else:
        assert_same(before, state_of(model))
        learner.observe(ids)


def test_restoring_inside_a_learning_block_is_refused():
    model, _ = adapted()
    with ttt.learning(model):
        with pytest.raises(RuntimeError, match=r"inside ttt\.learning"):
            ttt.restore_(model)
        model(ids_of(1, 5)).logits.sum().backward()
    assert all(layer.pending for _, layer in ttt.learning_layers(model))
    ttt.restore_(model)


def test_restoring_leaves_layers_alone_that_were_put_in_by_hand():
    own = ttt.nn.Linear(4, 4, config=plain_config())
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), own)
    plain = model[0]
    ttt.adapt_(model, plain_config(), filter_fn=lambda module, name: name == "0")
    assert list(ttt.restore_(model)) == [plain, own]
    assert not own.released


def test_capturable_refuses_before_it_changes_a_layer():
    model = torch.nn.Sequential(
        ttt.nn.Linear(4, 4, config=plain_config()),
        ttt.nn.Linear(4, 4, config=plain_config(generated_rows=1, generated_rank=1, replay_beta=0.1)),
    )
    with pytest.raises(ValueError, match="generated_rows"):
        ttt.capturable_(model, 8)
    assert model[0].capturable is None


def test_a_learning_block_that_fails_leaves_nothing_on_the_layers():
    layer = ttt.nn.Linear(4, 4, config=plain_config())
    before = sorted(vars(layer))
    with pytest.raises(FloatingPointError), ttt.learning(layer):
        (layer(torch.randn(2, 4)) * torch.inf).sum().backward()
    assert sorted(vars(layer)) == before
    assert copy.deepcopy(layer).lock is not layer.lock


def test_a_failed_call_leaves_the_layers_free_for_other_threads():
    _, learner = adapted()
    with pytest.raises(TypeError):
        learner.observe(torch.ones(1, 9))
    with reading_elsewhere(learner, ids_of(1, 20)) as results:
        pass
    assert results[0].learned == 3


# -- inference mode -------------------------------------------------------------------------------------------


def life(learner, mode, users=None):
    """What a learner finds in its life, each step of which is entered in ``mode``."""
    torch.manual_seed(4)
    options = {} if users is None else {"users": users}
    found = []
    with mode():
        learner.calibrate([ids_of(2, 16)])
    with mode():
        mask, teach = torch.ones(2, 30), torch.rand(2, 30) < 0.7
        mask[0, :5] = 0
        found += [learner.observe(ids_of(2, 30), attention_mask=mask, learn_mask=teach, **options).nll]
    if users is not None:
        found.append(learner.observe(ids_of(2, 30), **options).nll)
        return [*found, *learner.pool.export("a").values()]
    with mode():
        found.append(learner.observe(ids_of(1, 9), learn_mask=torch.ones(1, 9, dtype=torch.bool)).nll)
        snapshot = learner.snapshot()
    with mode():
        learner.consolidate()
        found.append(learner.generate(ids_of(2, 9), max_new_tokens=9, learn_output=True, learn_every=4).nll)
    found.append(learner.observe(ids_of(2, 30)).nll)  # outside: no tensor of the state is one of inference mode
    with mode():
        learner.rollback(snapshot)
        learner.observe(ids_of(2, 30))
    learner.consolidate()
    with mode():
        graphed = ttt.GraphedLearner(learner, batch=2, graph=False)
        found.append(graphed.observe(ids_of(2, 17)).nll.clone())
    graphed.release()
    learner.observe(ids_of(2, 9))
    return [*found, *state_of(learner.model).values()]


@pytest.mark.parametrize("options", [{}, {"importance": "mas"}, {"orthogonal": 4}])
def test_under_inference_mode_a_learner_does_the_same_to_the_bit(options):
    _, learner = adapted(**options)
    twin = copy.deepcopy(learner)
    plain, inside = life(learner, contextlib.nullcontext), life(twin, torch.inference_mode)
    assert len(plain) == len(inside) > 6
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_under_inference_mode_users_and_rules_learn_the_same():
    learner = users_learner()
    twin = copy.deepcopy(learner)
    plain, inside = (life(e, mode, ["a", "b"]) for e, mode in
                     ((learner, contextlib.nullcontext), (twin, torch.inference_mode)))  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
    states, ids = [], [ids_of(2, 40), ids_of(2, 40)]
    base, _ = adapted()
    for mode in (contextlib.nullcontext, torch.inference_mode):
        model = copy.deepcopy(base)
        with mode():
            learner = ttt.Learner(model, rules=[SequenceReplay(4, 1, 6), LogitDistillation()])
            learner.observe(ids[0].clone())
        learner.observe(ids[1])
        states.append(state_of(model))
    assert_same(*states)


def test_under_inference_mode_a_learning_block_learns():
    layer, x = ttt.nn.Linear(4, 3, config=plain_config()), torch.randn(5, 4)
    layers = [layer, copy.deepcopy(layer)]
    for layer, mode in zip(layers, (contextlib.nullcontext, torch.inference_mode), strict=True):
        with mode(), ttt.learning(layer):
            layer(x).square().sum().backward()
    assert layers[0].pending == 5
    assert torch.equal(layers[0].effective_weight(), layers[1].effective_weight())


def test_a_model_made_under_inference_mode_is_refused_and_one_adapted_there_learns():
    config, base = plain_config(target_modules=["down_proj"], chunk=8), tiny()
    with torch.inference_mode():
        made, adapted_inside = ttt.adapt_(tiny(), config), ttt.adapt_(base, config)
    with pytest.raises(RuntimeError, match=r"weight was made under torch.inference_mode.*outside of"):
        ttt.Learner(made)
    assert ttt.Learner(adapted_inside).observe(ids_of(1, 17)).learned == 2


# -- the model changed under the learner ----------------------------------------------------------------------


def calls_of(learner, ids):
    return (
        lambda: learner.observe(ids), lambda: learner.generate(ids, max_new_tokens=2),
        lambda: learner.calibrate([ids]), learner.consolidate, learner.snapshot, learner.reset, learner.flush,
    )  # fmt: skip


def test_training_mode_is_refused_and_eval_mode_is_the_way_out():
    model, learner = adapted()
    ids, before = ids_of(1, 20), state_of(model)
    for change in (model.train, model.model.layers[0].train):
        change()
        for call in calls_of(learner, ids):
            with pytest.raises(RuntimeError, match=r"put in training mode .* call model.eval\(\)"):
                call()
        model.eval()
    assert_same(before, state_of(model))
    assert learner.observe(ids).learned == 3


@pytest.mark.parametrize("again", [None, {}, {"per_user": ttt.LowRank(slots=2, rank=2, window=8)}])
def test_a_learner_of_layers_that_were_taken_out_is_refused(again):
    model, learner = adapted()
    growing, ids = ttt.GrowingLearner(learner), ids_of(1, 20)
    graphed = ttt.GraphedLearner(learner, graph=False)
    learner.calibrate([ids])
    ttt.restore_(model)
    if again is not None:
        ttt.adapt_(model, plain_config(target_modules=["down_proj"], **again))
    before = {k: t.clone() for k, t in model.state_dict().items()}
    calls = (*calls_of(learner, ids), lambda: growing.observe(ids), lambda: graphed.observe(ids_of(1, 9)))
    for call in calls:
        with pytest.raises(RuntimeError, match=r"restored or adapted again since then; .* ttt.Learner\(model\)"):
            call()
    graphed.release()
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    if again is not None:
        users = {"users": ["a"]} if again else {}
        assert ttt.Learner(model).observe(ids_of(1, 129), **users).learned > 0


def test_a_users_learner_of_layers_that_were_taken_out_is_refused():
    learner = users_learner()
    ttt.restore_(learner.model)
    with pytest.raises(RuntimeError, match="restored or adapted again"):
        learner.observe(ids_of(1, 9), users=["a"])


# -- what users cannot have -----------------------------------------------------------------------------------


def test_rules_and_growing_columns_are_refused_with_users_and_can_serve_others():
    model = users_learner().model
    rule, guard, ids = SequenceReplay(4, 1, 6), ttt.Guard([ids_of(1, 9)]), ids_of(1, 20)
    with pytest.raises(ValueError, match=r"rules must not be given .* users .* got \['SequenceReplay'\]"):
        ttt.Learner(model, rules=[rule])
    with pytest.raises(ValueError, match=r"GrowingLearner is for one set of weights, but every user has their own"):
        ttt.GrowingLearner(ttt.Learner(model))
    other, _ = adapted()
    assert ttt.Learner(other, rules=[rule], guard=guard).observe(ids).learned == 3


def test_a_guard_of_a_model_with_users_becomes_one_for_each_user():
    model = users_learner().model
    guard = ttt.Guard([ids_of(2, 9)], threshold=1e-6, every=4, strengthen=3.0)
    learner = ttt.Learner(model, guard=guard)
    guards = learner.user_guards
    assert learner.guard is None
    assert (guards.threshold, guards.bound, guards.every, guards.strengthen) == (1e-6, 1.5e-6, 4, 3.0)
    learner.observe(ids_of(2, 20), users=["a", None])
    assert guards.history
    assert {check.user for check in guards.history} == {"a"}
    with pytest.raises(ValueError, match="model has guards for its users already"):
        ttt.Learner(model, guard=guard)


def test_rules_and_guards_of_a_learner_that_was_refused_can_serve_another():
    model, _ = adapted()
    rule, guard = SequenceReplay(4, 1, 6), ttt.Guard([ids_of(1, 9)])
    with pytest.raises(ValueError, match="length must be at most"):
        ttt.Learner(model, rules=[rule, SequenceReplay(4, 1, 100)], guard=guard)
    handle = model.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ttt.Learner(model, rules=[rule], guard=guard)
    handle.remove()
    assert ttt.Learner(model, rules=[rule], guard=guard).observe(ids_of(1, 20)).learned == 3


@pytest.mark.parametrize("users", [False, True])
def test_a_model_whose_learning_layer_was_replaced_is_refused_by_name(users):
    model = users_learner().model if users else adapted()[0]
    kinds = (ttt.nn.Linear, ttt.nn.LowRankLinear)
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, kinds))
    other = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
    model.set_submodule(name, other)
    with pytest.raises(ValueError, match=f"{name} no longer learns: a Linear took its place .* Quantize the model"):
        ttt.Learner(model)
    assert model.get_submodule(name) is other
