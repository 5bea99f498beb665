"""Parts of the plugin in the API server, without one."""

from __future__ import annotations

import asyncio
import logging
import os
from types import SimpleNamespace

import pytest

import ttt.serve.vllm
from ttt.serve.errors import BadRequest, NotFound, RequestError, TooBusy, Unauthenticated, Unavailable
from ttt.serve.keys import add_key
from ttt.serve.vllm import frontend, supported
from ttt.serve.vllm.engine import Engine
from ttt.serve.vllm.frontend import State, _ending
from ttt.serve.vllm.identity import Identify, Turn, _headers
from ttt.serve.vllm.options import Options
from ttt.serve.vllm.routes import WithoutUsers
from ttt.serve.vllm.seats import Seats
from ttt.serve.vllm.turns import Turns

# -- options, and what is refused -------------------------------------------------------------------------------------


def test_options_come_from_the_environment_and_name_what_is_wrong(tmp_path):
    given = {"TTT_VLLM_STORE": "here", "TTT_VLLM_IDENTITY": "header", "TTT_VLLM_SLOTS": "3", "TTT_VLLM_RANK": "33"}
    found = Options.from_environment(given)
    assert (found.store, found.slots, found.adapter_rank) == ("here", 3, 128)
    assert found.blocks(30) == range(22, 30)
    for name, value in {
        "SLOTS": "0", "RANK": "none", "WINDOW": "512", "LAYERS": "all", "IDENTITY": "field", "KEYS": "keys.json",
        "LEARN": "wait", "LEASE": "0", "SLICE": "-1", "CHUNK": "0", "LESSON": "1", "LR": "-1", "PATIENCE": "nan",
        "SLOT": "3", "PASSES": "0", "EMPHASIS": "101", "STORE": " ", "slots": "3",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"TTT_VLLM_{name}"):
            Options.from_environment(given | {f"TTT_VLLM_{name}": value})


def test_numbers_have_upper_bounds_and_the_one_that_is_too_large_is_named():
    given = {"TTT_VLLM_STORE": "here", "TTT_VLLM_IDENTITY": "header"}
    for name, most in {
        "SLICE": "10000", "LEASE": "3600", "PATIENCE": "3600", "DRAIN": "3600", "CAPTURED": "16777216",
        "LESSON": "65536",
    }.items():  # fmt: skip
        Options.from_environment(given | {f"TTT_VLLM_{name}": most})
        for more in (str(int(most) + 1), "9876543210"):
            with pytest.raises(ValueError, match=f"^TTT_VLLM_{name} must be .*{more}"):
                Options.from_environment(given | {f"TTT_VLLM_{name}": more})
    with pytest.raises(ValueError, match="TTT_VLLM_LESSON must be at most TTT_VLLM_CAPTURED, which is 100"):
        Options.from_environment(given | {"TTT_VLLM_CAPTURED": "100"})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"TTT_VLLM_KEYS": "keys.json"}, "TTT_VLLM_STORE must be .*, got ''"),
        ({"TTT_VLLM_STORE": "", "TTT_VLLM_KEYS": "keys.json"}, "TTT_VLLM_STORE must be .*, got ''"),
        ({"TTT_VLLM_STORE": ""}, "TTT_VLLM_STORE must be .*, got ''"),
        ({"TTT_VLLM_STOR": "users", "TTT_VLLM_KEYS": "keys.json"}, "TTT_VLLM_STOR is no option of the plugin"),
        ({"ttt_vllm_store": "users"}, "ttt_vllm_store is no option of the plugin"),
    ],
)
def test_options_without_a_store_end_the_start_and_do_not_leave_an_open_server(given, said, monkeypatch):
    for name in [name for name in os.environ if name.startswith("TTT_VLLM_")]:
        monkeypatch.delenv(name)
    ttt.serve.vllm.register()  # without any option nothing happens, and vLLM is not needed
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        ttt.serve.vllm.register()


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
    assert identify({"x-api-key": key}).user == "ada"
    assert identify({"x-api-key": key, "authorization": f"Bearer {key}"}).user == "ada"
    for wrong in ({"authorization": "Bearer other"}, {"x-api-key": "other"}, {}):
        with pytest.raises(Unauthenticated):
            identify(wrong)
    other = add_key(tmp_path / "keys.json", "bob")
    with pytest.raises(BadRequest, match="authorization and x-api-key must have the same key"):
        identify({"x-api-key": key, "authorization": f"Bearer {other}"})
    with pytest.raises(RequestError):
        identify({"authorization": f"Bearer {key}", "x-ttt-user": "bob"})
    behind_a_proxy = Identify(Options("here", identity="header"))
    assert behind_a_proxy({"x-ttt-user": "bob"}).user == "bob"
    with pytest.raises(Unauthenticated):
        behind_a_proxy({})
    with pytest.raises(BadRequest):
        behind_a_proxy({"x-ttt-user": "no user"})
    for name in (b"x-ttt-user", b"authorization", b"x-api-key"):
        with pytest.raises(BadRequest, match="once"):
            _headers({"headers": [(name, b"ada"), (name.upper(), b"bob")]})


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/v1/users/ada", "/v1/users/{user}"),
        ("/root/v1/users/ada%40home/rollback", "/root/v1/users/{user}/rollback"),
        ("/v1/users/ada/more/rollback?of=ada", "/v1/users/{user}/rollback"),
        ("/v1/users/rollback", "/v1/users/{user}"),
        ("/v1/models?a=b", "/v1/models?a=b"),
    ],
)
def test_the_access_log_shows_no_user(path, shown):
    record = logging.makeLogRecord({"msg": '%s - "%s %s HTTP/%s" %d', "args": ("127.0.0.1:5", "GET", path, "1.1", 200)})
    assert WithoutUsers().filter(record)
    assert record.getMessage() == f'127.0.0.1:5 - "GET {shown} HTTP/1.1" 200'


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
        return 0 if operation == "unsaved" else {"stamp": self.stamp}


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


