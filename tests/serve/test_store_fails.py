"""A store that takes nothing, or was replaced: what needs it is refused by name in time, and /health says why."""

import concurrent.futures
import shutil
import threading
import time

import httpx
import pytest
import torch
from test_missed_turns import BrokenStore
from test_service import learned, lesson_of, stored, words
from test_service_faults import Gate, until
from tiny_chat_model import Answer, learner_of, service_of
from tiny_models import assert_same
from web import CHAT, NAME, served

import ttt
from ttt.files import write_atomically
from ttt.serve import jobs as jobs_module
from ttt.serve import openings as openings_module
from ttt.serve import writer as writer_module
from ttt.serve.acknowledgements import Acknowledgements
from ttt.serve.errors import Conflict, NotStored, Unavailable, kinds
from ttt.serve.session import settle
from ttt.serve.store_health import REPLACED, StoreHealth
from ttt.store import LeaseHeld, StorageFailure, StoreReplaced, UnknownUser

ASK = {"model": NAME, "messages": CHAT, "max_tokens": 1}
ADA = {"x-ttt-user": "ada"}
WAIT = {**ADA, "x-ttt-learn": "wait"}


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """Nothing waits long for a store."""
    monkeypatch.setattr(writer_module, "_RETRY", 0.05)
    monkeypatch.setattr(writer_module, "_LOOK", 0.1)
    monkeypatch.setattr(jobs_module, "LONGEST_WAIT", 1.0)


class HangingStore:
    """Lets writes of versions wait until `repair` is called."""

    def __init__(self, monkeypatch, store):
        self._gate = Gate(monkeypatch, store, "put", "ada")

    def repair(self):
        self._gate.open()


def learn(url, user="ada", text="Her dog is called Biscuit."):
    return httpx.post(f"{url}/v1/users/{user}/learn", json={"text": text}, timeout=30)


def wait(url):
    return httpx.post(f"{url}/v1/chat/completions", json=ASK, headers=WAIT, timeout=30)


def wait_streamed(url):
    return httpx.post(f"{url}/v1/chat/completions", json={**ASK, "stream": True}, headers=WAIT, timeout=30)


def health(url):
    found = httpx.get(f"{url}/health", timeout=30)
    return found.status_code, found.json()


@pytest.mark.parametrize("ask", [learn, wait, wait_streamed])
@pytest.mark.parametrize(("kind", "why"), [(BrokenStore, "StorageFailure"), (HangingStore, "it does not answer")])
def test_who_waits_for_a_store_that_takes_nothing_hears_of_it_and_what_was_learnt_is_stored_later(
    model, tmp_path, monkeypatch, kind, why, ask
):
    service = service_of(model, tmp_path)
    service.learn("ada", lesson_of()).result(60).stored.result(60)
    with served(service) as url:
        assert health(url) == (200, {"status": "ok"})
        store, began = kind(monkeypatch, service.store), time.monotonic()
        answer = ask(url)
        assert time.monotonic() - began < 10
        if ask is wait_streamed:
            last = answer.text.strip().split("\n\n")[-1]
            assert '"code": "not_stored"' in last
        else:
            assert (answer.status_code, answer.headers["x-should-retry"]) == (503, "false")
            error = answer.json()["error"]
            assert error["code"] == "not_stored"
            assert f"({why})" in error["message"]
            assert "do not send it again" in error["message"]
        status, said = health(url)
        assert (status, said["status"]) == (503, "store")
        assert f"({why})" in said["reason"]
        assert "ttt_store_fails 1.0" in httpx.get(f"{url}/metrics").text
        assert (service.sessions.get("ada").updates, service.sessions.get("ada").stored) == (2, 1)
        for again in (learn(url), wait(url)):  # now at once, and nothing is learnt
            assert (again.status_code, again.headers["retry-after"]) == (503, "10")
            assert again.json()["error"]["code"] == "store"
            assert again.json()["error"]["message"].startswith("nothing was learnt: the store has taken nothing for")
        assert service.sessions.get("ada").updates == 2
        store.repair()
        until(lambda: health(url) == (200, {"status": "ok"}))
        until(lambda: service.sessions.saved("ada"))
        assert httpx.get(f"{url}/v1/users/ada").json()["unsaved"] == 0
        assert learn(url).json()["version"] == 3
        assert "ttt_store_fails 0.0" in httpx.get(f"{url}/metrics").text
    assert service.missed.of("ada") is None


