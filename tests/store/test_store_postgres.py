"""What only happens with a server: it ends connections, and many threads make its tables at once."""

import re
import sys
import threading

import pytest
from states import assert_same_state, put, small_state

import ttt
from ttt.installing import how_to_install
from ttt.store import CommitUncertain, StorageFailure


@pytest.fixture
def url(postgres_server, tmp_path):
    return f"{postgres_server()}&blobs={tmp_path}/blobs"


def end_connection(store, url):
    """As a restart of the server would."""
    with ttt.Store(url) as other:
        pid = store.index.connection().info.backend_pid
        assert other.index.query("SELECT pg_terminate_backend(?)", pid) == [(True,)]


def test_a_connection_that_the_server_ended_is_opened_again(url):
    with ttt.Store(url) as store:
        put(store, "ada", 1)
        for use in (lambda: store.get("ada"), lambda: store.lease("bob").release(), lambda: store.gc(grace=0)):
            end_connection(store, url)
            use()
        assert_same_state(store.get("ada", strict=True).tensors, small_state(1))


@pytest.mark.parametrize("moment", ["before the commit", "in the commit"])
def test_a_connection_that_ends_within_a_transaction_commits_nothing(url, monkeypatch, moment):
    with ttt.Store(url) as store:
        put(store, "ada", 1)
        lease = store.lease("ada")
        with monkeypatch.context() as patch:
            if moment == "before the commit":
                now = store.index.now
                patch.setattr(store.index, "now", lambda run: (end_connection(store, url), now(run))[1])
                with pytest.raises(StorageFailure):
                    store.put(lease, small_state(2))
            else:
                connection = store.index.connection()
                execute = connection.execute

                def end_then(statement, *values):
                    if statement == "COMMIT":
                        end_connection(store, url)
                    return execute(statement, *values)

                patch.setattr(connection, "execute", end_then)
                with pytest.raises(CommitUncertain):
                    store.put(lease, small_state(2))
        assert store.get("ada", strict=True).version == 1
        assert store.put(lease, small_state(3)) == 2
        store.gc(grace=0)
        report = store.verify()
        assert (report.sound, report.orphans) == (True, [])


def test_many_threads_open_and_write_at_once(url):
    """They make the tables together."""
    failures, start = [], threading.Barrier(6)

    def work(number):
        try:
            start.wait()
            with ttt.Store(url) as store:
                put(store, f"user{number}", number)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with ttt.Store(url) as store:
        assert [u.name for u in store.users()] == [f"user{number}" for number in range(6)]


@pytest.mark.parametrize("kind", ["folder", "postgres"])
def test_threads_can_share_a_store(kind, postgres_server, tmp_path):
    url = str(tmp_path) if kind == "folder" else f"{postgres_server()}&blobs={tmp_path}/blobs"
    failures = []
    with ttt.Store(url) as store:

        def serve(user):
            try:
                for seed in range(1, 6):
                    assert put(store, user, seed) == seed
                    assert_same_state(store.get(user, strict=True).tensors, small_state(seed))
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=serve, args=(f"user{number}",)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert store.verify().versions == 20


def test_a_server_that_is_missing_is_a_storage_failure(tmp_path):
    with pytest.raises(StorageFailure, match="the index failed"):
        ttt.Store(f"postgresql://ada:secret@/db?host={tmp_path}&blobs={tmp_path}/blobs", timeout=1)


@pytest.mark.parametrize(
    ("package", "url", "extra"),
    [("psycopg", "postgresql://host/db?blobs=/x", "postgres"), ("fsspec", "sqlite:///x.db?blobs=s3://b/p", "store")],
)
def test_missing_packages_are_named(package, url, extra, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=re.escape(how_to_install(extra))):
        ttt.Store(url)