def test_what_waits_to_be_learnt_is_learnt_before_the_engine_ends_and_nobody_is_let_in():
    class Client:
        def shutdown(self, timeout):
            ended.append((timeout, [call[0] for call in engine.calls]))

    class App:
        state = SimpleNamespace(engine_client=None)

    ended, engine = [], FakeEngine()
    state = State(App(), Options("here", identity="header"))
    _ending(Client, [state])

    async def run():
        seats = state.seats()
        seats.engine = engine
        async with seats.hold("ada") as seat:
            first, second = (asyncio.create_task(seats.change(seat, "learn", "ada")) for _ in range(2))
            await asyncio.sleep(0)
        ending = asyncio.create_task(asyncio.to_thread(Client().shutdown, timeout=3))
        while not seats.ending:
            await asyncio.sleep(0.01)
        with pytest.raises(Unavailable, match="the server is stopping"):
            async with seats.hold("bob"):
                pass
        assert not ended
        engine.may_learn.set()
        await asyncio.gather(first, second, ending)
        Client().shutdown(timeout=0)  # once more, in the server's own thread

    asyncio.run(run())
    assert ended == [(3, ["open", "learn", "learn", "end"]), (0, ["open", "learn", "learn", "end"])]


def test_the_engine_ends_after_some_seconds_though_lessons_wait(caplog):
    class Client:
        def shutdown(self):
            ended.append(True)

    class App:
        state = SimpleNamespace(engine_client=None)

    ended, state = [], State(App(), Options("here", identity="header", drain=0.05))
    _ending(Client, [state])
    Client().shutdown()  # nobody was here

    async def run():
        seats = state.seats()
        seats.engine = FakeEngine()
        async with seats.hold("ada") as seat:
            lesson = asyncio.create_task(seats.change(seat, "learn", "ada"))
            await asyncio.to_thread(Client().shutdown)
        assert lesson.cancelled()
        assert seats.engine.calls[-1] == ("end",)

    asyncio.run(run())
    assert ended == [True, True]
    assert "the server stops before 1 lessons were learnt" in caplog.text


@pytest.mark.parametrize("error", [asyncio.CancelledError, Unavailable])
def test_the_engine_ends_though_the_server_ends_before_all_is_stored_and_it_is_waited_for_once(error, caplog):
    class Client:
        def shutdown(self):
            ended.append(True)

    class App:
        state = SimpleNamespace(engine_client=None)

    class Gone(FakeEngine):
        async def call(self, operation, *arguments):
            self.calls.append((operation, *arguments))
            raise error("gone")

    ended, state = [], State(App(), Options("here", identity="header"))
    _ending(Client, [state])

    async def run():
        seats = state.seats()
        seats.engine = Gone()
        for _ in range(2):
            await asyncio.to_thread(Client().shutdown)
        assert seats.engine.calls == [("end",)]

    asyncio.run(run())
    assert ended == [True, True]
    assert caplog.text.count("it is not known whether everything that was learnt is stored") == 1


def test_requests_hear_of_the_end_though_the_engine_fails_to_shut_down(monkeypatch):
    class Client:
        def shutdown(self):
            raise OSError("the engine cannot be ended")

    told = []
    monkeypatch.setattr(frontend, "_end_requests", told.append)
    _ending(Client, [])
    with pytest.raises(OSError, match="the engine cannot be ended"):
        (client := Client()).shutdown()
    assert told == [client]


def test_at_the_end_nobody_gets_a_seat_who_waited_for_one_and_who_is_being_opened_is_given_back():
    class Slow(FakeEngine):
        def __init__(self):
            super().__init__()
            self.may_open = asyncio.Event()

        async def call(self, operation, *arguments):
            if operation == "open":
                await self.may_open.wait()
            return await super().call(operation, *arguments)

    async def holds(seats, user):
        async with seats.hold(user):
            pass

    async def run():
        engine = Slow()
        seats = Seats(engine, 1, 60)
        first, second = (asyncio.create_task(holds(seats, user)) for user in ("ada", "bob"))
        await asyncio.sleep(0.01)
        ending = asyncio.create_task(seats.drain(60))
        with pytest.raises(Unavailable, match="the server is stopping"):
            await asyncio.wait_for(second, 10)
        assert not ending.done()
        engine.may_open.set()
        await asyncio.wait_for(asyncio.gather(first, ending), 10)
        assert [call[0] for call in engine.calls] == ["open", "end"]

    asyncio.run(run())


