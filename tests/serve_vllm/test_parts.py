"""Parts of the plugin that need no server."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ttt
from ttt.serve.calibration import default_file
from ttt.serve.errors import BadRequest, RequestError, ServerFailure, TooBusy, Unauthenticated
from ttt.serve.keys import add_key
from ttt.serve.sessions import Sessions
from ttt.serve.vllm import supported, users
from ttt.serve.vllm.adapters import Adapters, key_of, label
from ttt.serve.vllm.capture import KEY, Capture
from ttt.serve.vllm.cpu_lora import add_lora_linear
from ttt.serve.vllm.engine import Engine
from ttt.serve.vllm.identity import Identify, Turn, _headers
from ttt.serve.vllm.lessons import Learnt
from ttt.serve.vllm.options import Options, enabled
from ttt.serve.vllm.seats import Seats
from ttt.serve.vllm.turns import Turns

# -- options, and what is refused -------------------------------------------------------------------------------------


def test_options_come_from_the_environment_and_name_what_is_wrong(tmp_path):
    given = {"TTT_VLLM_STORE": "here", "TTT_VLLM_IDENTITY": "header", "TTT_VLLM_SLOTS": "3", "TTT_VLLM_RANK": "17"}
    assert enabled(given)
    assert not enabled({})
    found = Options.from_environment(given)
    assert (found.store, found.slots, found.adapter_rank) == ("here", 3, 128)
    assert found.blocks(30) == range(22, 30)
    for name, value in {
        "SLOTS": "0", "RANK": "none", "WINDOW": "512", "LAYERS": "all", "IDENTITY": "field", "KEYS": "keys.json",
        "LEARN": "wait", "LEASE": "0", "SLICE": "0", "LESSON": "1", "LR": "-1", "PATIENCE": "nan", "SLOT": "3",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"TTT_VLLM_{name}"):
            Options.from_environment(given | {f"TTT_VLLM_{name}": value})


def test_other_versions_of_vllm_are_refused():
    supported.check_version("0.32.0")
    supported.check_version("0.32.0+cpu")
    for version in ("0.31.9", "0.32.1", "0.33.0", "1.0"):
        with pytest.raises(RuntimeError, match=f"vLLM {version} is installed: it was not tested"):
            supported.check_version(version)


def test_what_was_not_tested_is_refused_by_name(monkeypatch):
    supported.check_arguments(SimpleNamespace())
    for name, value, said in (
        ("tensor_parallel_size", 2, "--tensor-parallel-size 2"),
        ("pipeline_parallel_size", 2, "--pipeline-parallel-size 2"),
        ("data_parallel_size", 2, "--data-parallel-size 2"),
        ("quantization", "awq", "--quantization awq"),
        ("speculative_config", {"method": "ngram"}, "--speculative-config"),
        ("enable_lora", True, "--enable-lora"),
        ("kv_transfer_config", object(), "--kv-transfer-config"),
    ):
        with pytest.raises(ValueError, match=said):
            supported.check_arguments(SimpleNamespace(**{name: value}))
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=1"):
        supported.check_arguments(SimpleNamespace())


def test_models_and_platforms_that_were_not_tested_are_refused():
    def config(architecture="LlamaForCausalLM", quantization=None, device="cpu"):
        model = SimpleNamespace(hf_config=SimpleNamespace(architectures=[architecture]), quantization=quantization)
        return SimpleNamespace(model_config=model, device_config=SimpleNamespace(device_type=device))

    options = Options("here", identity="header")
    supported.check_config(config(), options)
    for wrong, said in (
        (config("MixtralForCausalLM"), "MixtralForCausalLM"),
        (config(quantization="gptq"), "gptq"),
        (config(device="cuda"), "got cuda"),
    ):
        with pytest.raises(ValueError, match=said):
            supported.check_config(wrong, options)


# -- who asks ---------------------------------------------------------------------------------------------------------


def test_identity_comes_from_headers_that_cannot_be_given_twice(tmp_path):
    key = add_key(tmp_path / "keys.json", "ada")
    identify = Identify(Options("here", keys=str(tmp_path / "keys.json")))
    assert identify({"authorization": f"Bearer {key}"}).user == "ada"
    with pytest.raises(Unauthenticated):
        identify({"authorization": "Bearer other"})
    with pytest.raises(RequestError):
        identify({"authorization": f"Bearer {key}", "x-ttt-user": "bob"})
    behind_a_proxy = Identify(Options("here", identity="header"))
    assert behind_a_proxy({"x-ttt-user": "bob"}).user == "bob"
    with pytest.raises(Unauthenticated):
        behind_a_proxy({})
    with pytest.raises(BadRequest):
        behind_a_proxy({"x-ttt-user": "no user"})
    with pytest.raises(BadRequest, match="once"):
        _headers({"headers": [(b"x-ttt-user", b"ada"), (b"X-TTT-User", b"bob")]})


# -- seats ------------------------------------------------------------------------------------------------------------


class FakeEngine:
    """Stands for `Engine`: notes what is called, and holds "learn" until it may end."""

    def __init__(self):
        self.calls, self.stamp, self.may_learn = [], 0, asyncio.Event()

    async def call(self, operation, *arguments):
        self.calls.append((operation, *arguments))
        if operation == "learn":
            await self.may_learn.wait()
        await asyncio.sleep(0)
        self.stamp += 1
        return {"stamp": self.stamp}


def seats_of(count=2, patience=0.2):
    engine = FakeEngine()
    return engine, Seats(engine, count, patience)


def test_a_seat_that_is_held_is_not_given_away():
    async def run():
        engine, seats = seats_of()
        async with seats.hold("ada") as ada, seats.hold("bob"):
            with pytest.raises(TooBusy):
                async with seats.hold("cid"):
                    pass
            seats.pin(ada)  # as a lesson does that goes on after its request
        async with seats.hold("cid"):
            pass
        assert engine.calls[-1][3] == ["ada", "cid"]  # who was not to be evicted
        async with seats.hold("ada") as again:
            assert again is ada

    asyncio.run(run())


def test_a_number_or_name_is_never_used_again():
    async def run():
        _, seats = seats_of(count=1)
        seen = set()
        for user in ("ada", "bob", "ada", "bob"):
            async with seats.hold(user) as seat:
                assert seat.number < 2**31
                assert user not in seats.label(seat)
                seen |= {seat.number, seat.key}
        assert len(seen) == 8

    asyncio.run(run())


def test_the_label_changes_with_each_update_but_number_and_name_stay():
    async def run():
        engine, seats = seats_of()
        engine.may_learn.set()
        async with seats.hold("ada") as seat:
            before, name = seats.label(seat), (seat.number, seat.key)
            await seats.change(seat, "learn", "ada")
            assert seats.label(seat) != before
            assert (seat.number, seat.key) == name

    asyncio.run(run())


def test_weights_do_not_change_under_a_request_that_has_a_label_and_no_token_yet():
    async def run():
        engine, seats = seats_of()
        engine.may_learn.set()
        async with seats.hold("ada") as seat:
            seat.starting += 1
            changing = asyncio.create_task(seats.change(seat, "learn", "ada"))
            await asyncio.sleep(0.02)
            assert not [call for call in engine.calls if call[0] == "learn"]
            assert seat.lessons  # so that no further request begins
            seat.starting -= 1
            seats.wake()
            await changing
        assert [call for call in engine.calls if call[0] == "learn"]

    asyncio.run(run())


def test_forgetting_ends_a_lesson_and_nobody_opens_the_user_meanwhile():
    async def run():
        engine, seats = seats_of(patience=5)
        async with seats.hold("ada") as seat:
            learning = asyncio.create_task(seats.change(seat, "learn", "ada"))
            await asyncio.sleep(0.01)
            forgetting = asyncio.create_task(seats.forget("ada"))
            opening = asyncio.create_task(seats.hold("ada").__aenter__())
            await forgetting
            assert learning.cancelled()
            assert seat.forgotten
            new = await opening
        assert new is not seat
        assert [call[0] for call in engine.calls] == ["open", "learn", "forget", "open"]

    asyncio.run(run())


class Worker:
    """Stands for vLLM's engine client: an operation of three steps."""

    def __init__(self):
        self.calls = []

    async def collective_rpc(self, method, args):
        self.calls.append((method, args))
        await asyncio.sleep(0)
        if method == "ttt_begin":
            return [["later", 7, 0.0]]
        if len(self.calls) < 4:
            return [["later", 7, 0.0]]
        return [["done", "learnt", None]]