def test_a_lesson_whose_wait_was_given_up_is_learnt_and_stored_once(model, tmp_path, monkeypatch):
    service = service_of(model, tmp_path)
    store = BrokenStore(monkeypatch, service.store)
    lessons = [lesson_of(), lesson_of()]
    answer = Answer(service, "ada", words(5), lessons[0], wait=True, max_tokens=1).wait()
    assert isinstance(answer.end, NotStored)
    with pytest.raises(Unavailable, match="nothing was learnt: the store has taken nothing"):
        service.learn("ada", lesson_of())
    with pytest.raises(Unavailable, match="nothing was rolled back: the store has taken nothing"):
        service.rollback("ada", 1)
    with pytest.raises(Unavailable, match="nothing was studied: the store has taken nothing"):
        service.study("ada")
    store.repair()
    until(lambda: service.stalled is None)
    assert service.learn("ada", lessons[1]).result(60).stored.result(60) == 2
    assert service.drain() == []
    assert_same(learned(learner_of(model), lessons), stored(tmp_path, "ada"))


@pytest.mark.parametrize("gone", [False, True])
def test_a_turn_that_nobody_waits_for_any_more_counts_as_missed_if_it_is_never_stored(
    model, tmp_path, monkeypatch, gone
):
    service, other = service_of(model, tmp_path), ttt.Store(tmp_path)
    store = BrokenStore(monkeypatch, service.store)
    told = service.stored("ada", service.learn("ada", lesson_of()).result(60).stored)
    if gone:
        told.cancel()
    else:
        with pytest.raises(NotStored):
            told.result(30)
    other.lease("ada", steal=True).release()
    store.repair()
    until(lambda: service.missed.of("ada"))
    assert service.missed.of("ada").turns == 1
    assert "taken over" in service.missed.of("ada").why
    assert service.drain() == []


@pytest.mark.parametrize("given_up_first", [True, False])
def test_one_of_two_ends_at_the_same_time_tells_of_a_turn_that_is_never_stored(monkeypatch, given_up_first):
    missed, stored, failure = [], concurrent.futures.Future(), Conflict("taken over")
    given_up = NotStored("nothing is taken")
    waiting = Acknowledgements(lambda: 0.0, lambda user: given_up, lambda *args: missed.append(args))
    told = waiting.wait("ada", stored)

    def settled(future, result):
        if result is failure and given_up_first:
            waiting.look()  # in another thread, just before
        return settle(future, result)

    monkeypatch.setattr("ttt.serve.acknowledgements.settle", settled)
    stored.set_exception(failure)
    waiting.look()
    assert told.exception() is (given_up if given_up_first else failure)
    assert missed == ([("ada", failure)] if given_up_first else [])


def test_who_waits_for_a_version_that_alone_is_not_taken_hears_of_it_and_the_store_is_well(
    model, tmp_path, monkeypatch
):
    service = service_of(model, tmp_path)
    put = service.store.put

    def refusing(lease, *args):
        if lease.user == "ada":
            raise StorageFailure("her folder cannot be written")
        return put(lease, *args)

    monkeypatch.setattr(service.store, "put", refusing)
    monkeypatch.setattr(jobs_module, "LONGEST_WAIT", 60.0)
    waiting = service.stored("ada", service.learn("ada", lesson_of()).result(60).stored)
    assert service.stored("bob", service.learn("bob", lesson_of()).result(60).stored).result(60) == 1
    until(lambda: service.sessions.not_stored("ada", 60.0))
    assert service.stalled is None
    assert service.sessions.not_stored("bob", 60.0) is None
    error = service.sessions.not_stored("ada", 60.0)
    assert "(a version of this user cannot be written)" in error.message
    assert not waiting.done()
    monkeypatch.setattr(jobs_module, "LONGEST_WAIT", 0.0)
    with pytest.raises(NotStored):
        waiting.result(30)
    monkeypatch.setattr(service.store, "put", put)
    assert service.drain() == []


