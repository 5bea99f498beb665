"""The files of a store: removed or replaced under an open store, on a full disk, on a network, of an older release."""

import shutil
import sqlite3
import subprocess
import time

import pytest
from failing import FailingConnection
from states import assert_same_state, files_with, put, small_state

import ttt
from ttt.store import CommitUncertain, StorageFailure, StoreReplaced, filesystems, sqlite
from ttt.store.sqlite import SqliteIndex

# -- removed or replaced ------------------------------------------------------------------------------------------


def remove_all(folder):
    shutil.rmtree(folder)


def remove_index(folder):
    (folder / "index.db").unlink()


def remove_log(folder):
    (folder / "index.db-wal").unlink()


def remove_blobs(folder):
    shutil.rmtree(folder / "blobs")


def move_away(folder):
    folder.rename(folder.with_name("moved"))


def replace_all(folder):
    move_away(folder)
    with ttt.Store(folder) as other:
        put(other, "ada", 5)


def replace_blobs(folder):
    """As an unmounted disk does, whose mount point remains."""
    (folder / "blobs").rename(folder / "mounted elsewhere")
    (folder / "blobs").mkdir()


def replace_index(folder):
    shutil.copy(folder / "index.db", folder / "copy")
    (folder / "copy").rename(folder / "index.db")


DAMAGES = [remove_all, remove_index, remove_log, remove_blobs, move_away, replace_all, replace_blobs, replace_index]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_store_whose_files_were_removed_or_replaced_acknowledges_nothing(tmp_path, damage):
    """Nor does it make files anew, or leave any in the folders that took their place."""
    folder = tmp_path / "store"
    with ttt.Store(folder) as store:
        put(store, "ada", 1)
        store.index.query("PRAGMA wal_checkpoint")
        lease = store.lease("ada")
        store.check_in_place()
        damage(folder)
        before = set(tmp_path.rglob("*"))
        for attempt in (lambda: store.put(lease, small_state(2)), store.check_in_place, store.check_writes):
            with pytest.raises(StoreReplaced, match=r"removed|replaced"):
                attempt()
        with pytest.raises(StorageFailure, match=r"removed|replaced"):
            store.gc(grace=0)
        if damage not in (remove_blobs, replace_blobs):
            for attempt in (
                lambda: store.lease("bob"), lease.renew, lambda: store.forget("ada"), lambda: store.history("ada"),
                lambda: store.get("ada"), store.users, lambda: store.rollback("ada", 1, lease=lease),
            ):  # fmt: skip
                with pytest.raises(StoreReplaced, match=r"removed|replaced"):
                    attempt()
        assert set(tmp_path.rglob("*")) == before
    if damage is replace_all:
        with ttt.Store(folder) as other:
            assert_same_state(other.get("ada", strict=True).tensors, small_state(5))
            assert [v.number for v in other.history("ada")] == [1]


@pytest.mark.parametrize("damage", [remove_blobs, replace_blobs])
def test_blobs_whose_folder_was_removed_are_out_of_reach_and_not_damaged(tmp_path, damage):
    with ttt.Store(tmp_path) as store:
        put(store, "ada", 1)
        damage(tmp_path)
        with pytest.raises(StoreReplaced, match="removed or replaced"):
            store.get("ada")
        with pytest.raises(StoreReplaced, match="removed or replaced"):
            store.verify()
        with pytest.raises(StoreReplaced, match="removed or replaced"):
            store.forget("ada")
        assert len(store.index.user_rows()) == 1  # still to be erased
        if damage is replace_blobs:  # the disk is mounted again
            (tmp_path / "blobs").rmdir()
            (tmp_path / "mounted elsewhere").rename(tmp_path / "blobs")
            store.gc()
            assert list(store.blobs.list_folders()) == []