def test_an_operation_is_taken_on_until_it_is_done_and_cancelled_with_its_caller():
    async def run():
        worker = Worker()
        assert await Engine(worker).call("learn", "ada") == "learnt"
        assert [method for method, _ in worker.calls] == ["ttt_begin", "ttt_proceed", "ttt_proceed", "ttt_proceed"]
        worker = Worker()
        task = asyncio.create_task(Engine(worker).call("learn", "ada"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert worker.calls[-1] == ("ttt_cancel", (7,))

    asyncio.run(run())


def test_of_a_long_text_the_newest_tokens_are_learnt():
    turns = Turns(None, Options("here", identity="header", lesson=4))
    request = SimpleNamespace(prompt="a completion")
    assert turns.lesson(request, None, list(range(10))) == ([6, 7, 8, 9], [False, True, True, True], 6)
    assert turns.lesson(request, None, [1, 2, 3]) == ([1, 2, 3], [False, True, True], 0)
    assert turns.lesson(request, None, [1]) is None


def test_what_teaches_is_the_last_message_if_it_is_the_users():
    def teaches(*messages, learn=None, default="on", **more):
        turn = Turn(None, learn, SimpleNamespace(messages=list(messages), **more))
        return Turns(None, Options("here", identity="header", learn=default)).teaches(turn)

    user, answer = {"role": "user", "content": "I am Ada."}, {"role": "assistant", "content": "Hello."}
    assert teaches(user)
    assert teaches(user, learn="on", default="off")
    assert not teaches(user, default="off")
    assert not teaches(user, learn="off")
    assert not teaches(user, answer)
    assert not teaches(user, {"role": "tool", "content": "It is noon.", "tool_call_id": "1"})
    assert not teaches({"role": "user", "content": " "})
    assert teaches({"role": "user", "content": [{"type": "text", "text": "I am Ada."}]})
    assert not teaches({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]})


# -- in the worker ----------------------------------------------------------------------------------------------------


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


def users_of(tmp_path, pool):
    """`Users` without vLLM."""
    made = object.__new__(users.Users)
    made.options, made.pool, made.learner = Options("here", identity="header"), pool, None
    made.sessions = Sessions(pool, ttt.Store(tmp_path / "store"), "model")
    made.adapters = SimpleNamespace(publish=lambda user: None, remove=lambda user: None, introduce=lambda *_: None)
    made.capture = SimpleNamespace(take=lambda key, count: torch.zeros(1, count, 8), drop=lambda key: None, tokens=0)
    made._lesson, made._stamp, made._stamps, made._running, made._tickets = {}, {}, iter(range(99)), {}, iter(range(99))
    made._threads = users.concurrent.futures.ThreadPoolExecutor(1)
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


def test_the_store_is_written_by_another_thread(tmp_path, monkeypatch):
    import threading

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
        input_batch=SimpleNamespace(req_ids=["r"], num_computed_tokens_cpu=[done]),
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