def test_a_store_that_takes_nothing_yet_is_not_said_to_refuse_one_user_alone(model, tmp_path, monkeypatch):
    service = service_of(model, tmp_path)
    monkeypatch.setattr(jobs_module, "LONGEST_WAIT", 60.0)
    assert service.learn("bob", lesson_of()).result(60).stored.result(60) == 1  # before it broke
    store = BrokenStore(monkeypatch, service.store)
    hers = service.learn("ada", lesson_of()).result(60).stored
    until(lambda: service.sessions.get("ada").put_failed_since is not None)
    assert service.sessions.not_stored("ada", 60.0) is None
    assert "(StorageFailure)" in service.sessions.not_stored("ada", 0.0).message
    store.repair()
    assert hers.result(60) == 1


def test_a_user_who_alone_cannot_be_written_stops_nobody_else(model, tmp_path):
    service = service_of(model, tmp_path / "store")
    service.learn("ada", lesson_of()).result(60).stored.result(60)
    (blob,) = [each for each in (tmp_path / "store" / "blobs").rglob("*") if each.is_file()]
    folder = blob.parent
    folder.rename(tmp_path / "away")
    folder.write_text("a file in the place of her folder")
    lessons = [lesson_of(), lesson_of()]
    with served(service) as url:
        hers = service.learn("ada", lesson_of()).result(60).stored
        until(lambda: service.sessions.get("ada").put_failed_since is not None)
        assert learn(url).json()["error"]["code"] == "not_stored"  # after the time of all that waits for a store
        for lesson in lessons:
            assert service.stalled is None
            assert health(url) == (200, {"status": "ok"})
            assert service.learn("bob", lesson).result(60).stored.result(60)
        assert not hers.done()
        folder.unlink()
        (tmp_path / "away").rename(folder)
        assert hers.result(30) == 2  # with what she taught later
    assert_same(learned(learner_of(model), lessons), stored(tmp_path / "store", "bob"))
    assert [each.number for each in ttt.Store(tmp_path / "store").history("ada")] == [2, 1]


def size_of(service):
    return sum(each.nbytes for each in service.export("ada").result(60).values())


def test_a_disk_without_room_for_a_version_takes_nothing_though_smaller_files_fit(model, tmp_path, monkeypatch):
    service = service_of(model, tmp_path)
    write, sizes = service.store.blobs.write, []
    service.learn("ada", lesson_of()).result(60).stored.result(60)
    room = size_of(service) // 2

    def full(key, data):
        sizes.append(len(data))
        if len(data) > room:
            raise OSError(28, "No space left on device")
        return write(key, data)

    monkeypatch.setattr("ttt.store.store._PROBE_BYTES", 1)
    monkeypatch.setattr(service.store.blobs, "write", full)
    service.learn("ada", lesson_of()).result(60)
    until(lambda: service.stalled)
    time.sleep(0.3)  # several attempts later
    assert service.stalled.why == "StorageFailure, by OSError (No space left on device)"
    assert size_of(service) in sizes
    monkeypatch.setattr(service.store.blobs, "write", write)
    until(lambda: service.stalled is None)
    assert service.drain() == []


def test_a_store_to_which_nobody_writes_is_tried_until_it_works_again(model, tmp_path, monkeypatch):
    service = service_of(model, tmp_path)
    store = BrokenStore(monkeypatch, service.store)
    tried, check = threading.Event(), service.store.check_writes

    def checked(size):
        tried.set()
        return check(size)

    service.learn("ada", lesson_of()).result(60)
    until(lambda: service.stalled)
    service.forget("ada").result(30)
    monkeypatch.setattr(service.store, "check_writes", checked)
    assert tried.wait(30)
    time.sleep(0.3)
    assert service.stalled.why == "StorageFailure"
    store.repair()
    until(lambda: service.stalled is None)
    assert service.drain() == []


