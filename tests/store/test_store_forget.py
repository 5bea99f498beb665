"""Forgetting: afterwards no file of the store contains a byte of the user's id, weights, importance or inputs."""

import errno
import re
import sqlite3
import threading

import pytest
import torch
from failing import Failing
from states import assert_same_state, files_with, put, small_state

import ttt
from ttt.store import StorageFailure, UnknownUser, local_blobs
from ttt.store.blobs import new_key

USER = "ada.lovelace+4711@example.org"


def secret_state():
    """Tensors whose bytes occur nowhere else, by what a user's state is made of."""
    return {
        "layers.0.a": torch.randn(4, 16),
        "layers.0.b": torch.randn(4, 8),
        "layers.0.importance": torch.rand(8, 16),
        "layers.0.replay": torch.randn(5, 16).bfloat16(),
        "layers.0.replay_ids": torch.randint(0, 2**31, (9,)),
    }


def secrets_of(states):
    """Eight bytes from every place of every tensor, and the id as text that a database could keep."""
    found = {USER.encode(), USER.encode("utf-16-le"), USER[:12].encode(), USER[-12:].encode()}
    for state in states:
        for tensor in state.values():
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found |= {data[i : i + 8] for i in range(0, len(data), 8)}
    return found


def test_no_byte_of_a_forgotten_user_remains(tmp_path):
    store = ttt.Store(tmp_path)
    states = [secret_state() for _ in range(4)]
    for number in range(300):  # enough rows for pages to split and be rewritten
        with store.lease(f"other{number}"):
            pass
    for number, state in enumerate(states):
        with store.lease(USER) as lease:
            store.put(lease, state, {"note": f"{USER} said {number}"})
        put(store, f"other{number}", number)
    store.rollback(USER, 2)
    store.gc(keep_last=3, keep_days=0, grace=0)
    interrupted = new_key(store.lease(USER).grant.folder)  # a write that a crash cut off
    store.blobs.write(interrupted, states[0]["layers.0.a"].numpy().tobytes())
    secrets = secrets_of(states)
    assert {"index.db-wal"} <= set(files_with(tmp_path, secrets))  # the scan finds secrets before they are erased
    assert len(files_with(tmp_path, secrets)) >= 4
    store.forget(USER)
    assert files_with(tmp_path, secrets) == []  # while the store is open
    store.close()
    assert files_with(tmp_path, secrets) == []
    with ttt.Store(tmp_path) as store:
        with pytest.raises(UnknownUser):
            store.get(USER)
        for number in range(4):
            assert_same_state(store.get(f"other{number}", strict=True).tensors, small_state(number))


def test_weights_leave_the_blobs_of_every_kind_of_store(store, tmp_path):
    states = [secret_state() for _ in range(2)]
    for state in states:
        with store.lease(USER) as lease:
            store.put(lease, state)
    keys = [v.key for v in store.history(USER)]
    store.forget(USER)
    assert [store.blobs.size(key) for key in keys] == [None, None]
    assert files_with(tmp_path, secrets_of(states)) == []


