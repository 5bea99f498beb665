"""Draining: after its deadline a server waits neither for requests nor for a store that does not answer."""

import queue
import subprocess
import sys
import threading
import time

import pytest
from test_service import lesson_of, words
from test_service_faults import until
from tiny_chat_model import Answer, service_of

import ttt
from ttt.serve import jobs as jobs_module
from ttt.serve.daemon_threads import DaemonThreads
from ttt.serve.errors import HungUp, Unavailable
from ttt.store import LeaseHeld


def test_a_drain_with_a_deadline_refuses_jobs_that_have_not_begun(model, tmp_path):
    service = service_of(model, tmp_path, rows=1)
    service.learn("ada", lesson_of(teach=1.0)).result(60).stored.result(60)
    long = Answer(service, "ada", words(10), max_tokens=490)
    until(lambda: long.pieces)
    jobs = [service.study("ada", passes=200), service.learn("ada", lesson_of()), service.export("ada")]
    began = time.monotonic()
    assert service.drain(timeout=0.1) == []
    assert time.monotonic() - began < 10
    for job in jobs:
        with pytest.raises((Unavailable, HungUp)):
            job.result(1)
    assert isinstance(long.wait(1).end, Unavailable)
    assert ttt.Store(tmp_path).get("ada").version == 1


def hung(monkeypatch, target, name):
    """Let ``target.name`` hang: an event that is set when it is called, and one that ends it."""
    came, end, method = threading.Event(), threading.Event(), getattr(target, name)

    def hang(*args, **options):
        came.set()
        end.wait(60)
        return method(*args, **options)

    monkeypatch.setattr(target, name, hang)
    return came, end


@pytest.mark.parametrize("kind", ["request", "rollback", "forget"])
def test_a_drain_with_a_deadline_does_not_wait_for_a_read_of_the_store_that_hangs(model, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(jobs_module, "LONGEST_WAIT", 0.5)
    service = service_of(model, tmp_path)
    service.learn("ada", lesson_of()).result(60).stored.result(60)
    if kind == "request":
        came, end = hung(monkeypatch, service.store, "get")
        waiting = Answer(service, "bob", words(5), max_tokens=1)
    elif kind == "rollback":
        came, end = hung(monkeypatch, service.store, "get")
        waiting = service.rollback("ada", 1)
    else:
        came, end = hung(monkeypatch, service.store, "forget")
        waiting = service.forget("ada")
    assert came.wait(30)
    began = time.monotonic()
    assert service.drain(timeout=0.2) == []
    assert time.monotonic() - began < 10
    error = waiting.wait(1).end if kind == "request" else waiting.exception(1)
    assert isinstance(error, Unavailable)
    if kind != "request":
        return end.set()
    other = ttt.Store(tmp_path)
    assert not leased(other, "bob")
    end.set()  # what is read too late is of no use
    until(lambda: leased(other, "bob"), seconds=10)  # before it ends by itself


def test_all_ends_of_one_server_wait_for_the_store_no_longer_than_the_first(model, tmp_path, monkeypatch):
    service = service_of(model, tmp_path)
    came, end = hung(monkeypatch, service.store, "put")
    service.learn("ada", lesson_of()).result(60)
    assert came.wait(30)
    began = time.monotonic()
    assert service.sessions.close(1.0) == ["ada"]
    assert 1.0 <= time.monotonic() - began < 3
    assert service.sessions.close(30.0) == ["ada"]
    assert service.drain(0.0, storing=30.0) == ["ada"]
    assert time.monotonic() - began < 5
    end.set()
    until(lambda: service.sessions.saved("ada"))


@pytest.mark.parametrize("longer", [None, 50.0])
def test_an_end_that_waits_for_the_store_ends_with_a_shorter_one_that_comes_later(model, tmp_path, monkeypatch, longer):
    service = service_of(model, tmp_path)
    came, end = hung(monkeypatch, service.store, "put")
    service.learn("ada", lesson_of()).result(60)
    assert came.wait(30)
    unsaved = []
    waiting = threading.Thread(target=lambda: unsaved.append(service.sessions.close(longer)))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    assert service.sessions.close(0.5) == ["ada"]
    waiting.join(20)
    assert unsaved == [["ada"]]  # and the store still hangs
    end.set()
    until(lambda: service.sessions.saved("ada"))
    assert service.sessions.close() == []


def leased(store, user):
    """Whether ``store`` can lease ``user`` now."""
    try:
        store.lease(user, 5.0).release()
    except LeaseHeld:
        return False
    return True


def test_a_process_ends_although_a_thread_of_it_waits_for_the_store(tmp_path):
    program = """
import threading
from ttt.serve.daemon_threads import DaemonThreads
threads, begun = DaemonThreads(2, "io"), threading.Event()
def hang():
    begun.set()
    threading.Event().wait()
never = threads.submit(hang)
begun.wait(10)
assert threads.submit(pow, 2, 5).result(10) == 32
failed = threads.submit(pow, 0, -1)
assert isinstance(failed.exception(10), ZeroDivisionError)
threads.shutdown()
try:
    threads.submit(pow, 2, 5)
except RuntimeError:
    print("done", never.done())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "done False\n"), done.stderr


class SlowQueue(queue.Queue):
    """Lets other threads come between looking and putting."""

    def put(self, item):
        time.sleep(0.001)
        super().put(item)


def test_work_that_is_taken_while_threads_shut_down_is_done(monkeypatch):
    monkeypatch.setattr("ttt.serve.daemon_threads.queue.SimpleQueue", SlowQueue)
    for _ in range(10):
        threads, done, begin = DaemonThreads(2, "io"), [], threading.Barrier(5)

        def submit(threads=threads, done=done, begin=begin):
            begin.wait(10)
            while True:
                try:
                    done.append(threads.submit(pow, 2, 5))
                except RuntimeError:
                    return

        senders = [threading.Thread(target=submit) for _ in range(4)]
        for sender in senders:
            sender.start()
        begin.wait(10)
        time.sleep(0.005)
        threads.shutdown()
        threads.shutdown()
        for sender in senders:
            sender.join(10)
        assert done
        assert [future.result(10) for future in done] == [32] * len(done)
        for thread in threads._threads:
            thread.join(10)
            assert not thread.is_alive()
