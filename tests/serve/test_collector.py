"""The removal of old versions beside a running server: what is kept, how often, and that a failure ends nothing."""

import logging
import threading

import pytest
import torch

import ttt
from ttt.serve.collector import Collector
from ttt.store import StorageFailure


def stored(folder, versions):
    store = ttt.Store(folder)
    with store.lease("ada") as lease:
        for _ in range(versions):
            store.put(lease, {"layer.a": torch.randn(2, 3)})
    return store


def numbers(store):
    return [version.number for version in store.history("ada")]


def collector_of(store, **options):
    usual = {"hours": 1e-5, "keep_last": 2, "keep_days": 0.0, "failed": lambda kind: None}
    return Collector(store, **usual | options)


def end(collector):
    """Close it and wait for its thread, which would otherwise go on, and log, during other tests."""
    collector.close()
    for thread in threading.enumerate():
        if thread.name == "ttt-collect":
            thread.join(20)
            assert not thread.is_alive()


def test_old_versions_are_removed_again_and_again(tmp_path, monkeypatch):
    store, rounds = stored(tmp_path / "store", 5), threading.Semaphore(0)
    gc = store.gc

    def counted(**options):
        found = gc(**options)
        rounds.release()
        return found

    monkeypatch.setattr(store, "gc", counted)
    collector = collector_of(store)
    try:
        assert rounds.acquire(timeout=20)
        assert rounds.acquire(timeout=20)
        assert numbers(store) == [5, 4]
        with store.lease("ada") as lease:
            store.put(lease, {"layer.a": torch.randn(2, 3)})
        for _ in range(2):  # the first may have begun before
            assert rounds.acquire(timeout=20)
        assert numbers(store) == [6, 5]
    finally:
        end(collector)


def test_young_versions_are_kept(tmp_path):
    store = stored(tmp_path / "store", 4)
    collector_of(store, hours=0, keep_days=1.0)._collect()
    assert numbers(store) == [4, 3, 2, 1]
    collector_of(store, hours=0)._collect()
    assert numbers(store) == [4, 3]


def test_none_is_begun_for_zero_hours_or_after_the_end(tmp_path):
    before = threading.active_count()
    store = stored(tmp_path / "store", 4)
    collector_of(store, hours=0)
    assert threading.active_count() == before
    collector = collector_of(store, hours=1)
    assert threading.active_count() == before + 1
    end(collector)
    assert threading.active_count() == before
    assert numbers(store) == [4, 3, 2, 1]


@pytest.mark.parametrize("error", [StorageFailure("users/ada is locked"), RuntimeError("a bug")])
def test_a_failure_is_counted_and_tried_again(tmp_path, monkeypatch, caplog, error):
    store, failed, seen = stored(tmp_path / "store", 4), [], threading.Event()

    def broken(**options):
        if len(failed) == 2:
            seen.set()
        raise error

    monkeypatch.setattr(store, "gc", broken)
    with caplog.at_level(logging.INFO, "ttt.serve"):
        collector = collector_of(store, failed=failed.append)
        assert seen.wait(20)
        end(collector)
    assert failed[:2] == ["collect", "collect"]
    assert "removing old versions failed" in caplog.text
    assert "ada" not in "".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("option", "value"),
    [("hours", -1.0), ("hours", 1e9), ("hours", float("nan")), ("keep_last", 0), ("keep_days", -2.0)],
)
def test_wrong_options_are_refused_by_name(tmp_path, option, value):
    with pytest.raises(ValueError, match=option):
        collector_of(stored(tmp_path / "store", 1), **{option: value})