@pytest.mark.parametrize("step", ["remove_folder", "drop", "scrub"])
def test_another_call_completes_an_interrupted_forget(tmp_path, monkeypatch, step):
    store = ttt.Store(tmp_path)
    state = secret_state()
    with store.lease(USER) as lease:
        store.put(lease, state)
    with monkeypatch.context() as patch:
        patch.setattr(store.blobs if step == "remove_folder" else store.index, step, lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.forget(USER)
    with pytest.raises(UnknownUser):  # from its first step on
        store.get(USER)
    with ttt.Store(tmp_path) as other:  # after the crash
        with pytest.raises(UnknownUser):
            other.forget(USER)
        store.close()
    assert files_with(tmp_path, secrets_of([state])) == []


@pytest.mark.parametrize("step", ["remove_folder", "drop", "scrub"])
def test_gc_completes_an_interrupted_forget(tmp_path, monkeypatch, step):
    """Down to the free pages and the log of the index."""
    store = ttt.Store(tmp_path)
    for number in range(300):  # enough rows for pages to split
        with store.lease(f"other{number}"):
            pass
    put(store, USER, 1)
    with monkeypatch.context() as patch:
        patch.setattr(store.blobs if step == "remove_folder" else store.index, step, lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.forget(USER)
    assert store.gc(grace=1e6).blobs == (step == "remove_folder")  # without grace
    assert files_with(tmp_path, [USER.encode(), USER[:12].encode()]) == []
    assert list(store.blobs.list_folders()) == []
    assert len(store.index.user_rows()) == 300


def test_a_folder_that_cannot_be_deleted_blocks_nobody_else(tmp_path, monkeypatch):
    """The others are erased, garbage is collected and the index scrubbed; then the error names the folder."""
    store = ttt.Store(tmp_path)
    states = [secret_state() for _ in range(3)]
    for user, state in zip((USER, "bob.secret@home.net", "eve.secret@home.net"), states, strict=True):
        with store.lease(user) as lease:
            store.put(lease, state)
    for seed in (1, 2):
        put(store, "other", seed)
    stuck, remove_folder = store.history(USER)[0].key.split("/")[1], store.blobs.remove_folder

    def remove_others(folder):
        if folder == stuck:
            raise PermissionError("not this one")
        remove_folder(folder)

    with monkeypatch.context() as patch:
        patch.setattr(store.blobs, "remove_folder", remove_others)
        for user in (USER, "bob.secret@home.net"):
            with pytest.raises(
                StorageFailure, match=f"{re.escape(user)}.*1 could not be removed yet: folder {stuck}: not this"
            ):
                store.forget(user)
        assert files_with(tmp_path, [USER.encode(), b"bob.secret"]) == []  # both ids are gone from the index
        assert files_with(tmp_path, secrets_of(states[1:2])) == []
        store.index.detach("eve.secret@home.net")  # by a forget that was interrupted after its first step
        with pytest.raises(StorageFailure, match=f"1 versions and 2 blobs are removed, but 1 .*{stuck}"):
            store.gc(keep_last=1, keep_days=0, grace=0)
        assert files_with(tmp_path, [b"eve.secret", *secrets_of(states[2:])]) == []
    assert store.gc(grace=0).blobs == 1
    assert files_with(tmp_path, secrets_of(states)) == []
    assert_same_state(store.get("other", strict=True).tensors, small_state(2))


def test_gc_scrubs_the_index_although_the_folder_cannot_be_deleted(tmp_path, monkeypatch):
    """A forget that was interrupted before its scrub, of a user whose folder is stuck."""

    def stuck(folder):
        raise PermissionError("stuck")

    with ttt.Store(tmp_path) as store:
        put(store, USER, 1)
        store.index.detach(USER)
        assert files_with(tmp_path, [USER.encode()]) != []
        with monkeypatch.context() as patch:
            patch.setattr(store.blobs, "remove_folder", stuck)
            with pytest.raises(StorageFailure, match="stuck"):
                store.gc()
        assert files_with(tmp_path, [USER.encode()]) == []
        assert store.gc().blobs == 1
        assert store.index.user_rows() == []


def test_a_file_that_cannot_be_deleted_leaves_no_other_file_of_the_folder(local, monkeypatch):
    for seed in (1, 2, 3):
        put(local, USER, seed)
    monkeypatch.setattr(local_blobs, "os", Failing("unlink", 2, errno.EPERM))
    with pytest.raises(StorageFailure, match=r"1 of 3 files remain: .*not permitted"):
        local.forget(USER)
    assert len([path for path in local.blobs.root.rglob("*") if path.is_file()]) == 1
    local.gc()
    assert list(local.blobs.list_folders()) == []


@pytest.mark.parametrize("fails", ["detach", "scrub"])
def test_a_scrub_that_fails_on_a_full_disk_is_tried_again(local, monkeypatch, fails):
    """The second attempt does not find the user any more, which is no reason to say that there was none."""
    put(local, USER, 1)
    method, calls = getattr(local.index, fails), []

    def full_once(*args):
        calls.append(args)
        if len(calls) == 1:
            raise StorageFailure("the index failed") from sqlite3.OperationalError("database or disk is full")
        return method(*args)

    monkeypatch.setattr(local.index, fails, full_once)
    local.forget(USER)
    assert len(calls) == 2
    assert local.index.user_rows() == []


def test_a_write_that_overlaps_with_forgetting_leaves_nothing(store, monkeypatch):
    """The user is forgotten between a writer's blob and its commit; and the writer dies before it can clean up."""
    put(store, USER, 1)
    for dies in (False, True):
        lease = store.lease(USER)
        write = store.blobs.write

        def write_and_forget(key, data, write=write):
            store.forget(USER)
            write(key, data)

        with monkeypatch.context() as patch:
            patch.setattr(store.blobs, "write", write_and_forget)
            if dies:
                patch.setattr(store.blobs, "remove", lambda key: None)
            with pytest.raises(ttt.store.StaleLease):
                store.put(lease, small_state(2))
        assert len(store.verify().orphans) == dies
        store.gc(grace=1e6)  # files of users that are gone have no grace
        assert list(store.blobs.list_folders()) == []


def test_a_reader_that_keeps_the_log_in_use_is_reported(tmp_path):
    store, reader = ttt.Store(tmp_path, timeout=0.1), ttt.Store(tmp_path)
    put(store, USER, 1)
    connection = reader.index.connection()
    connection.execute("BEGIN")
    connection.execute("SELECT * FROM ttt_users").fetchall()
    with pytest.raises(StorageFailure, match=r"still holds deleted ids|locked"):
        store.forget(USER)
    connection.execute("COMMIT")
    with pytest.raises(UnknownUser):
        store.forget(USER)
    assert files_with(tmp_path, [USER.encode()]) == []


def test_others_read_and_write_while_a_user_is_forgotten(tmp_path):
    """Forgetting rewrites the database under users that are being served."""
    with ttt.Store(tmp_path) as store:
        put(store, "bob", 0)
        stop, failures = threading.Event(), []

        def serve():
            with ttt.Store(tmp_path) as mine:
                seed = 0
                while not stop.is_set():
                    seed += 1
                    try:
                        put(mine, "bob", seed)
                        assert_same_state(mine.get("bob", strict=True).tensors, small_state(seed))
                    except Exception as error:
                        failures.append(error)

        thread = threading.Thread(target=serve)
        thread.start()
        for seed in range(5):
            put(store, USER, seed)
            store.forget(USER)
        stop.set()
        thread.join()
        assert failures == []
        assert store.verify().sound
