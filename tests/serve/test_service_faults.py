"""The service under faults: stores that hang, requests that cannot be served, and users who ask for too much."""

import re
import threading
import time

import pytest
import torch
from test_service import learned, lesson_of, stored, words
from tiny_chat_model import Answer, learner_of, service_of, slowed
from tiny_models import assert_same

import ttt
from ttt.conversation import Telling
from ttt.serve import sessions as sessions_module
from ttt.serve import writer as writer_module
from ttt.serve.errors import BadRequest, Conflict, NotFound, ServerFailure, TooBusy, Unavailable
from ttt.serve.limits import Limits
from ttt.serve.main import ServeOptions
from ttt.serve.places import Places
from ttt.serve.teaching import Lesson
from ttt.store import CommitUncertain, StorageFailure, UnknownUser


class Gate:
    """Lets calls of ``method`` of ``target`` for one user wait, from `shut` until `open` is called."""

    def __init__(self, monkeypatch, target, method, user):
        self.came, self._free = threading.Event(), threading.Event()
        inner = getattr(target, method)

        def waiting(lease, *args, **options):
            if (lease if isinstance(lease, str) else lease.user) == user:
                self.came.set()
                assert self._free.wait(60)
            return inner(lease, *args, **options)

        monkeypatch.setattr(target, method, waiting)

    def open(self):
        self._free.set()


def until(condition, seconds=30):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.01)


# -- a store that is slow or fails -------------------------------------------------------------------------------------


def test_nobody_waits_for_a_user_who_is_forgotten_while_a_write_hangs(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sessions_module, "_LEAVE", 30.0)
    service = service_of(model, tmp_path)
    gate = Gate(monkeypatch, service.store, "put", "ada")
    writing = service.learn("ada", lesson_of()).result(60).stored
    assert gate.came.wait(30)
    waiting = service.learn("ada", lesson_of()).result(60).stored
    forgotten = service.forget("ada")
    began = time.monotonic()
    for _ in range(3):
        assert Answer(service, "bob", words(5), max_tokens=2).wait(10).text() is not None
    assert time.monotonic() - began < 10
    with pytest.raises(Conflict, match="forgotten"):
        waiting.result(10)
    assert not forgotten.done()
    gate.open()
    forgotten.result(30)
    with pytest.raises(Conflict, match="forgotten"):  # it was written, and is erased
        writing.result(30)
    assert Answer(service, "ada", words(5)).wait().end.updates == 0
    with pytest.raises(UnknownUser):
        service.store.get("ada")
    assert service.drain() == []


def test_an_answer_does_not_call_stored_what_is_forgotten_while_it_is_written(model, tmp_path, monkeypatch):
    service = service_of(model, tmp_path)
    gate = Gate(monkeypatch, service.store, "put", "ada")
    answer = Answer(service, "ada", words(5), lesson=lesson_of(), wait=True, max_tokens=2)
    assert gate.came.wait(30)
    forgotten = service.forget("ada")
    until(lambda: service.sessions.get("ada") is None)
    gate.open()
    forgotten.result(30)
    end = answer.wait().end
    assert end.learning == "refused: nothing was stored: the user was forgotten meanwhile, or opened anew"
    assert (end.updates, end.version) == (None, None)
    with pytest.raises(UnknownUser):
        service.store.get("ada")
    assert service.drain() == []


def test_all_who_wait_for_a_write_hear_of_it_when_the_user_is_forgotten_while_it_fails(model, tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "_RETRY", 0.2)
    service = service_of(model, tmp_path)
    calls = []

    def failing(lease, *args):
        calls.append(lease.user)
        time.sleep(0.1)
        raise StorageFailure("the disk is full")

    monkeypatch.setattr(service.store, "put", failing)
    waiting = [service.learn("ada", lesson_of()).result(60).stored for _ in range(4)]
    until(lambda: len(calls) > 1)
    service.forget("ada").result(30)
    for future in waiting:
        with pytest.raises(Conflict, match="forgotten"):
            future.result(10)
    before = len(calls)
    time.sleep(0.8)
    assert len(calls) <= before + 1  # a dropped state does not come back
    assert service.drain() == []


