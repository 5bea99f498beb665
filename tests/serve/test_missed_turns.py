"""Turns that a store does not take are refused before they are answered, and no promise is broken in silence."""

import threading

import httpx
import pytest
from test_service import learned, lesson_of, stored, words
from test_service_faults import Gate, until
from tiny_chat_model import Answer, learner_of, service_of, slowed
from tiny_models import assert_same
from web import CHAT, NAME, served

import ttt
from ttt.serve import jobs as jobs_module
from ttt.serve import openings as openings_module
from ttt.serve import writer as writer_module
from ttt.serve.errors import Conflict, ServerFailure, Unavailable
from ttt.serve.http.metrics import Metrics
from ttt.serve.missed import MissedTurns
from ttt.store import StorageFailure


class BrokenStore:
    """Lets all writes of files fail until `repair` is called."""

    def __init__(self, monkeypatch, store):
        self._broken = threading.Event()
        self._broken.set()
        for name in ("put", "check_writes"):
            monkeypatch.setattr(store, name, self._flaky(getattr(store, name)))

    def _flaky(self, write):
        def flaky(*args):
            if self._broken.is_set():
                raise StorageFailure("the disk is full")
            return write(*args)

        return flaky

    def repair(self):
        self._broken.clear()


@pytest.fixture
def hasty(monkeypatch):
    """Nothing waits long for a store."""
    monkeypatch.setattr(writer_module, "_RETRY", 0.05)
    monkeypatch.setattr(jobs_module, "LONGEST_WAIT", 0.5)


def turn(service, lesson, **options):
    return Answer(service, "ada", words(5), lesson, max_tokens=1, **options)


def test_a_turn_that_cannot_be_kept_is_refused_before_it_is_answered_and_none_is_lost(model, tmp_path, monkeypatch):
    service = service_of(model, tmp_path, observer=(metrics := Metrics()))
    store = BrokenStore(monkeypatch, service.store)
    most = service.sessions.most_unsaved
    lessons = [lesson_of(12) for _ in range(most)]
    for lesson in lessons:
        assert turn(service, lesson).wait().end.learning == "queued"
    waiting = turn(service, lesson_of())
    until(lambda: service.sessions.get("ada").updates == most and service.waiting == 1)
    assert waiting.end is None
    monkeypatch.setattr(jobs_module, "LONGEST_WAIT", 0.0)  # the time in which the store took nothing is over
    assert isinstance(waiting.wait().end, Unavailable)
    assert not waiting.pieces
    with pytest.raises(Unavailable, match="with x-ttt-learn: off") as refused:
        turn(service, lesson_of())
    assert refused.value.retry_after == 10
    assert Answer(service, "ada", words(5), max_tokens=1).wait().end.updates == most
    assert Answer(service, "bob", words(5), lesson_of(), max_tokens=1).wait().end.learning == "queued"
    until(lambda: service.learning_tokens == service.waiting == 0)
    store.repair()
    until(lambda: service.sessions.saved("ada"))
    lessons.append(lesson_of(12))
    assert turn(service, lessons[-1]).wait().end.learning == "queued"
    assert service.drain() == []
    assert_same(learned(learner_of(model), lessons), stored(tmp_path, "ada"))
    assert service.missed.of("ada") is None
    assert metrics.registry.get_sample_value("ttt_missed_turns_total") == 0


def test_turns_that_are_answered_at_once_are_no_more_than_there_is_room_for(model, tmp_path, monkeypatch):
    service = service_of(model, tmp_path)
    service.sessions.most_unsaved = 3
    store = BrokenStore(monkeypatch, service.store)
    answers = [turn(service, lesson_of(12), ignore_eos=True) for _ in range(6)]
    until(lambda: sum(answer.end is not None for answer in answers) == 3)
    until(lambda: service.sessions.get("ada").updates == 3 and service.waiting == 3)
    store.repair()
    assert [answer.wait().end.learning for answer in answers] == ["queued"] * 6
    assert service.drain() == []
    lessons = [answer.request.lesson for answer in answers]
    assert_same(learned(learner_of(model), lessons), stored(tmp_path, "ada"))


def test_a_lesson_that_is_asked_for_does_not_take_the_room_of_one_that_was_promised(
    model, tmp_path, monkeypatch, hasty
):
    service = service_of(model, tmp_path)
    service.sessions.most_unsaved = 1
    store = BrokenStore(monkeypatch, service.store)
    promised = Answer(service, "ada", words(5), lesson_of(), max_tokens=300)
    until(lambda: promised.pieces)
    asked = service.learn("ada", lesson_of())
    assert promised.wait().end.learning == "queued"
    with pytest.raises(Unavailable, match="does not take"):
        asked.result(30)
    store.repair()
    assert service.drain() == []
    assert_same(learned(learner_of(model), [promised.request.lesson]), stored(tmp_path, "ada"))


