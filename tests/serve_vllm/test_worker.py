"""Parts of the plugin in vLLM's worker, without vLLM running."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import ttt
from ttt.per_user.calibration_file import default_file
from ttt.serve import errors, jobs
from ttt.serve.daemon_threads import DaemonThreads
from ttt.serve.errors import ServerFailure
from ttt.serve.sessions import Sessions
from ttt.serve.vllm import users
from ttt.serve.vllm.adapters import Adapters, key_of, label
from ttt.serve.vllm.capture import KEY, Capture
from ttt.serve.vllm.cpu_lora import add_lora_linear
from ttt.serve.vllm.lessons import Learnt
from ttt.serve.vllm.options import Options
from ttt.serve.vllm.worker import _pass_base_by
from ttt.store import StorageFailure


def test_tokens_of_no_user_do_not_read_the_last_slot():
    torch.manual_seed(0)
    a, b = torch.randn(2, 1, 4, 8), torch.randn(2, 1, 6, 4)
    x, y = torch.randn(5, 8).bfloat16(), torch.randn(5, 6).bfloat16()
    found = y.clone()
    starts, lengths, slots = torch.tensor([0, 2, 3]), torch.tensor([2, 1, 2]), torch.tensor([-1, 1, -1])
    wrapper = SimpleNamespace(no_lora=False, prefill_metadata=(starts, lengths, slots, 2, 5, True))
    add_lora_linear(wrapper, found, x, (a,), (b,), 1.0, (6,))
    assert torch.equal(found[[0, 1, 3, 4]], y[[0, 1, 3, 4]])
    wanted = (y[2].float() + x[2].float() @ a[1, 0].T @ b[1, 0].T).bfloat16()
    assert torch.allclose(found[2].float(), wanted.float(), rtol=0.02, atol=0.05)


def adapted(slots=2):
    torch.manual_seed(0)
    model = nn.ModuleDict({"down_proj": nn.Linear(8, 6, bias=False)})
    config = ttt.TTTConfig(
        target_modules=["down_proj"], protect=[], per_user=ttt.LowRank(slots=slots, rank=2, window=2)
    )
    ttt.adapt_(model, config)
    return ttt.pool_of(model)


def taught(pool, user):
    pool.open(user)
    layer = next(iter(pool.layers.values()))
    slot = torch.full((1,), pool.slot(user), dtype=torch.int32)
    layer.learn(torch.randn(1, 8), torch.randn(1, 6), torch.ones(1), slot)


def users_of(tmp_path, pool, threads=1):
    """`Users` without vLLM."""
    made = object.__new__(users.Users)
    made.options, made.pool, made.learner = Options("here", identity="header"), pool, None
    made.blocks, made.runner = None, SimpleNamespace(requests={})
    made.sessions = Sessions(pool, ttt.Store(tmp_path / "store"), "model")
    made.adapters = SimpleNamespace(publish=lambda user: None, remove=lambda user: None, introduce=lambda *_: None)
    made.capture = SimpleNamespace(take=lambda key, count: torch.zeros(1, count, 8), drop=lambda key: None, tokens=0)
    made._lesson, made._stamp, made._stamps, made._running, made._tickets = {}, {}, iter(range(99)), {}, iter(range(99))
    made._threads = DaemonThreads(threads, "test")
    return made


def finish(made, answer):
    while answer[0] == "later":
        answer = made.proceed(answer[1])
    return answer


@pytest.mark.parametrize("why", ["a failure", "a caller who has gone"])
def test_a_lesson_that_ends_early_leaves_the_user_as_before(why, tmp_path, monkeypatch):
    pool = adapted()
    made = users_of(tmp_path, pool)
    assert finish(made, made.begin("open", "ada", "key", []))[0] == "done"
    taught(pool, "ada")
    before = pool.export("ada")

    def slices(*arguments):
        taught(pool, "ada")
        yield
        raise FloatingPointError("not finite")

    monkeypatch.setattr(users, "learn_in_slices", slices)
    answer = made.begin("learn", "ada", "captured", [1, 2], [False, True], 0)
    assert answer[0] == "later"
    assert pool.export("ada")["down_proj.a"].shape[0] == 2
    if why == "a failure":
        assert made.proceed(answer[1])[:2] == ("error", ServerFailure.__name__)
    else:
        made.cancel(answer[1])
    after = pool.export("ada")
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert made.sessions.get("ada").updates == 0
    made.sessions.close()


def test_a_user_whom_another_server_holds_is_opened_again_without_counting_anything(tmp_path):
    made, other = users_of(tmp_path, adapted()), adapted()
    taught(other, "ada")
    store = made.sessions.store
    with store.lease("ada", 60) as theirs:
        store.put(theirs, other.export("ada"), {"updates": 4, "tokens": 40, "model": "model"})
        for _ in range(3):
            state, known, _ = finish(made, made.begin("open", "ada", "key", ["ada"]))
            counters = (state, known["updates"], known["stored"], known["tokens"], known["version"])
            assert counters == ("done", 4, 4, 40, 1)
            assert "another server holds the lease" in known["read_only"]
            answer = finish(made, made.begin("learn", "ada", "captured", [1, 2], [False, True], 0))
            assert (answer[:2], answer[2]["code"]) == (("error", "Conflict"), "read_only")
    known = finish(made, made.begin("open", "ada", "key", ["ada"]))[1]
    assert all(torch.equal(t, made.pool.export("ada")[name]) for name, t in other.export("ada").items())
    assert (known["updates"], known["stored"], known["read_only"]) == (4, 4, "")
    made.sessions.close()


def test_a_lesson_has_more_time_while_the_engine_answers_nobody(tmp_path, monkeypatch):
    pool = adapted()
    made = users_of(tmp_path, pool)
    finish(made, made.begin("open", "ada", "key", []))
    given = []

    def slices(*arguments):
        *_, budget = arguments
        for requests in ({}, {"another user's": object()}):
            made.runner.requests = requests
            given.append(budget())
            yield
        return Learnt(tokens=1)

    monkeypatch.setattr(users, "learn_in_slices", slices)
    assert finish(made, made.begin("learn", "ada", "captured", [1, 2], [False, True], 0))[0] == "done"
    assert given == [users.ALONE, made.options.slice]
    made.sessions.close()


def test_the_store_is_written_by_another_thread(tmp_path, monkeypatch):
    pool = adapted()
    made = users_of(tmp_path, pool)
    finish(made, made.begin("open", "ada", "key", []))
    writers, put = [], made.sessions.store.put
    monkeypatch.setattr(
        made.sessions.store, "put", lambda *given: (writers.append(threading.get_ident()), put(*given))[1]
    )

    def slices(*arguments):
        taught(pool, "ada")
        return Learnt(tokens=1)
        yield

    monkeypatch.setattr(users, "learn_in_slices", slices)
    state, known, _ = made.begin("learn", "ada", "captured", [1, 2], [False, True], 0)
    assert (state, known["lesson"]["tokens"]) == ("done", 1)
    assert finish(made, made.begin("stored", "ada"))[1]["stored"] == 1
    assert writers
    assert threading.get_ident() not in writers
    made.sessions.close()


def test_who_waits_for_a_store_that_takes_nothing_hears_of_it_and_it_is_stored_later(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "LONGEST_WAIT", 0.5)
    pool = adapted()
    made = users_of(tmp_path, pool)
    finish(made, made.begin("open", "ada", "key", []))
    put = made.sessions.store.put

    def full(*given):
        raise StorageFailure("the disk is full")

    def slices(*arguments):
        taught(pool, "ada")
        return Learnt(tokens=1)
        yield

    monkeypatch.setattr(made.sessions.store, "put", full)
    monkeypatch.setattr(users, "learn_in_slices", slices)
    assert finish(made, made.begin("learn", "ada", "captured", [1, 2], [False, True], 0))[0] == "done"
    state, name, told = finish(made, made.begin("stored", "ada"))
    assert (state, name, told["code"]) == ("error", "NotStored", "not_stored")
    assert isinstance(errors.NotStored(**told), errors.Unavailable)
    monkeypatch.setattr(made.sessions.store, "put", put)
    monkeypatch.setattr(jobs, "LONGEST_WAIT", 60.0)
    assert finish(made, made.begin("stored", "ada"))[1]["stored"] == 1
    made.sessions.close()


def test_opening_makes_room_of_users_who_are_not_kept_and_stores_them(tmp_path):
    pool = adapted(slots=1)
    made = users_of(tmp_path, pool)
    finish(made, made.begin("open", "ada", "key", ["ada"]))
    taught(pool, "ada")
    made.sessions.learnt("ada", 1)
    state = pool.export("ada")
    assert finish(made, made.begin("open", "bob", "other", ["ada", "bob"]))[:2] == ("error", "TooBusy")
    assert finish(made, made.begin("open", "bob", "other", ["bob"]))[0] == "done"
    assert pool.users == ("bob",)
    assert finish(made, made.begin("open", "ada", "new", ["ada"]))[0] == "done"
    assert all(torch.equal(t, state[name]) for name, t in pool.export("ada").items())
    made.sessions.close()


def opening_bob(made, monkeypatch, kept):
    """Begin to open bob, for whom a user who is not ``kept`` makes room: the answer, and what lets the store go on."""
    go_on, fetch = threading.Event(), made.sessions.fetch

    def slow(user):
        if user == "bob":
            assert go_on.wait(60)
        return fetch(user)

    monkeypatch.setattr(made.sessions, "fetch", slow)
    answer = made.begin("open", "bob", "key of bob", ["bob", *kept])
    assert answer[0] == "later"
    return answer, go_on


def test_a_user_who_is_back_before_the_slot_was_needed_goes_on_and_can_learn(tmp_path, monkeypatch):
    pool = adapted()
    made = users_of(tmp_path, pool, threads=2)
    for user in ("ada", "cid"):
        finish(made, made.begin("open", user, user, ["ada", "cid"]))
    taught(pool, "ada")
    made.sessions.learnt("ada", 1)
    state, stamp = pool.export("ada"), made._stamp["ada"]
    answer, go_on = opening_bob(made, monkeypatch, ["cid"])
    back, known, _ = made.begin("open", "ada", "new", ["bob", "ada"])  # in the place of cid
    assert (back, known["read_only"], known["updates"], known["rows"]) == ("done", "", 1, 1)
    assert known["stamp"] != stamp
    go_on.set()
    assert finish(made, answer)[0] == "done"
    assert set(pool.users) == {"ada", "bob"}
    assert all(torch.equal(t, state[name]) for name, t in pool.export("ada").items())
    made.sessions.require_writable("ada")
    assert finish(made, made.begin("stored", "ada"))[1]["stored"] == 1
    made.sessions.close()


def test_of_two_users_who_are_opened_at_a_time_neither_takes_the_place_of_the_other(tmp_path, monkeypatch):
    pool = adapted()
    made = users_of(tmp_path, pool, threads=2)
    for user in ("ada", "cid"):
        finish(made, made.begin("open", user, user, ["ada", "cid"]))
    answer, go_on = opening_bob(made, monkeypatch, ["cid"])
    assert finish(made, made.begin("open", "dan", "key of dan", ["bob", "dan"]))[0] == "done"
    go_on.set()
    assert finish(made, answer)[0] == "done"
    assert set(pool.users) == {"bob", "dan"}
    made.sessions.close()


def test_what_was_measured_of_a_model_serves_all_numbers_of_slots():
    assert default_file(adapted(1)) == default_file(adapted(2))


class Manager:
    """Stands for vLLM's ``LoRAModelManager`` with two slots."""

    def __init__(self):
        stacked = SimpleNamespace(lora_a_stacked=(torch.ones(2, 1, 8, 8),), lora_b_stacked=(torch.ones(2, 1, 6, 8),))
        self.modules, self.lora_index_to_id = {"down_proj": stacked}, [None, 7]
        self._registered_adapters = SimpleNamespace(cache={7: SimpleNamespace(loras=None)})