def refused(answer, what):
    assert answer.status_code == 503, answer.text
    error = answer.json()["error"]
    assert error["code"] == "store"
    assert error["message"] == f"{what}: {REPLACED}"
    assert "retry-after" not in answer.headers


@pytest.mark.parametrize("damage", ["removed", "made anew", "blobs removed"])
def test_a_store_that_was_replaced_is_never_used_and_all_that_needs_it_is_refused_by_name(model, tmp_path, damage):
    folder = tmp_path / "store"
    service = service_of(model, folder)
    service.learn("ada", lesson_of()).result(60).stored.result(60)
    service.learn("bob", lesson_of()).result(60).stored.result(60)
    with served(service) as url:
        shutil.rmtree(folder / "blobs" if damage == "blobs removed" else folder)
        if damage == "made anew":
            ttt.Store(folder).close()
        before = sorted(tmp_path.rglob("*"))
        until(lambda: health(url)[0] == 503)  # without a request that needs the store
        assert health(url) == (503, {"status": "store", "reason": REPLACED})
        refused(learn(url), "nothing was learnt")
        refused(wait(url), "nothing was learnt")
        refused(httpx.post(f"{url}/v1/chat/completions", json=ASK, headers=ADA), "nothing was learnt")
        refused(httpx.post(f"{url}/v1/users/ada/study"), "nothing was studied")
        refused(httpx.post(f"{url}/v1/users/ada/rollback", json={"version": 1}), "nothing was rolled back")
        if damage != "blobs removed":
            refused(httpx.get(f"{url}/v1/users/ada"), "the store is out of reach")
            off = {"x-ttt-user": "cy", "x-ttt-learn": "off"}
            refused(httpx.post(f"{url}/v1/chat/completions", json=ASK, headers=off), "the store is out of reach")
        refused(httpx.delete(f"{url}/v1/users/bob"), "not everything could be removed yet")
        off = {**ADA, "x-ttt-learn": "off"}  # whose weights are in memory
        assert httpx.post(f"{url}/v1/chat/completions", json=ASK, headers=off).json()["ttt"]["updates"] == 1
        assert sorted(tmp_path.rglob("*")) == before
    assert service.missed.of("ada") is None


def test_a_store_whose_files_come_back_works_again(model, tmp_path):
    folder = tmp_path / "store"
    service = service_of(model, folder)
    lessons = [lesson_of(), lesson_of()]
    service.learn("ada", lessons[0]).result(60).stored.result(60)
    folder.rename(tmp_path / "away")
    until(lambda: service.stalled)
    with pytest.raises(Unavailable, match="started anew"):
        service.learn("ada", lesson_of())
    (tmp_path / "away").rename(folder)
    until(lambda: service.stalled is None)
    assert service.learn("ada", lessons[1]).result(60).stored.result(60) == 2
    assert service.drain() == []
    assert_same(learned(learner_of(model), lessons), stored(folder, "ada"))


def test_a_user_of_whom_the_store_does_not_say_anything_is_refused_in_time_and_served_later(
    model, tmp_path, monkeypatch
):
    monkeypatch.setattr(openings_module, "LONGEST", 1.0)
    service = service_of(model, tmp_path)
    gate = Gate(monkeypatch, service.store, "get", "ada")
    began = time.monotonic()
    answers = [Answer(service, "ada", words(5), max_tokens=1), service.learn("ada", lesson_of())]
    assert isinstance(answers[0].wait(30).end, Unavailable)
    with pytest.raises(Unavailable, match="the store does not answer"):
        answers[1].result(30)
    assert time.monotonic() - began < 10
    assert Answer(service, "bob", words(5), max_tokens=1).wait().end.updates == 0
    gate.open()
    until(lambda: service._waiting.queues.get("ada") is None or service._waiting.queues["ada"].idle)
    assert Answer(service, "ada", words(5), max_tokens=1).wait().end.updates == 0
    assert service.drain() == []