def test_room_is_given_back_by_turns_that_teach_nothing(model, tmp_path):
    service = service_of(model, tmp_path)
    service.sessions.most_unsaved = 1
    for _ in range(2):
        cancelled = Answer(service, "ada", words(5), lesson_of(), max_tokens=400)
        until(lambda answer=cancelled: answer.pieces)
        cancelled.request.cancelled = True
        assert turn(service, lesson_of(), wait=True).wait().end.learning == "stored"
    until(lambda: not service._waiting.queues["ada"].promised)
    assert service.drain() == []


def test_a_turn_whose_lesson_fails_is_counted_logged_and_can_be_read(model, tmp_path, monkeypatch, caplog):
    service = service_of(model, tmp_path, observer=(metrics := Metrics()))

    def broken(*args, **options):
        raise MemoryError("ada's secret")
        yield

    with served(service, metrics=metrics) as url:
        ask = {"model": NAME, "messages": CHAT, "max_tokens": 1}
        user = {"x-ttt-user": "ada"}
        monkeypatch.setattr(service.learner, "observe_in_steps", broken)
        for turns in (1, 2):
            answer = httpx.post(f"{url}/v1/chat/completions", json=ask, headers=user).json()
            assert answer["ttt"]["learning"] == "queued"
            until(lambda turns=turns: (found := service.missed.of("ada")) and found.turns == turns)
        told = httpx.post(f"{url}/v1/chat/completions", json=ask, headers={**user, "x-ttt-learn": "wait"}).json()
        assert told["ttt"]["learning"].startswith("refused")  # it was told, and is not counted
        found = httpx.get(f"{url}/v1/users/ada").json()
        assert found["updates"] == 0
        assert (found["missed"]["turns"], found["missed"]["why"]) == (2, "the server failed: MemoryError")
        assert "ttt_missed_turns_total 2.0" in httpx.get(f"{url}/metrics").text
        assert httpx.delete(f"{url}/v1/users/ada").status_code == 200
        assert service.missed.of("ada") is None
    shown = [record.getMessage() for record in caplog.records]
    assert shown.count("a turn that was to be learnt after its answer was not: the server failed: MemoryError") == 2
    assert not [text for text in shown if "ada" in text]


def test_a_store_that_stalls_answers_503_and_when_to_come_again(model, tmp_path, monkeypatch, hasty):
    service = service_of(model, tmp_path)
    service.sessions.most_unsaved = 1
    store = BrokenStore(monkeypatch, service.store)
    with served(service) as url:
        ask = {"model": NAME, "messages": CHAT, "max_tokens": 1}
        user = {"x-ttt-user": "ada"}
        assert httpx.post(f"{url}/v1/chat/completions", json=ask, headers=user).status_code == 200
        until(lambda: service._stalled("ada"))
        for stream in (False, True):
            refused = httpx.post(f"{url}/v1/chat/completions", json={**ask, "stream": stream}, headers=user)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
            assert "x-ttt-learn: off" in refused.json()["error"]["message"]
        off = httpx.post(f"{url}/v1/chat/completions", json=ask, headers={**user, "x-ttt-learn": "off"})
        assert off.status_code == 200
        store.repair()


def test_a_turn_that_was_learnt_and_never_stored_can_be_read(model, tmp_path, monkeypatch):
    service, other = service_of(model, tmp_path), ttt.Store(tmp_path)
    assert turn(service, lesson_of(), wait=True).wait().end.learning == "stored"
    other.lease("ada", steal=True).release()
    assert turn(service, lesson_of()).wait().end.learning == "queued"
    until(lambda: service.missed.of("ada"))
    assert service.missed.of("ada").turns == 1
    assert "taken over" in service.missed.of("ada").why
    assert service.drain() == []
    assert [each.number for each in other.history("ada")] == [1]


def test_who_is_forgotten_missed_nothing(model, tmp_path, monkeypatch):
    service = service_of(model, tmp_path)
    begun, go_on = threading.Event(), threading.Event()

    def wait():
        begun.set()
        go_on.wait(30)

    monkeypatch.setattr(service.learner, "observe_in_steps", slowed(service.learner.observe_in_steps, wait))
    BrokenStore(monkeypatch, service.store)
    first = Answer(service, "ada", words(5), lesson_of(), max_tokens=1)
    assert first.wait().end.learning == "queued"
    assert begun.wait(30)
    forgotten = service.forget("ada")
    go_on.set()
    forgotten.result(60)
    assert service.missed.of("ada") is None
    assert service.drain() == []


def fails(error):
    def failing(*args):
        raise error

    return failing