def test_a_store_that_is_removed_during_the_commit_is_uncertain(tmp_path, monkeypatch):
    with ttt.Store(tmp_path / "store") as store:
        put(store, "ada", 1)
        lease, connection = store.lease("ada"), store.index.connection()

        class RemovingConnection:
            def execute(self, statement, *values):
                if statement == "COMMIT":
                    shutil.rmtree(tmp_path / "store")
                return connection.execute(statement, *values)

        with monkeypatch.context() as patch:
            patch.setattr(store.index, "connection", RemovingConnection)
            with pytest.raises(CommitUncertain, match="removed or replaced"):
                store.put(lease, small_state(2))


@pytest.mark.parametrize("damage", [remove_index, replace_all])
def test_a_connection_is_not_opened_again_on_other_files(tmp_path, damage):
    """An empty index in their place would make garbage of all blobs."""
    folder = tmp_path / "store"
    store = ttt.Store(folder)
    put(store, "ada", 1)
    store.close()
    damage(folder)
    with pytest.raises(StorageFailure, match=r"unable to open|replaced by another store"):
        store.gc(grace=0)
    if damage is remove_index:
        assert not (folder / "index.db").exists()
        assert len(list(folder.glob("blobs/??/*/*"))) == 1


def test_a_path_at_which_no_store_can_be_is_named(tmp_path):
    file, folder = tmp_path / "notes.txt", tmp_path / "store"
    file.write_text("mine")
    (folder / "index.db").mkdir(parents=True)
    for url in (file, file / "below"):
        with pytest.raises(
            StorageFailure, match=f"^{url} cannot be opened: .*a file is there, and no folder: '{file}'"
        ):
            ttt.Store(url)
    with pytest.raises(StorageFailure, match=f"{folder / 'index.db'}: unable to open database file"):
        ttt.Store(folder)
    assert file.read_text() == "mine"