def test_what_is_asked_of_a_store_that_does_not_answer_ends_in_time(model, tmp_path, monkeypatch):
    monkeypatch.setattr(openings_module, "LONGEST", 1.0)
    service = service_of(model, tmp_path)
    service.learn("ada", lesson_of()).result(60).stored.result(60)
    with served(service) as url:
        gate, began = Gate(monkeypatch, service.store, "history", "ada"), time.monotonic()
        found = httpx.get(f"{url}/v1/users/ada", timeout=30)
        assert time.monotonic() - began < 10
        assert (found.status_code, found.headers["retry-after"]) == (503, "5")
        assert found.json()["error"]["message"] == "the store does not answer; try again later"
        gate.open()


def test_nobody_waits_for_a_slot_that_a_store_that_fails_keeps_taken(model, tmp_path, monkeypatch):
    service = service_of(model, tmp_path, slots=1)
    store = BrokenStore(monkeypatch, service.store)
    service.learn("ada", lesson_of()).result(60)
    until(lambda: service.stalled)
    end = Answer(service, "bob", words(5), max_tokens=1).wait(30).end
    assert isinstance(end, Unavailable)
    assert end.message.startswith("no slot is free for this user: the store has taken nothing for")
    store.repair()
    until(lambda: service.stalled is None)
    assert Answer(service, "bob", words(5), max_tokens=1).wait().end.updates == 0
    assert service.drain() == []


def call(health, kind, error=None):
    with health.watched(kind):
        if error is not None:
            raise error


def test_what_a_call_says_of_the_store_depends_on_what_it_wrote():
    health = StoreHealth()
    full, lost = StorageFailure("full"), StorageFailure("lost")
    full.__cause__ = OSError(28, "No space left on device")
    full.__cause__.__cause__ = OSError(28, "No space left on device", "the file of ada")
    assert health.stalled(0.0).why == ""  # of a store that works, nothing is known but that
    assert health.stalled(60.0) is None
    with pytest.raises(StorageFailure):
        call(health, "version", full)
    call(health, "index")  # which says nothing about versions
    assert health.stalled(0.0).why == "StorageFailure, by OSError (No space left on device)"
    with pytest.raises(LeaseHeld):
        call(health, "index", LeaseHeld("another's"))
    assert health.failing
    with pytest.raises(StorageFailure):
        call(health, "index", lost)
    call(health, "version")
    assert not health.failing
    with pytest.raises(StorageFailure):
        call(health, "index", lost)
    with pytest.raises(UnknownUser):  # the index has answered
        call(health, "version", UnknownUser("ada"))
    assert not health.failing
    with pytest.raises(Conflict):
        call(health, "index", Conflict("something else"))
    caused = StorageFailure("a write failed")
    caused.__cause__ = StoreReplaced("the file of ada")
    with pytest.raises(StorageFailure):
        call(health, "version", caused)
    assert health.stalled(60.0).reason == REPLACED  # at once, and without the user's name


def test_what_is_told_of_an_error_of_files_names_no_path(tmp_path):
    health = StoreHealth()
    with ttt.Store(tmp_path / "store") as store, store.lease("ada") as lease:
        store.put(lease, {"x": torch.zeros(2)})
        (blob,) = [each for each in (tmp_path / "store" / "blobs").rglob("*") if each.is_file()]
        blob.parent.rename(tmp_path / "away")
        blob.parent.write_text("a file in the place of her folder")
        with pytest.raises(StorageFailure), health.watched("version"):
            store.put(lease, {"x": torch.zeros(2)})
        blob.parent.unlink()
    assert "/" not in health.stalled(0.0).reason
    assert health.stalled(0.0).why.startswith("StorageFailure, by ")
    with pytest.raises(FileNotFoundError, match="does not exist") as missing:
        write_atomically(tmp_path / "no folder" / "file", b"")
    assert kinds(missing.value) == "FileNotFoundError (No such file or directory)"
    assert kinds(OSError("a text")) == kinds(OSError(999_999, "a text")) == "OSError"


def test_a_call_that_does_not_end_counts_from_when_it_began():
    health = StoreHealth()
    with health.watched("version"):
        time.sleep(0.2)
        assert 0.2 <= health.stalled(0.2).seconds < 5
        assert health.stalled(5.0) is None
    assert health.stalled(0.1) is None