def test_the_log_says_of_a_store_that_fails_what_is_new_and_the_same_again_after_a_while(
    model, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(writer_module, "_RETRY", 0.01)
    service = service_of(model, tmp_path, lease_seconds=0.4)
    put, errors = service.store.put, [StorageFailure("the disk is full")]
    attempts, renewals = [], []

    def failing(*args):
        attempts.append(args)
        if errors:
            raise errors[0]
        return put(*args)

    def not_renewed(lease_seconds):
        renewals.append(lease_seconds)
        raise StorageFailure("the disk is full")

    def lines(of):
        return [r.getMessage() for r in caplog.records if r.getMessage().startswith(of)]

    monkeypatch.setattr(service.store, "put", failing)
    stored = service.learn("ada", lesson_of()).result(60).stored
    monkeypatch.setattr(service.sessions.get("ada").lease, "renew", not_renewed)
    version, lease = "a version could not be stored; trying again: ", "a lease could not be renewed: "
    until(lambda: len(attempts) > 5 and len(renewals) > 2)
    assert lines(version) == [version + "StorageFailure"]
    assert lines(lease) == [lease + "StorageFailure"]
    errors[0] = CommitUncertain("the connection broke")
    until(lambda: len(lines(version)) > 1)
    assert lines(version)[1:] == [version + "CommitUncertain"]
    errors[0] = StorageFailure("the disk is full")  # a store that changes from one to the other is no news, either
    before = len(attempts)
    until(lambda: len(attempts) > before + 2)
    assert len(lines(version)) == 2
    monkeypatch.setattr(writer_module, "_QUIET", 0.0)
    until(lambda: len(lines(version)) > 2)
    assert re.fullmatch(version + r"StorageFailure \(and \d+ times more since the last such line\)", lines(version)[2])
    errors.clear()
    assert stored.result(30) == 1
    assert service.drain() == []


def test_leases_are_renewed_while_a_write_takes_longer_than_they_last(model, tmp_path, monkeypatch):
    service = service_of(model, tmp_path, lease_seconds=1.0)
    for user in ("ada", "bob"):
        service.learn(user, lesson_of()).result(60).stored.result(60)
    gate = Gate(monkeypatch, service.store, "put", "ada")
    hanging = service.learn("ada", lesson_of()).result(60).stored
    assert gate.came.wait(30)
    time.sleep(2.5)
    with ttt.Store(tmp_path) as other:
        for user in ("ada", "bob"):
            with pytest.raises(ttt.store.LeaseHeld):
                other.lease(user)
    gate.open()
    assert hanging.result(30) == 2
    assert service.drain() == []


def test_a_lease_that_is_released_while_it_is_renewed_ends_released(tmp_path):
    store = ttt.Store(tmp_path)
    for _ in range(20):
        lease = store.lease("ada", 60)
        threads = [threading.Thread(target=_renewed, args=(lease,)) for _ in range(3)]
        [thread.start() for thread in threads]
        lease.release()
        [thread.join() for thread in threads]
        with store.lease("ada"):
            pass


def _renewed(lease):
    for _ in range(3):
        try:
            lease.renew(60)
        except ttt.store.StaleLease:
            return


def test_a_rollback_whose_commit_is_uncertain_leaves_what_the_store_has(model, tmp_path, monkeypatch):
    service = service_of(model, tmp_path)
    lessons = [lesson_of() for _ in range(2)]
    for lesson in lessons:
        service.learn("ada", lesson).result(60).stored.result(60)
    inner = service.store.rollback

    def uncertain(*args, **options):
        inner(*args, **options)
        raise CommitUncertain("the connection broke")

    monkeypatch.setattr(service.store, "rollback", uncertain)
    with pytest.raises(Unavailable, match="not known"):
        service.rollback("ada", 1).result(60)
    third = lesson_of()
    service.learn("ada", third).result(60).stored.result(60)
    assert service.drain() == []
    assert_same(learned(learner_of(model), [lessons[0], third]), stored(tmp_path, "ada"))


def test_a_rollback_that_cannot_read_its_version_changes_nothing(model, tmp_path):
    service = service_of(model, tmp_path)
    for _ in range(2):
        service.learn("ada", lesson_of()).result(60).stored.result(60)
    before = service.export("ada").result(60)
    for blob in (tmp_path).rglob("*.safetensors"):
        if blob.stat().st_mtime_ns == min(each.stat().st_mtime_ns for each in tmp_path.rglob("*.safetensors")):
            blob.write_bytes(b"damaged")
    with pytest.raises(Conflict, match="damaged"):
        service.rollback("ada", 1).result(60)
    with pytest.raises(NotFound):
        service.rollback("ada", 9).result(60)
    assert [each.number for each in service.store.history("ada")] == [2, 1]
    assert_same(before, service.export("ada").result(60))
    assert service.drain() == []


def test_a_study_whose_lease_is_lost_changes_nothing(model, tmp_path, monkeypatch):
    service = service_of(model, tmp_path)
    service.learn("ada", lesson_of(teach=1.0)).result(60).stored.result(60)
    before = service.export("ada").result(60)
    steps = service.learner.study_in_steps

    def then_lost(*args, **options):
        output = yield from steps(*args, **options)
        service.sessions.get("ada").lose()
        return output

    monkeypatch.setattr(service.learner, "study_in_steps", then_lost)
    with pytest.raises(Conflict, match="taken over"):
        service.study("ada", passes=2).result(60)
    assert_same(before, service.pool.export("ada"))
    service.drain()
    assert ttt.Store(tmp_path).get("ada").version == 1


# -- requests that cannot be served ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{"temperature": 1e-300}, {"temperature": 1e-4}, {"top_p": 1e-300}])
def test_sampling_that_float32_cannot_hold_draws_the_most_probable_token(model, tmp_path, sampling):
    service = service_of(model, tmp_path)
    prompt = words(20)
    wanted = Answer(service, None, prompt, logprobs=0, max_tokens=20).wait().tokens()
    found = Answer(service, None, prompt, logprobs=0, max_tokens=20, **{"temperature": 1.0, **sampling}).wait()
    assert found.tokens() == wanted
    service.drain()


def test_a_request_that_fails_in_the_middle_ends_alone(model, tmp_path, monkeypatch):
    service = service_of(model, tmp_path)
    take = service.batch._take

    def failing(sequence, logits):
        if sequence.request.user == "ada" and sequence.request.generated == 3:
            raise RuntimeError("no such token")
        take(sequence, logits)

    monkeypatch.setattr(service.batch, "_take", failing)
    answers = [Answer(service, user, words(8), max_tokens=30) for user in ("ada", "bob")]
    assert isinstance(answers[0].wait().end, ServerFailure)
    assert answers[1].wait().end.completion_tokens == 30
    assert Answer(service, "ada", words(5), max_tokens=2).wait().end.completion_tokens == 2
    service.drain()


def test_more_texts_than_are_generated_at_a_time_are_refused(model, tmp_path):
    service = service_of(model, tmp_path, rows=2)
    with pytest.raises(BadRequest, match="n must be at most 2") as refused:
        Answer(service, None, words(5), n=3)
    assert refused.value.param == "n"
    assert Answer(service, None, words(5), n=2).wait().end.completion_tokens == 16
    service.drain()


def test_a_request_for_many_texts_is_not_overtaken_for_ever(model, tmp_path):
    service = service_of(model, tmp_path, rows=2)
    stop, served = threading.Event(), []

    def ask():
        while not stop.is_set():
            served.append(Answer(service, None, words(3), max_tokens=20).wait())

    threads = [threading.Thread(target=ask) for _ in range(3)]  # there is always one that would fit
    [thread.start() for thread in threads]
    until(lambda: len(served) > 3)
    try:
        assert Answer(service, None, words(5), n=2).wait(20).end.completion_tokens == 16
    finally:
        stop.set()
        [thread.join() for thread in threads]
    service.drain()


# -- too much ---------------------------------------------------------------------------------------------------------


def test_one_user_cannot_take_all_places_and_places_come_back(model, tmp_path):
    service = service_of(model, tmp_path, rows=1, waiting=6)
    long = Answer(service, None, words(10), max_tokens=450)
    until(lambda: service.waiting == 0)
    mine = [Answer(service, "ada", words(5), max_tokens=1) for _ in range(2)]
    job = service.export("ada")
    with pytest.raises(TooBusy, match="3 requests of this user"):
        Answer(service, "ada", words(5))
    with pytest.raises(TooBusy, match="of this user"):
        service.learn("ada", lesson_of())
    assert service.waiting == 3
    other = Answer(service, "bob", words(5), max_tokens=1)
    for answer in mine:
        answer.request.cancelled = True  # their places are free at once, not when their turn comes
    until(lambda: service.waiting == 1)
    assert not long.pieces or long.end is None
    mine = Answer(service, "ada", words(5), max_tokens=1)
    for answer in (long, other, mine):
        assert answer.wait().end.completion_tokens
    assert job.result(30)
    until(lambda: service.waiting == 0)
    service.drain()


def test_tokens_that_wait_to_be_learnt_are_bounded(model, tmp_path):
    service = service_of(model, tmp_path, rows=1, learning_tokens=40)
    long = Answer(service, None, words(10), max_tokens=300)
    first = Answer(service, "ada", words(5), lesson_of(60, teach=1.0), max_tokens=1)  # a single one may have more
    for refused in (
        lambda: service.learn("bob", lesson_of(10, teach=1.0)),
        lambda: Answer(service, "bob", words(5), lesson_of(10, teach=1.0)),
    ):
        with pytest.raises(TooBusy, match=r"wait to be read and learnt, 20 would be added, and 40 are allowed"):
            refused()
    long.request.cancelled = True
    assert first.wait().end.learning == "queued"
    until(lambda: service.learning_tokens == 0)
    service.learn("bob", lesson_of(10, teach=1.0)).result(30)
    cancelled = Answer(service, "bob", words(5), lesson_of(60, teach=1.0), max_tokens=400)
    assert service.learning_tokens == 2 * 60  # with the context, in both passes
    cancelled.request.cancelled = True
    until(lambda: service.learning_tokens == 0)
    assert service.drain() == []
    assert service.waiting == 0


def test_places_count_what_is_taken_and_left():
    places = Places(Limits(waiting=3, waiting_per_user=2, learning_tokens=10))
    places.take("ada", 4)
    places.take("ada", 6)
    with pytest.raises(TooBusy):
        places.take("ada")
    with pytest.raises(TooBusy):
        places.take("bob", 1)
    places.take("bob")
    with pytest.raises(TooBusy):
        places.take(None)
    assert (places.waiting, places.tokens) == (3, 10)
    places.leave("ada")
    places.learnt(6)
    places.take("ada", 5)
    assert (places.waiting, places.tokens) == (3, 9)


def test_by_default_as_many_long_chats_may_wait_as_requests(model, tmp_path):
    service = service_of(model, tmp_path)
    turn = Lesson.of(words(1024), [at >= 984 for at in range(1024)], 2048)
    cost = service._work.cost(turn)
    assert cost == 2 * 1024
    assert service.drain() == []
    places = Places(Limits())
    for at in range(Limits().waiting):
        places.take(f"user {at}", cost)
    assert ServeOptions().learning_tokens == Limits().learning_tokens


def test_a_job_that_nobody_waits_for_is_not_done(model, tmp_path):
    service = service_of(model, tmp_path, rows=1)
    long = Answer(service, "ada", words(10), max_tokens=450)
    until(lambda: long.pieces)
    jobs = [service.learn("ada", lesson_of()), service.study("ada"), service.rollback("ada", 1)]
    for job in jobs:
        job.cancel()
    until(lambda: service.waiting == 1)  # going back is done all the same
    long.wait()
    until(lambda: service.waiting == 0)
    assert Answer(service, "ada", words(5)).wait().end.updates == 0
    service.drain()


def test_a_lesson_that_nobody_waits_for_any_more_is_undone(model, tmp_path, monkeypatch):
    service = service_of(model, tmp_path)
    begun, go_on = threading.Event(), threading.Event()

    def wait():
        begun.set()
        go_on.wait(10)

    service.learn("ada", lesson_of()).result(60).stored.result(60)
    before = service.export("ada").result(60)
    monkeypatch.setattr(service.learner, "observe_in_steps", slowed(service.learner.observe_in_steps, wait))
    learning = service.learn("ada", lesson_of(60, teach=1.0))
    assert begun.wait(30)
    learning.cancel()
    go_on.set()
    assert_same(before, service.export("ada").result(60))
    assert service.drain() == []
    assert_same(before, stored(tmp_path, "ada"))


def test_a_lesson_counts_for_what_is_read(model, tmp_path):
    service = service_of(model, tmp_path, rows=1)
    long = Answer(service, "ada", words(10), max_tokens=450)
    until(lambda: long.pieces)
    jobs = [service.learn("ada", lesson_of(30, teach=0.2), Telling(3, 5.0)), service.learn("ada", lesson_of(20))]
    assert service.learning_tokens == 3 * 30 + 2 * 20
    jobs[0].cancel()
    until(lambda: service.learning_tokens == 2 * 20)
    long.request.cancelled = True
    jobs[1].result(60)
    until(lambda: service.learning_tokens == 0)
    assert service.drain() == []


# -- reading beside a study --------------------------------------------------------------------------------------------


def test_reading_goes_on_beside_a_study_and_does_not_put_it_off(model, tmp_path, monkeypatch):
    service = service_of(model, tmp_path, study_after=0.1)
    steps, begun = slowed(service.learner.study_in_steps, lambda: time.sleep(0.01)), []

    def noted(*args, **options):
        begun.append(time.monotonic())
        return steps(*args, **options)

    monkeypatch.setattr(service.learner, "study_in_steps", noted)
    service.learn("ada", lesson_of(40, teach=1.0)).result(60)
    until(lambda: begun)
    before, seen = service.export("ada").result(30), 0
    while not service.taught("ada", 5).result(30)[0][4]:
        assert service.drift("ada").result(30) > 0
        seen += 1
    assert seen
    assert len(begun) == 1
    after = service.export("ada").result(30)
    assert not all(torch.equal(before[name], after[name]) for name in before)
    service.drain()


def test_a_state_that_waited_too_long_for_a_slot_is_read_again(model, tmp_path, monkeypatch):
    service = service_of(model, tmp_path, slots=1, lease_seconds=1.0)
    fetches, fetch = [], service.sessions.fetch

    def counted(user):
        fetches.append(user)
        return fetch(user)

    monkeypatch.setattr(service.sessions, "fetch", counted)
    decode = service.batch.decode_step
    monkeypatch.setattr(service.batch, "decode_step", lambda: (time.sleep(0.01), decode())[1])
    long = Answer(service, "ada", words(5), max_tokens=200)
    until(lambda: long.pieces)
    late = Answer(service, "bob", words(5), lesson_of(), max_tokens=1, wait=True)
    assert late.wait().end.learning == "stored"
    assert fetches.count("bob") > 1
    long.wait()
    service.drain()


def test_a_thread_that_fails_is_noticed(model, tmp_path, monkeypatch):
    service = service_of(model, tmp_path)
    assert service.alive
    monkeypatch.setattr(service.sessions._writer, "on_stored", lambda seconds: 1 / 0)  # the writer goes on
    for version in (1, 2):
        assert service.learn("ada", lesson_of()).result(60).stored.result(10) == version
    assert service.alive
    assert Answer(service, "ada", words(5)).wait().end.updates == 2
    service.drain()
    assert not service.alive