def test_a_relative_path_means_the_folder_of_the_moment_it_was_opened(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with ttt.Store("store") as store:
        put(store, "ada", 1)
        monkeypatch.chdir(tmp_path / "elsewhere")
        store.close()  # the next call connects anew
        assert put(store, "ada", 2) == 2
    assert list((tmp_path / "elsewhere").iterdir()) == []


# -- a full disk --------------------------------------------------------------------------------------------------


class FullDiskConnection:
    """A connection that cannot write while the reserved file takes up the disk."""

    def __init__(self, connection, reserve):
        self.connection, self.reserve = connection, reserve

    def execute(self, statement, *values):
        writes = statement.split()[0] in ("INSERT", "UPDATE", "DELETE", "VACUUM")
        if writes and self.reserve.exists():
            raise sqlite3.OperationalError("database or disk is full")
        return self.connection.execute(statement, *values)


def reserve_of(store):
    return store.index.path.with_name("index.db-reserve")


@pytest.mark.parametrize("call", ["gc", "forget"])
def test_maintenance_works_on_a_full_disk(local, monkeypatch, call):
    for seed in (1, 2, 3):
        put(local, "ada", seed)
    assert reserve_of(local).stat().st_size == sqlite.RESERVE_BYTES
    full = FullDiskConnection(local.index.connection(), reserve_of(local))
    with monkeypatch.context() as patch:
        patch.setattr(local.index, "connection", lambda: full)
        with pytest.raises(StorageFailure, match="disk is full"):
            local.lease("ada")
        if call == "gc":
            assert local.gc(keep_last=1, keep_days=0, grace=0)[:3] == (2, 0, 2)
        else:
            local.forget("ada")
    assert len(list(local.blobs.root.glob("??/*/*"))) == (call == "gc")
    assert reserve_of(local).stat().st_size == sqlite.RESERVE_BYTES  # for the next time
    assert local.verify().sound


def test_a_store_on_a_full_disk_can_be_opened_for_maintenance(local, monkeypatch):
    """SQLite needs room even to read: without it, opening fails with an I/O error."""
    for seed in (1, 2):
        put(local, "ada", seed)
    local.close()
    connect, reserve = SqliteIndex.connect, reserve_of(local)

    def connect_if_room(self):
        if reserve.exists():
            raise sqlite3.OperationalError("disk I/O error")
        return connect(self)

    monkeypatch.setattr(SqliteIndex, "connect", connect_if_room)
    with ttt.Store(local.index.path.parent) as store:
        with pytest.raises(StorageFailure, match="disk I/O error"):
            store.get("ada")
        reserve_room = store.index.reserve_room
        monkeypatch.setattr(store.index, "reserve_room", lambda: None)
        assert store.gc(keep_last=1, keep_days=0, grace=0).blobs == 1
        assert store.get("ada").version == 2
        reserve_room()
    with pytest.raises(StorageFailure, match="disk I/O error"):
        ttt.Store(local.index.path.parent).get("ada")
    reserve.unlink()
    monkeypatch.setattr(SqliteIndex, "connect", lambda self: connect_if_room(self) and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ttt.Store(local.index.path.parent)


def test_a_lock_is_no_reason_to_use_the_reserved_room(local, monkeypatch):
    put(local, "ada", 1)
    failing = FailingConnection(local.index.connection(), "BEGIN", sqlite3.OperationalError("database is locked"))
    with monkeypatch.context() as patch:
        patch.setattr(local.index, "connection", lambda: failing)
        patch.setattr(local.index, "reserve_room", lambda: None)
        with pytest.raises(StorageFailure, match="locked"):
            local.gc(grace=0)
    assert reserve_of(local).exists()


# -- network file systems -----------------------------------------------------------------------------------------


@pytest.fixture
def on_nfs(monkeypatch):
    """All folders are found to be on a network file system."""
    monkeypatch.setattr(filesystems, "network_filesystem", lambda folder: "nfs")


def test_the_kind_of_file_system_is_what_stat_says(tmp_path, monkeypatch):
    kind = subprocess.run(["stat", "-f", "-c", "%t", tmp_path], capture_output=True, text=True, check=True).stdout
    assert filesystems.network_filesystem(tmp_path) is filesystems.NETWORK_FILESYSTEMS.get(int(kind, 16))
    monkeypatch.setitem(filesystems.NETWORK_FILESYSTEMS, int(kind, 16), "this one")
    assert filesystems.network_filesystem(tmp_path) == "this one"
    with pytest.raises(FileNotFoundError):
        filesystems.network_filesystem(tmp_path / "missing")


def test_on_a_network_file_system_the_index_has_a_rollback_journal(tmp_path):
    folders = []
    index = SqliteIndex(tmp_path / "x.db", network_filesystem=lambda folder: folders.append(folder) or "nfs")
    assert (index.journal, folders) == ("delete", [tmp_path])
    assert index.query("PRAGMA synchronous") == [(3,)]  # the deletion of the journal is flushed as well
    grant = index.acquire("ada", 30, steal=False)
    with index.transaction() as run:
        run("UPDATE ttt_users SET expires = 0")
        files = {path.name for path in tmp_path.iterdir()}
    assert files == {"x.db", "x.db-reserve", "x.db-journal"}
    assert index.extend(grant, 1).token == 1
    index.close()


def test_a_store_on_a_network_file_system_behaves_as_any_other(on_nfs, tmp_path):
    with ttt.Store(tmp_path) as store, ttt.Store(tmp_path) as other:
        assert (store.journal, store.verify().journal) == ("delete", "delete")
        for seed in range(1, 4):
            put(store if seed % 2 else other, "ada", seed)
        put(store, "bob.secret@example.org", 4)
        other.forget("bob.secret@example.org")
        assert files_with(tmp_path, [b"bob.secret"]) == []
        assert store.gc(keep_last=1, keep_days=0, grace=0).versions == 2
        assert_same_state(other.get("ada", strict=True).tensors, small_state(3))


def test_a_write_ahead_log_is_replaced_on_a_network_file_system_unless_in_use(tmp_path, monkeypatch):
    with ttt.Store(tmp_path) as store:
        put(store, "ada", 1)
        assert store.journal == "wal"
        with monkeypatch.context() as patch:
            patch.setattr(filesystems, "network_filesystem", lambda folder: "nfs")
            with pytest.raises(StorageFailure, match=r"is on nfs, where a write-ahead log .* cannot be replaced now"):
                ttt.Store(tmp_path, timeout=0.1)
        assert put(store, "ada", 2) == 2
    with monkeypatch.context() as patch:
        patch.setattr(filesystems, "network_filesystem", lambda folder: "nfs")
        with ttt.Store(tmp_path) as store:
            assert store.journal == "delete"
            assert_same_state(store.get("ada").tensors, small_state(2))
            # A process of the file server has the folder on a local disk, and must not bring the log back.
            patch.setattr(filesystems, "network_filesystem", lambda folder: None)
            with ttt.Store(tmp_path) as local:
                assert local.journal == "delete"
                assert put(local, "ada", 3) == 3
            assert put(store, "ada", 4) == 4
    assert not (tmp_path / "index.db-wal").exists()


@pytest.mark.parametrize("url", ["postgres"], indirect=True)
def test_the_journal_of_a_server_is_its_own(store):
    assert (store.journal, store.verify().journal) == ("server", "server")


# -- older releases -----------------------------------------------------------------------------------------------


def rows_of_schema_1(execute, now):
    execute("INSERT INTO ttt_users (name, shelf, token, expires, head) VALUES ('ada', ?, 4, ?, 1)", "ab" * 16, now + 50)
    row = "INSERT INTO ttt_versions (user_row, number, created, size, sha256, key) VALUES (1, 1, 7, ?, ?, ?)"
    execute(row, 3, "0" * 64, f"ab/{'ab' * 16}/x.safetensors")


def assert_upgraded(store, now):
    (version,) = store.history("ada")
    assert (version.number, version.created, version.size) == (1, 7, 3)
    assert version.key == f"ab/{'ab' * 16}/x.safetensors"
    with pytest.raises(ttt.store.LeaseHeld, match=r"another [45]\d\.\d s"):  # a lease from before still holds
        store.lease("ada")
    with store.lease("ada", steal=True) as lease:
        assert lease.token > 4
        assert store.put(lease, small_state(2)) == 2
    assert_same_state(store.get("ada").tensors, small_state(2))


def test_a_file_of_schema_1_is_upgraded(tmp_path):
    old = sqlite3.connect(tmp_path / "index.db", isolation_level=None)
    for statement in ("PRAGMA journal_mode = WAL", *sqlite._SCHEMA.split(";\n"), "PRAGMA user_version = 1"):
        old.execute(statement)
    now = time.time()
    rows_of_schema_1(lambda statement, *values: old.execute(statement, values), now)
    old.execute("UPDATE ttt_tokens SET latest = 4")
    with ttt.Store(tmp_path) as store:
        assert_upgraded(store, now)
    with pytest.raises(sqlite3.OperationalError, match="no such column: key"):  # a process of the older release
        old.execute("SELECT key FROM ttt_versions WHERE user_row = 1")


def test_a_database_of_schema_1_is_upgraded(postgres_server, tmp_path):
    import psycopg

    from ttt.store import postgres

    url = postgres_server()
    now = time.time()
    with psycopg.connect(url, autocommit=True) as old:
        for statement in postgres._SCHEMA.split(";\n"):
            old.execute(statement)
        rows_of_schema_1(lambda statement, *values: old.execute(statement.replace("?", "%s"), values), now)
        old.execute("SELECT setval('ttt_tokens', 4)")
        with ttt.Store(f"{url}&blobs={tmp_path}/blobs") as store:
            assert_upgraded(store, now)
            store.index.query("UPDATE ttt_store SET version = 3 RETURNING version")
        with pytest.raises(StorageFailure, match="schema version 3; this release reads 2"):
            ttt.Store(f"{url}&blobs={tmp_path}/blobs")