def test_an_update_reaches_the_slot_in_place_and_what_vllm_keeps(monkeypatch):
    pytest.importorskip("vllm")
    pool, manager = adapted(), Manager()
    adapters = Adapters(manager, pool, 8)
    adapters.introduce("key", "ada")
    request = SimpleNamespace(lora_path=label("key", "boot", 3), lora_int_id=7)
    assert key_of(request.lora_path) == "key"
    empty = adapters.load(request).loras["down_proj"]  # one without tensors would end the engine
    assert empty.lora_a.shape[0] == 1
    assert not empty.lora_a.any()
    assert not empty.lora_b.any()
    taught(pool, "ada")
    module = manager.modules["down_proj"]
    a, b = module.lora_a_stacked[0], module.lora_b_stacked[0]
    adapters.publish("ada")
    layer = pool.layers["down_proj"]
    assert torch.equal(a[1, 0, :1], layer.a[0, :1])
    assert torch.equal(b[1, 0, :, :1], layer.b[0, :1].T)
    assert not a[1, 0, 1:].any()
    assert not b[1, 0, :, 1:].any()
    assert bool((a[0] == 1).all())  # another user's slot
    kept = manager._registered_adapters.cache[7].loras["down_proj"]
    assert torch.equal(kept.lora_a, layer.a[0, :1])
    assert adapters.load(SimpleNamespace(lora_path=label("no", "boot", 3), lora_int_id=8)).loras["down_proj"].rank == 8