def test_turns_that_are_dropped_for_a_user_who_cannot_be_forgotten_count_as_missed(model, tmp_path, monkeypatch):
    service = service_of(model, tmp_path, observer=(metrics := Metrics()))
    turns, user = 3, {"x-ttt-user": "ada"}
    service.learn("ada", lesson_of()).result(60).stored.result(60)
    store = BrokenStore(monkeypatch, service.store)
    with served(service, metrics=metrics) as url:
        ask = {"model": NAME, "messages": CHAT, "max_tokens": 1}
        for _ in range(turns):
            assert (
                httpx.post(f"{url}/v1/chat/completions", json=ask, headers=user).json()["ttt"]["learning"] == "queued"
            )
        until(lambda: service.sessions.get("ada").updates == 1 + turns)
        with monkeypatch.context() as patch:
            patch.setattr(service.store, "forget", fails(StorageFailure("a file of ada's remains")))
            for _ in range(2):  # the second time there is nothing left to drop
                assert httpx.delete(f"{url}/v1/users/ada").status_code == 503
                found = httpx.get(f"{url}/v1/users/ada").json()
                assert found["missed"]["turns"] == turns
                assert found["missed"]["why"] == (
                    "dropped in order to forget the user, which failed: not everything could be removed yet; "
                    "try again later"
                )
                assert f"ttt_missed_turns_total {turns}.0" in httpx.get(f"{url}/metrics").text
        store.repair()
        answer = httpx.post(f"{url}/v1/chat/completions", json=ask, headers={**user, "x-ttt-learn": "wait"}).json()
        assert (answer["ttt"]["learning"], answer["ttt"]["version"]) == ("stored", 2)  # on top of what the store has
        assert httpx.delete(f"{url}/v1/users/ada").status_code == 200
        assert service.missed.of("ada") is None
        assert httpx.get(f"{url}/v1/users/ada").status_code == 404


def test_turns_that_were_set_aside_count_though_forgetting_never_begins(model, tmp_path, monkeypatch):
    monkeypatch.setattr(openings_module, "LONGEST", 0.5)
    service = service_of(model, tmp_path)
    gate = Gate(monkeypatch, service.store, "get", "ada")
    asked = Answer(service, "ada", words(5), max_tokens=1)  # the store does not say what it has of her
    assert gate.came.wait(30)
    with pytest.raises(Unavailable, match="the store does not answer"):
        service.forget("ada").result(30)
    assert isinstance(asked.wait().end, Unavailable)
    service.missed.note("ada", Conflict("dropped", code="forgotten"))
    found = service.missed.of("ada")
    assert found.turns == 1
    assert found.why.startswith("dropped in order to forget the user, which failed: the store does not answer")
    gate.open()
    until(lambda: (waits := service._waiting.queues.get("ada")) is None or waits.opening is None)
    service.forget("ada").result(30)
    assert service.missed.of("ada") is None
    assert service.drain() == []


def test_turns_are_set_aside_until_it_is_known_whether_their_user_was_forgotten():
    counted, gone = [], Conflict("dropped", code="forgotten")
    missed = MissedTurns(lambda: counted.append(1), most=2)
    missed.forgetting("ada")
    missed.note("ada", gone)
    missed.forgetting("ada")  # asked for twice
    missed.note("ada", gone)
    assert missed.of("ada") is None
    missed.not_forgotten("ada", MemoryError("ada's secret"))
    missed.note("ada", gone)  # by a write that has ended late
    assert missed.of("ada").turns == len(counted) == 3
    assert missed.of("ada").why == "dropped in order to forget the user, which failed: the server failed: MemoryError"
    missed.forgetting("ada")
    missed.note("ada", gone)
    missed.forget("ada")
    missed.note("ada", gone)
    assert missed.of("ada") is None
    for user in ("bob", "cy", "dee"):  # what is kept of them is bounded
        missed.not_forgotten(user, gone)
    missed.note("bob", gone)
    assert missed.of("bob") is None
    assert len(counted) == 3


def test_what_is_kept_of_missed_turns_is_bounded_and_goes_with_the_user():
    counted = []
    missed = MissedTurns(lambda: counted.append(1), most=2)
    for user in ("ada", "bob", "ada", "cy"):
        missed.note(user, Conflict(f"because of {len(counted)}"))
    assert missed.of("bob") is None  # the one that was noted longest ago
    assert (missed.of("ada").turns, missed.of("ada").why) == (2, "because of 2")
    missed.note("cy", ServerFailure("again"))
    assert (missed.of("cy").turns, missed.of("cy").why) == (2, "again")
    missed.note("dee", Conflict("the user was forgotten", code="forgotten"))
    assert missed.of("dee") is None
    missed.forget("ada")
    missed.forget("nobody")
    assert missed.of("ada") is None
    assert len(counted) == 5
