"""Disks that are full, fail, tear and flip bits; databases that fail."""

import errno
import hashlib
import os
import sqlite3
from pathlib import Path

import pytest
import torch
from failing import Failing, FailingConnection
from states import assert_same_state, blob_paths, put, small_state

import ttt
from ttt import files
from ttt.store import CommitUncertain, DamagedState, DamagedStateWarning, StorageFailure

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def three(local):
    """A store in a folder with three versions of ada."""
    for seed in (1, 2, 3):
        put(local, "ada", seed)
    return local


def assert_unharmed(store):
    """Three versions, all sound; gc removes what a failed write left."""
    report = store.verify()
    assert report.sound
    assert [v.number for v in store.history("ada")] == [3, 2, 1]
    assert_same_state(store.get("ada", strict=True).tensors, small_state(3))
    store.gc(keep_days=7, grace=0)
    assert store.verify().orphans == []
    assert len(list(store.blobs.root.glob("??/*/*"))) == 3


# -- writing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize(("call", "nth"), [("fsync", 1), ("fsync", 2), ("replace", 1), ("open", 1)])
def test_a_write_that_fails_changes_nothing(three, monkeypatch, call, nth, code):
    """fsync of the blob, fsync of its folder, its renaming, opening the folder."""
    with three.lease("ada") as lease:
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", Failing(call, nth, code))
            with pytest.raises(StorageFailure, match=f"'ada' could not be written: .*{os.strerror(code)}"):
                three.put(lease, small_state(4))
        assert_unharmed(three)
        assert three.put(lease, small_state(4)) == 4  # the lease still holds


def test_a_first_write_that_fails_leaves_no_user(local, monkeypatch):
    with local.lease("ada") as lease, monkeypatch.context() as patch:
        patch.setattr(files, "os", Failing("fsync", 1, errno.ENOSPC))
        with pytest.raises(StorageFailure):
            local.put(lease, small_state(1))
    with pytest.raises(ttt.store.UnknownUser):
        local.get("ada")
    local.gc(grace=0)
    assert list(local.blobs.list_folders()) == []
    assert local.index.user_rows() == []


def test_a_failed_write_that_cannot_be_removed_is_garbage(three, monkeypatch):
    def cannot(*args):
        raise OSError(errno.EIO, "cannot")

    with three.lease("ada") as lease, monkeypatch.context() as patch:
        patch.setattr(three.blobs, "remove", cannot)
        patch.setattr(three.index, "commit", cannot)
        with pytest.raises(StorageFailure):
            three.put(lease, small_state(4))
    assert len(three.verify().orphans) == 1
    assert_unharmed(three)