def test_a_number_or_name_is_never_used_again():
    async def run():
        _, seats = seats_of(count=1)
        seen = set()
        for user in ("cid", "bob", "cid", "bob"):  # names that hexadecimal digits cannot spell
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


def test_what_was_to_be_learnt_and_was_not_can_be_read_until_the_user_is_forgotten(caplog):
    async def run():
        _, seats = seats_of()
        turns = Turns(seats, Options("here", identity="header"))
        client = SimpleNamespace(get_tokenizer=lambda: None)
        pictures = [{"role": "user", "content": [{"type": "image_url"}]}]
        async with seats.hold("ada") as seat:
            for learn in ("on", None, "wait"):  # who waits is told
                turn = Turn(seat, learn, SimpleNamespace(messages=pictures))
                lesson = turns._begin(client, turn, "key", [1, 2, 3])
                with pytest.raises(BadRequest, match="cannot be found"):
                    await lesson
            await asyncio.sleep(0)
        missed = seats.missed.of("ada")
        assert missed.turns == 2
        assert missed.why.startswith("nothing was learnt: the user's words cannot be found in the prompt")
        await seats.forget("ada")
        assert seats.missed.of("ada") is None
        assert not seats.missed.of("bob")

    with caplog.at_level(logging.WARNING, "vllm.ttt"):
        asyncio.run(run())


def begun_lesson(seats, seat, learn):
    """A lesson of a turn that was answered, as it goes on in the background."""
    turns = Turns(seats, Options("here", identity="header"))
    turns.lesson = lambda *args: ([1, 2], [False, True], 0)
    client = SimpleNamespace(get_tokenizer=lambda: None)
    return turns._begin(client, Turn(seat, learn, SimpleNamespace()), "key", [1, 2])


@pytest.mark.parametrize(
    ("fails", "error", "turns", "why"),
    [
        ("forget", Unavailable("not everything could be removed yet"), 4, "not everything could be removed yet"),
        ("unsaved", Unavailable("the engine is gone"), 2, "the engine is gone"),
        ("forget", asyncio.CancelledError(), 4, "the server failed: CancelledError"),
    ],
)
def test_turns_that_are_dropped_for_a_user_who_cannot_be_forgotten_count_as_missed(fails, error, turns, why):
    async def run():
        engine, seats = seats_of(patience=5)
        call, never = engine.call, asyncio.Event()

        async def failing(operation, *arguments):
            if operation == fails:
                raise error
            if operation == "unsaved":
                return 3
            if operation == "stored":
                await never.wait()
            return await call(operation, *arguments)

        engine.call = failing
        async with seats.hold("ada") as seat:
            engine.may_learn.set()
            waiting = begun_lesson(seats, seat, "wait")  # one of three that are not stored: its client is told
            while not seat.told:
                await asyncio.sleep(0)
            engine.may_learn.clear()
            lessons = [begun_lesson(seats, seat, learn) for learn in ("on", None, "wait")]
            await asyncio.sleep(0.01)
            with pytest.raises(type(error)):
                await seats.forget("ada")
            assert all(lesson.cancelled() for lesson in lessons)
            missed = seats.missed.of("ada")
            assert missed.turns == turns  # two were being learnt, and two were not stored
            assert missed.why == f"dropped in order to forget the user, which failed: {why}"
            waiting.cancel()
            await asyncio.wait([waiting])
            assert seat.told == 0
        async with seats.hold("ada"):  # who is opened again with what the store has
            pass

    asyncio.run(run())


def test_of_who_was_forgotten_no_turn_counts_as_missed():
    async def run():
        _, seats = seats_of(patience=5)
        async with seats.hold("ada") as seat:
            lesson = begun_lesson(seats, seat, "on")
            await asyncio.sleep(0.01)
            await seats.forget("ada")
            assert lesson.cancelled()
        assert seats.missed.of("ada") is None

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
        assert [call[0] for call in engine.calls] == ["open", "learn", "unsaved", "forget", "open"]

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


def test_an_error_of_the_worker_is_the_same_in_the_api_server():
    class Failing:
        async def collective_rpc(self, method, args):
            told = {"message": "no version 99", "param": "version", "code": "gone", "retry_after": 3.0}
            return [["error", "NotFound", told]]

    with pytest.raises(NotFound, match="no version 99") as found:
        asyncio.run(Engine(Failing()).call("rollback", "ada", 99))
    error = found.value
    assert (error.param, error.code, error.retry_after) == ("version", "gone", 3.0)


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
    assert teaches({"role": "user", "content": 2 * [{"type": "text", "text": "I am Ada."}]})
    assert not teaches({"role": "user", "content": []})
    picture = {"type": "image_url", "image_url": {"url": "data:"}}
    assert not teaches({"role": "user", "content": [{"type": "text", "text": "I am Ada."}, picture]})
    assert not teaches({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]})
