"""Garbage collection while others write: it holds no lock while it deletes, and takes no blob that a version names."""

import itertools
import os
import threading
import time
from collections import deque
from contextlib import contextmanager

import pytest
from states import assert_same_state, put, small_state

import ttt
from ttt.store import DamagedState, StorageFailure, UnknownUser, UnknownVersion
from ttt.store.blobs import new_key
from ttt.store.maintenance import BLOBS_AT_ONCE


def add_garbage(store, user, count=1):
    """Write blobs to the folder of a user's newest version that no version names; their keys."""
    folder = store.history(user)[0].key.split("/")[1]
    keys = [new_key(folder) for _ in range(count)]
    for key in keys:
        store.blobs.write(key, b"garbage")
    return keys


@pytest.mark.parametrize("url", ["folder", "postgres"], indirect=True)
def test_others_write_while_blobs_are_deleted(url, monkeypatch):
    """Also the user whose garbage it is. The other store waits 0.2 s for a lock, and would fail."""
    with ttt.Store(url) as store, ttt.Store(url, timeout=0.2) as other:
        for user in ("ada", "bob"):
            put(store, user, 0)
        add_garbage(store, "ada", 3)
        remove, seeds = store.blobs.remove, itertools.count(1)

        def remove_while_others_write(key):
            seed = next(seeds)
            for user in ("ada", "bob"):
                assert put(other, user, seed) == seed + 1
            remove(key)

        monkeypatch.setattr(store.blobs, "remove", remove_while_others_write)
        assert store.gc(keep_days=7, grace=0).blobs == 3
        for user in ("ada", "bob"):
            assert_same_state(store.get(user, strict=True).tensors, small_state(3))
        report = store.verify()
        assert (report.versions, report.sound, report.orphans) == (8, True, [])


@pytest.mark.parametrize("url", ["folder", "postgres"], indirect=True)
def test_others_write_while_a_commit_looks_for_its_blob(url, monkeypatch):
    with ttt.Store(url) as store, ttt.Store(url, timeout=0.2) as other:
        size = store.blobs.size
        monkeypatch.setattr(store.blobs, "size", lambda key: (put(other, "bob", 2), size(key))[1])
        assert put(store, "ada", 1) == 1
        assert store.get("bob").version == 1


def test_garbage_is_marked_and_deleted_in_batches(local, monkeypatch):
    put(local, "ada", 1)
    add_garbage(local, "ada", BLOBS_AT_ONCE + 3)
    mark, batches = local.index.mark_for_deletion, []
    monkeypatch.setattr(local.index, "mark_for_deletion", lambda blobs: (batches.append(len(blobs)), mark(blobs))[1])
    assert local.gc(grace=0).blobs == BLOBS_AT_ONCE + 3
    assert sorted(batches) == [4, BLOBS_AT_ONCE]  # the blob of the version is looked up, too
    assert local.index.marked_for_deletion() == []
    assert local.verify().orphans == []


class Interleaving:
    """Runs the steps of two threads in a given order, "p" and "g" each; steps beyond it run as they come."""

    def __init__(self, order):
        self._order, self._changed = deque(order), threading.Condition()

    @contextmanager
    def _turn(self, who):
        with self._changed:
            assert self._changed.wait_for(lambda: who not in self._order or self._order[0] == who, timeout=60)
        yield
        with self._changed:
            if self._order and self._order[0] == who:
                self._order.popleft()
            self._changed.notify_all()

    def step(self, who, patch, owner, name):
        """Make the method ``name`` of ``owner`` a step of the thread ``who``."""
        method = getattr(owner, name)

        def stepped(*args):
            with self._turn(who):
                return method(*args)

        patch.setattr(owner, name, stepped)

    def finish(self, who):
        with self._changed:
            self._order = deque(step for step in self._order if step != who)
            self._changed.notify_all()


ORDERS = ["".join("p" if n in chosen else "g" for n in range(7)) for chosen in itertools.combinations(range(7), 3)]