@pytest.mark.parametrize(("blobs_fail", "kibibytes"), [(True, 64), (False, 256)])
def test_writes_that_a_file_size_limit_stops_change_nothing(forks, local, blobs_fail, kibibytes):
    """RLIMIT_FSIZE, in a process of its own: first the blob does not fit, then the index's log does not."""
    code = """
import resource, signal, sys, torch, ttt
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
url, size, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) * 1024
store = ttt.Store(url)
lease = store.lease("ada")
store.put(lease, {"x": torch.zeros(8)})
print(1, flush=True)
store.index.connection().execute("PRAGMA wal_autocheckpoint = 0")
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    while True:
        print(store.put(lease, {"x": torch.zeros(size, dtype=torch.uint8)}), flush=True)
except ttt.store.StoreError as error:
    print(type(error).__name__, flush=True)
    store.history("ada")  # the index can still be read
"""
    size = 2 * kibibytes * 1024 if blobs_fail else 8
    command = ["-c", code, str(local.blobs.root.parent), str(size), str(kibibytes)]
    done = forks.run(command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    *versions, error = done.stdout.split()
    if blobs_fail:
        assert (versions, error) == (["1"], "StorageFailure")
    else:
        assert len(versions) > 10
        assert error in ("StorageFailure", "CommitUncertain")
    state = local.get("ada", strict=True)
    assert state.version >= int(versions[-1])
    assert local.verify().sound
    local.gc(keep_days=0, grace=0)
    assert local.verify().orphans == []
    assert put(local, "bob", 1) == 1


def test_a_store_says_whether_it_takes_writes_and_keeps_nothing_of_the_trial(store):
    put(store, "ada", 1)
    users, versions = store.index.user_rows(), store.index.all_versions()
    store.check_in_place()
    store.check_writes()
    assert (store.index.user_rows(), store.index.all_versions()) == (users, versions)
    report = store.verify()
    assert (report.sound, report.blobs, report.orphans) == (True, 1, [])


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_disk_that_takes_no_files_is_noticed_by_the_trial(local, monkeypatch, call):
    with monkeypatch.context() as patch:
        patch.setattr(files, "os", Failing(call, 1, errno.ENOSPC))
        with pytest.raises(StorageFailure, match="No space left"):
            local.check_writes()
    assert local.verify().orphans == []
    local.check_writes()


def test_an_index_that_takes_no_writes_is_noticed_by_the_trial(local, monkeypatch):
    failing = FailingConnection(
        local.index.connection(), "UPDATE", sqlite3.OperationalError("database or disk is full")
    )
    monkeypatch.setattr(local.index, "connection", lambda: failing)
    with pytest.raises(StorageFailure, match="disk is full"):
        local.check_writes()


def test_everything_is_flushed_before_the_commit(local, monkeypatch):
    """In this order: the blob's bytes, its name, then the commit; and new folders' names before the blob's."""
    events = []

    class Recording:
        def __getattr__(self, name):
            return getattr(self, f"_{name}", getattr(os, name))

        def _fsync(self, handle):
            events.append(("fsync", os.readlink(f"/proc/self/fd/{handle}")))
            os.fsync(handle)

        def _replace(self, source, target):
            events.append(("rename", str(target)))
            os.replace(source, target)

    monkeypatch.setattr(files, "os", Recording())
    commit = local.index.commit

    def recorded(*args, **kwargs):
        events.append(("commit", ""))
        return commit(*args, **kwargs)

    monkeypatch.setattr(local.index, "commit", recorded)
    put(local, "ada", 1)
    (blob,) = blob_paths(local, "ada")
    kinds = [kind for kind, _ in events]
    assert kinds == ["fsync", "fsync", "fsync", "rename", "fsync", "commit"]
    paths = [path for _, path in events]
    assert paths[:2] == [str(blob.parent.parent.parent), str(blob.parent.parent)]  # names of the two new folders
    assert paths[2].startswith(f"{blob.parent}/.{blob.name}.")  # the bytes
    assert paths[3:5] == [str(blob), str(blob.parent)]
    for pragma, value in (("synchronous", 2), ("secure_delete", 1)):
        assert local.index.connection().execute(f"PRAGMA {pragma}").fetchone() == (value,)
    assert local.index.connection().execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize(
    "statement", ["BEGIN", "SELECT token", "INSERT INTO ttt_versions", "UPDATE ttt_users SET head"]
)
def test_an_index_that_fails_before_its_commit_changes_nothing(three, monkeypatch, statement):
    failing = FailingConnection(three.index.connection(), statement, sqlite3.OperationalError("disk I/O error"))
    lease = three.lease("ada")
    with monkeypatch.context() as patch:
        patch.setattr(three.index, "connection", lambda: failing)
        with pytest.raises(StorageFailure, match="disk I/O error"):
            three.put(lease, small_state(4))
    assert three.verify().orphans == []  # removed at once: nothing can name it
    assert_unharmed(three)
    assert three.put(lease, small_state(4)) == 4


@pytest.mark.parametrize("stands", [False, True])
def test_an_index_that_fails_in_its_commit_keeps_the_blob(three, monkeypatch, stands):
    """The version may exist, so the blob must be kept in both cases."""
    lease = three.lease("ada")
    failing = FailingConnection(three.index.connection(), "COMMIT", sqlite3.OperationalError("disk I/O error"), stands)
    with monkeypatch.context() as patch:
        patch.setattr(three.index, "connection", lambda: failing)
        with pytest.raises(CommitUncertain):
            three.put(lease, small_state(4))
    if stands:
        assert three.get("ada", strict=True).version == 4
        assert_same_state(three.get("ada").tensors, small_state(4))
        assert three.verify().orphans == []
    else:
        assert len(three.verify().orphans) == 1
        assert_unharmed(three)


@pytest.mark.parametrize("committed", [False, True])
def test_an_interrupt_around_the_commit_leaves_a_version_or_garbage(three, monkeypatch, committed):
    """Ctrl-C just before the commit, or just after it."""
    commit = three.index.commit

    def interrupted(*args, **kwargs):
        if committed:
            commit(*args, **kwargs)
        raise KeyboardInterrupt

    with three.lease("ada") as lease, monkeypatch.context() as patch:
        patch.setattr(three.index, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            three.put(lease, small_state(4))
    if committed:
        assert_same_state(three.get("ada", 4).tensors, small_state(4))
    else:
        assert_unharmed(three)


def test_a_locked_index_refuses_writes_and_serves_reads(tmp_path):
    with ttt.Store(tmp_path) as store, ttt.Store(tmp_path, timeout=0.05) as other:
        put(store, "ada", 1)
        lease = other.lease("bob")
        with store.index.transaction():
            with pytest.raises(StorageFailure, match="locked"):
                other.put(lease, small_state(1))
            assert other.get("ada").version == 1  # readers do not wait
        assert other.put(lease, small_state(1)) == 1


# -- reading ------------------------------------------------------------------------------------------------------


def torn(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
    path.write_bytes(b"")


def lengthened(path):
    path.write_bytes(path.read_bytes() + b"\0")


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


def removed(path):
    path.unlink()


def flip(path):
    """One bit, anywhere: in the header, a name, the metadata or a tensor."""
    data = bytearray(path.read_bytes())
    bit = int(torch.randint(8 * len(data), ()))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [torn, emptied, lengthened, zeroed, removed, *[flip] * 5])
def test_damage_is_detected_and_the_last_good_version_served(three, damage):
    newest = blob_paths(three, "ada")[0]
    damage(newest)
    with pytest.warns(DamagedStateWarning, match="version 3 of 'ada' is damaged: its blob .*; version 2 is served"):
        state = three.get("ada")
    assert state.version == 2
    assert [version for version, _ in state.damaged] == [3]
    assert_same_state(state.tensors, small_state(2))
    for attempt in (lambda: three.get("ada", strict=True), lambda: three.get("ada", 3)):
        with pytest.raises(DamagedState, match="version 3: its blob"):
            attempt()
    with pytest.raises(DamagedState, match="version 3 of 'ada' is damaged"):
        three.rollback("ada", 3)
    assert three.get("ada", 2, strict=True).version == 2
    report = three.verify()
    assert not report.sound
    assert [(b.user, b.version) for b in report.damaged] == [("ada", 3)]
    assert report.damaged[0].reason == state.damaged[0][1]
    assert three.rollback("ada", 2) == 4  # the way out
    assert_same_state(three.get("ada", strict=True).tensors, small_state(2))


def test_a_flip_of_any_bit_is_detected(local):
    """All bits of a small blob, one by one."""
    with local.lease("ada") as lease:
        local.put(lease, {"x": torch.tensor([1.5])}, {"n": 1})
    (path,) = blob_paths(local, "ada")
    good = path.read_bytes()
    for bit in range(8 * len(good)):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(DamagedState, match="checksum"):
            local.get("ada")
    path.write_bytes(good)
    assert local.get("ada").meta == {"n": 1}


def test_when_all_are_damaged_nothing_is_served(three):
    for path in blob_paths(three, "ada"):
        flip(path)
    with pytest.raises(DamagedState, match=r"version 3: .*; version 2: .*; version 1: "):
        three.get("ada")
    assert len(three.verify().damaged) == 3


def test_a_whole_blob_that_is_no_safetensors_file_is_damaged(three):
    """Written by something else, its checksum committed."""
    lease = three.lease("ada")
    key = three.history("ada")[0].key[:-10] + "x"
    three.blobs.write(key, b"no safetensors")
    three._commit(lease, (key, 14, hashlib.sha256(b"no safetensors").hexdigest()))
    with pytest.raises(DamagedState, match="version 4: its blob is not a whole safetensors file"):
        three.get("ada", strict=True)


@pytest.mark.parametrize(("code", "served"), [(errno.EIO, True), (errno.ETIMEDOUT, False), (errno.EACCES, False)])
def test_a_blob_that_is_out_of_reach_is_not_damaged(three, monkeypatch, code, served):
    """A disk that cannot read a blob has lost it. A target that does not answer has not, and no old state is served."""
    newest, read = three.history("ada")[0].key, three.blobs.read

    def failing(key):
        if key == newest:
            raise OSError(code, os.strerror(code))
        return read(key)

    monkeypatch.setattr(three.blobs, "read", failing)
    if served:
        with pytest.warns(DamagedStateWarning):
            assert three.get("ada").version == 2
    else:
        with pytest.raises(StorageFailure, match=os.strerror(code)):
            three.get("ada")
        report = three.verify()
        assert (report.damaged, report.sound) == ([], False)
        assert [(b.user, b.version) for b in report.unreadable] == [("ada", 3)]
        assert os.strerror(code) in report.unreadable[0].reason


def test_a_version_removed_while_it_is_read_is_no_damage(three, monkeypatch):
    """Retention and a new version come between the index and the blob: the new one is served, without a warning."""
    read, calls = three.blobs.read, []

    def slow(key):
        calls.append(key)
        if len(calls) == 1:
            put(three, "ada", 4)
            three.gc(keep_last=1, keep_days=0, grace=0)
        return read(key)

    monkeypatch.setattr(three.blobs, "read", slow)
    state = three.get("ada")
    assert (state.version, state.damaged) == (4, ())


def test_a_torn_log_of_the_index_loses_nothing_older(tmp_path):
    """The log's tail cut or overwritten, as when the power fails in a write: SQLite drops what was never complete."""
    with ttt.Store(tmp_path) as store:
        put(store, "ada", 1)
        store.index.connection().execute("PRAGMA wal_checkpoint(TRUNCATE)")
        put(store, "ada", 2)
        log = (tmp_path / "index.db-wal").read_bytes()
        index = (tmp_path / "index.db").read_bytes()
    for cut in range(0, len(log), 997):
        copy = tmp_path / f"cut{cut}"
        copy.mkdir()
        (copy / "index.db").write_bytes(index)
        (copy / "index.db-wal").write_bytes(log[:cut])
        with ttt.Store(f"sqlite:///{copy}/index.db?blobs={tmp_path}/blobs") as store:
            state = store.get("ada", strict=True)
            assert state.version in (1, 2)
            assert_same_state(state.tensors, small_state(state.version))
