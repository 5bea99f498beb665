"""Verification goes on past what cannot be read, in time that is linear in the versions."""

import errno
import os
import shutil

import pytest
from states import put, small_state

from ttt.store import DamagedState, UnknownUser


def test_an_unreadable_blob_and_folder_are_reported_and_the_rest_is_checked(store, monkeypatch):
    for seed in (1, 2, 3):
        put(store, "ada", seed)
    put(store, "bob", 4)
    folder = store.history("bob")[0].key.split("/")[1]
    unreadable, missing = store.history("ada")[1].key, store.history("ada")[2].key
    store.blobs.remove(missing)
    read, list_files = store.blobs.read, store.blobs.list_files

    def failing_read(key):
        if key == unreadable:
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        return read(key)

    def failing_list(name):
        if name == folder:
            raise PermissionError("not this one")
        return list_files(name)

    with monkeypatch.context() as patch:
        patch.setattr(store.blobs, "read", failing_read)
        patch.setattr(store.blobs, "list_files", failing_list)
        report = store.verify()
    assert (report.versions, report.blobs, report.sound) == (4, 4, False)
    assert report.damaged == [("ada", 1, "its blob is missing")]
    assert [(b.user, b.version) for b in report.unreadable] == [("ada", 2)]
    assert os.strerror(errno.ETIMEDOUT) in report.unreadable[0].reason
    assert report.unlisted == [f"{folder}: not this one"]
    assert report.orphans == []
    assert store.verify().unreadable == []


def test_versions_that_are_removed_during_verification_are_no_damage(local, monkeypatch):
    for seed in (1, 2, 3):
        put(local, "ada", seed)
    put(local, "bob", 1)
    all_versions = local.index.all_versions

    def then_remove():
        found = all_versions()
        local.gc(keep_last=1, keep_days=0, grace=0)
        local.forget("bob")
        return found

    monkeypatch.setattr(local.index, "all_versions", then_remove)
    report = local.verify()
    assert (report.versions, report.sound, report.orphans) == (4, True, [])


@pytest.fixture
def lost(local, monkeypatch):
    """3,000 versions of a user whose folder is lost; and the statements that the index is asked from then on."""
    put(local, "ada", 1)
    version = local.history("ada")[0]
    with local.index.transaction() as run:
        for number in range(2, 3001):
            columns = "user_row, number, created, size, sha256, blob"
            row = (1, number, version.created, version.size, version.sha256, f"{version.key}{number}")
            run(f"INSERT INTO ttt_versions ({columns}) VALUES (?, ?, ?, ?, ?, ?)", *row)
        run("UPDATE ttt_users SET head = 3000")
    shutil.rmtree((local.blobs.root / version.key).parent)
    query, statements = local.index.query, []
    monkeypatch.setattr(local.index, "query", lambda *args: (statements.append(args[0]), query(*args))[1])
    return local, statements


def test_verifying_versions_of_a_lost_folder_takes_linear_time(lost):
    store, statements = lost
    report = store.verify()
    assert [broken.version for broken in report.damaged] == list(range(1, 3001))
    assert len(statements) <= 4


def test_reading_versions_of_a_lost_folder_takes_linear_time(lost):
    store, statements = lost
    with pytest.raises(DamagedState, match="version 3000: its blob is missing; version 2999: "):
        store.get("ada")
    assert len(statements) <= 4


def test_a_user_forgotten_while_a_damaged_version_is_read_is_unknown(local, monkeypatch):
    for seed in (1, 2):
        put(local, "ada", seed)
    read = local.blobs.read

    def forget_then_read(key):
        monkeypatch.setattr(local.blobs, "read", read)
        local.forget("ada")
        return read(key)

    monkeypatch.setattr(local.blobs, "read", forget_then_read)
    with pytest.raises(UnknownUser):
        local.get("ada")
    with local.lease("ada") as lease:
        assert local.put(lease, small_state(3)) == 1
