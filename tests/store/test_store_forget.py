"""Forgetting: afterwards no file of the store holds a byte of the user's id, weights, importance or inputs."""

import threading

import pytest
import torch
from states import assert_same_state, put, small_state

import ttt
from ttt.store import StorageFailure, UnknownUser
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


def files_with(folder, secrets):
    """The files under ``folder`` whose content or name holds one of ``secrets``."""
    found = []
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        if any(secret in content or secret in str(path).encode() for secret in secrets):
            found.append(path.name)
    return found


def test_no_byte_remains(tmp_path):
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
    assert {"index.db-wal"} <= set(files_with(tmp_path, secrets))  # the scan finds what is there
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
def test_what_a_crash_interrupts_is_completed(tmp_path, monkeypatch, step):
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


def test_gc_completes_it_too(tmp_path, monkeypatch):
    store = ttt.Store(tmp_path)
    put(store, USER, 1)
    with monkeypatch.context() as patch:
        patch.setattr(store.blobs, "remove_folder", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.forget(USER)
    assert store.gc(grace=1e6).blobs == 1  # without grace
    assert list(store.blobs.list_folders()) == []
    assert store.index.user_rows() == []


def test_a_write_that_comes_too_late_is_removed(store, monkeypatch):
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


def test_a_reader_that_holds_the_log_is_reported(tmp_path):
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


def test_others_read_and_write_meanwhile(tmp_path):
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