@pytest.mark.parametrize("url", ["folder", "postgres"], indirect=True)
@pytest.mark.parametrize("kind", ["put", "rollback"])
def test_no_order_of_a_write_and_a_collection_loses_an_acknowledged_version(kind, url):
    """All 35 orders of the three steps of a write, and the four of a collection without any grace."""
    outcomes = set()
    for order in ORDERS:
        with ttt.Store(url) as writer, ttt.Store(url) as collector, pytest.MonkeyPatch.context() as patch:
            # One blob is garbage: that of the write, or that of the version to go back to.
            old = put(writer, "ada", 1) if kind == "rollback" else 0
            head = put(writer, "ada", 2)
            collector.gc(keep_last=2 if old else 1, keep_days=0, grace=0)
            write, steps = writer.blobs.write, Interleaving(order)

            def write_long_ago(key, data, writer=writer, write=write):
                write(key, data)
                os.utime(writer.blobs.root / key, (0, 0))

            patch.setattr(writer.blobs, "write", write_long_ago)
            for owner, name in (
                (writer.blobs, "write" if kind == "put" else "read"),
                (writer.blobs, "size"),
                (writer.index, "commit"),
            ):
                steps.step("p", patch, owner, name)
            for owner, name in (
                (collector.blobs, "list_files") if kind == "put" else (collector.index, "prune"),
                (collector.index, "mark_for_deletion"),
                (collector.blobs, "remove"),
                (collector.index, "unmark_deleted"),
            ):
                steps.step("g", patch, owner, name)

            def collect(collector=collector, steps=steps):
                try:
                    collector.gc(keep_last=1, keep_days=0, grace=0)
                finally:
                    steps.finish("g")

            with writer.lease("ada") as lease:
                thread = threading.Thread(target=collect)
                thread.start()
                try:
                    if kind == "put":
                        version = writer.put(lease, small_state(3))
                    else:
                        version = writer.rollback("ada", old, lease=lease)
                    assert version == head + 1
                except (StorageFailure, UnknownVersion, DamagedState) as error:
                    version = None
                    outcomes.add(type(error).__name__)
                else:
                    outcomes.add("acknowledged")
                finally:
                    steps.finish("p")
                    thread.join()
            state = collector.get("ada", strict=True)
            assert state.version == (version or head), order
            seed = 2 if version is None else 3 if kind == "put" else 1
            assert_same_state(state.tensors, small_state(seed))
            collector.gc(keep_last=1, keep_days=0, grace=0)
            report = collector.verify()
            assert (report.sound, report.orphans) == (True, []), order
    assert outcomes >= {"acknowledged", "StorageFailure"}  # the orders reach both


@pytest.mark.parametrize("method", ["remove", "unmark_deleted"])
def test_a_collection_that_crashed_is_completed_and_its_blobs_cannot_be_named(store, monkeypatch, method):
    put(store, "ada", 1)
    (key,) = add_garbage(store, "ada")
    owner = store.blobs if method == "remove" else store.index
    with monkeypatch.context() as patch:
        patch.setattr(owner, method, lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.gc(grace=0)
    with store.lease("ada") as lease:
        if method == "unmark_deleted":
            store.blobs.write(key, b"garbage")  # as if the target had not removed it yet
        with pytest.raises(StorageFailure, match="gone or cut short"):
            store._commit(lease, (key, 7, "0" * 64))
    assert store.get("ada", strict=True).version == 1
    store.gc(grace=1e6)  # it was marked: no grace
    assert store.blobs.size(key) is None
    assert store.index.marked_for_deletion() == []
    assert store.verify().orphans == []


def test_a_user_may_be_forgotten_while_garbage_is_collected(store, monkeypatch):
    for user in ("ada", "bob"):
        put(store, user, 1)
        add_garbage(store, user)
    mark = store.index.mark_for_deletion

    def forget_then_mark(blobs):
        store.forget("ada")
        return mark(blobs)

    monkeypatch.setattr(store.index, "mark_for_deletion", forget_then_mark)
    assert store.gc(grace=0).blobs == 1
    report = store.verify()
    assert (report.versions, report.sound, report.orphans) == (1, True, [])
    assert store.index.marked_for_deletion() == []


def test_a_blob_that_cannot_be_removed_does_not_stop_the_collection(store, monkeypatch):
    for user in ("ada", "bob"):
        put(store, user, 1)
    stuck, *others = add_garbage(store, "ada", 3) + add_garbage(store, "bob", 3)
    remove = store.blobs.remove

    def remove_others(key):
        if key == stuck:
            raise PermissionError("not this one")
        remove(key)

    with monkeypatch.context() as patch:
        patch.setattr(store.blobs, "remove", remove_others)
        with pytest.raises(StorageFailure, match=f"1 could not be removed yet: blob {stuck}: not this one"):
            store.gc(grace=0)
    assert [store.blobs.size(key) for key in others] == [None] * 5
    # The target may have removed it all the same, or still do so: no version may name it.
    assert [key for _, key in store.index.marked_for_deletion()] == [stuck]
    assert store.gc(grace=0).blobs == 1
    assert store.verify().orphans == []


def test_folders_that_cannot_be_listed_do_not_stop_the_collection(store, monkeypatch):
    for user in ("ada", "bob"):
        put(store, user, 1)
    add_garbage(store, "ada")
    (key,) = add_garbage(store, "bob")
    stuck, list_files = store.history("ada")[0].key.split("/")[1], store.blobs.list_files

    def list_others(folder):
        if folder == stuck:
            raise PermissionError("not this one")
        return list_files(folder)

    monkeypatch.setattr(store.blobs, "list_files", list_others)
    with pytest.raises(StorageFailure, match=f"folder {stuck}: not this one"):
        store.gc(grace=0)
    assert store.blobs.size(key) is None


def test_a_clock_that_was_set_back_leaves_no_garbage(local, monkeypatch):
    """Files and leases that are dated a year ahead say nothing of their age."""
    put(local, "ada", 1)
    (key,) = add_garbage(local, "ada")
    year = 365 * 86400
    os.utime(local.blobs.root / key, (time.time() + year,) * 2)
    with monkeypatch.context() as patch:
        patch.setattr(local.index, "now", lambda run: time.time() + year)
        local.lease("bob", seconds=0.001)
    assert local.gc(grace=60).blobs == 1
    time.sleep(0.01)
    assert local.gc(grace=0).users == 1
    assert [row.name for row in local.index.user_rows()] == ["ada"]
    with pytest.raises(UnknownUser):
        local.get("bob")