def batch(done, length, start, end, extra):
    """A model runner with one request."""
    parameters = SimpleNamespace(extra_args=extra)
    return SimpleNamespace(
        input_batch=SimpleNamespace(
            req_ids=["r"],
            num_reqs=1,
            num_computed_tokens_cpu=np.array([done, 0]),
            num_prompt_tokens=np.array([length, 9]),  # of rows that are not in use, anything
        ),
        requests={"r": SimpleNamespace(sampling_params=parameters, num_prompt_tokens=length)},
        query_start_loc=SimpleNamespace(np=torch.tensor([start, end]).numpy()),
    )


def test_capture_joins_parts_and_takes_those_anew_that_were_preempted():
    capture = Capture(None, 100)
    states = torch.arange(12.0).view(6, 2)
    for done, stop in ((0, 2), (2, 4), (0, 3), (3, 6)):  # preempted after four tokens
        capture.runner = batch(done, 5, 0, stop - done, {KEY: "k"})
        capture.before_block(None, (None, states[done:stop], None))
    assert torch.equal(capture.take("k", 5), states[:5].unsqueeze(0))  # not the sixth, which was generated
    assert capture.tokens == 0
    assert capture.take("k", 5) is None


def test_a_step_without_a_prompt_looks_at_no_request():
    class Untouched(dict):
        def get(self, *args):
            raise AssertionError("looked at")

    capture = Capture(batch(5, 5, 0, 1, {KEY: "k"}), 100)
    capture.runner.requests = Untouched(capture.runner.requests)
    capture.before_block(None, (None, torch.zeros(1, 2), None))
    assert capture.tokens == 0


