"""Forks: a child has neither its parent's leases nor its parent's connection. Each test is a process of its own."""

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent

BEGIN = """
import os, sys, threading, torch, ttt
from states import assert_same_state, put, small_state
from ttt.store import StaleLease, StorageFailure

store = ttt.Store(sys.argv[1])

def in_child(function):
    "Run it in a fork, which must end by itself within 20 seconds."
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
        os._exit(1)
    timer = threading.Timer(20, os.kill, (child, 9))
    timer.start()
    assert os.waitpid(child, 0)[1] == 0
    timer.cancel()
"""


@pytest.fixture
def run_script(forks):
    def run(script, url):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent.parent)])}
        done = forks.run(["-c", BEGIN + script, url], env=environment, timeout=120)
        assert done.returncode == 0, done.stderr

    return run


@pytest.fixture(params=["folder", "postgres"])
def url(request, tmp_path):
    if request.param == "folder":
        return str(tmp_path / "store")
    return f"{request.getfixturevalue('postgres_server')()}&blobs={tmp_path}/blobs"


def test_a_child_cannot_write_under_its_parents_lease_nor_end_it(run_script, url):
    script = """
lease = store.lease("ada", seconds=100)
store.put(lease, small_state(1))

def child():
    for attempt in (
        lambda: store.put(lease, small_state(7)),
        lambda: store.rollback("ada", 1, lease=lease),
        lease.renew,
    ):
        try:
            attempt()
        except StaleLease as error:
            assert "of which process" in str(error), error
        else:
            raise AssertionError("it wrote")
    lease.release()
    try:
        store.lease("ada")
    except ttt.store.LeaseHeld:
        pass
    else:
        raise AssertionError("the parent's lease was ended")
    assert_same_state(store.get("ada", strict=True).tensors, small_state(1))
    assert put(store, "bob", 5) == 1  # its own lease

in_child(child)
assert store.put(lease, small_state(2)) == 2
assert [u.name for u in store.users()] == ["ada", "bob"]
assert store.verify().sound and store.verify().orphans == []
"""
    run_script(script, url)


def test_a_child_forked_during_a_transaction_does_not_hang(run_script, url):
    script = """
put(store, "ada", 1)
begun, done = threading.Event(), threading.Event()

def hold():
    with store.index.transaction() as run:
        run("UPDATE ttt_users SET expires = 7 WHERE name = 'ada'")
        begun.set()
        assert done.wait(60)

thread = threading.Thread(target=hold)
thread.start()
begun.wait()

def child():
    assert_same_state(store.get("ada", strict=True).tensors, small_state(1))
    store.close()

in_child(child)
done.set()
thread.join()
assert store.index.query("SELECT expires FROM ttt_users") == [(7,)]  # the parent's transaction was committed
assert put(store, "ada", 2) == 2
in_child(lambda: put(store, "ada", 3))
assert_same_state(store.get("ada", 3).tensors, small_state(3))
"""
    run_script(script, url)


def test_a_child_cannot_go_on_with_its_parents_transaction(run_script, url):
    script = """
put(store, "ada", 1)

def child_writes(run):
    try:
        run("UPDATE ttt_users SET expires = 7")
    except StorageFailure as error:
        assert "cannot go on" in str(error)
    else:
        raise AssertionError("it went on")

for ending in ("commit", "error"):
    children = []
    try:
        with store.index.transaction() as run:
            run("UPDATE ttt_users SET expires = 5")
            in_child(lambda: child_writes(run))
            child = os.fork()
            if child == 0 and ending == "error":
                raise ZeroDivisionError
            if child:
                assert os.waitpid(child, 0)[1] == 0
    except (StorageFailure, ZeroDivisionError) as error:
        if child == 0:
            import gc, sqlite3
            del run, store
            gc.collect()
            os._exit(not isinstance(error, StorageFailure if ending == "commit" else ZeroDivisionError))
        raise
    else:
        if child == 0:
            os._exit(1)
    assert store.index.query("SELECT expires FROM ttt_users") == [(5,)]
    with store.index.transaction() as run:
        run("UPDATE ttt_users SET expires = 0")
assert put(store, "ada", 2) == 2
"""
    run_script(script, url)