def test_wrapped_layers_are_passed_by_where_no_token_has_an_adapter():
    class Wrapper:
        def __init__(self, no_lora):
            self.punica_wrapper = SimpleNamespace(no_lora=no_lora)

        def base_layer(self, x):
            return x + 1, None

        def forward(self, x):
            return x + 2, None

    _pass_base_by(Wrapper)
    assert Wrapper(True).forward(1) == (2, None)
    assert Wrapper(False).forward(1) == (3, None)


def test_capture_notices_missing_parts_and_keeps_only_what_was_asked_for():
    capture = Capture(batch(0, 4, 0, 4, None), 100)
    capture.before_block(None, (None, torch.zeros(4, 2), None))
    assert capture.tokens == 0
    capture.runner = batch(2, 4, 0, 2, {KEY: "k"})  # as after a hit of the prefix cache
    capture.before_block(None, (None, torch.zeros(2, 2), None))
    assert capture.take("k", 4) is None


def test_what_is_captured_has_a_bound():
    capture = Capture(None, 5)
    for key in "abc":
        capture.runner = batch(0, 2, 0, 2, {KEY: key})
        capture.before_block(None, (None, torch.zeros(2, 2), None))
    assert capture.tokens == 4
    assert capture.take("a", 2) is None
    assert capture.take("c", 2) is not None


def test_captured_states_can_be_learnt_from_though_they_were_made_in_inference_mode():
    with torch.inference_mode():
        capture = Capture(batch(0, 2, 0, 2, {KEY: "k"}), 5)
        capture.before_block(None, (None, torch.zeros(2, 2), torch.ones(2, 2)))
        found = capture.take("k", 2)
    assert not found.is_inference()
    assert bool((found == 1).all())
